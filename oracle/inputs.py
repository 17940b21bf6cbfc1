"""From a Case to its tensors: the same in every process and on every machine.

Values are drawn so that mix-ups show: ranks have different scales, experts different
magnitudes, gate and up different ranges (``MoEWeights.random``).

Legend: T tokens, H hidden_size, E experts, K experts per token.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from twinmoe.oracle.alternating import answer_in_turn, ask_in_turn
from twinmoe.oracle.case import Case
from twinmoe.oracle.magnitudes import scaled_input, scaled_weights
from twinmoe.oracle.recording import recorded_hidden_states
from twinmoe.reference import draws
from twinmoe.reference.placement import Placement
from twinmoe.reference.weights import MoEWeights

#: Logit advantage of experts that a routing kind wants chosen.
_ADVANTAGE = 12.0

#: Value of the hidden channel that carries that advantage.
_CARRIER = 4.0

#: How far below 0 logits lie where scores shall vanish, in every second of three tokens: the
#: sigmoid of -60 is far below the normalisation's epsilon.  In every third token it is twice as
#: far: that sigmoid is below every fp32 number.  The first has ordinary scores.
_SILENCE = 60.0

#: How far finely graded biases around 1 lie apart: fp32 tells them from each other, bf16 does not.
_GRADE = 2.0**-12

#: What the other channels then still say: outliers on the loudest rank must not outvote it.
_BACKGROUND = 1 / 64


def weights_for(case: Case, experts: range | None = None) -> MoEWeights:
    """Weights of ``experts`` (None: all), shaped and scaled as the case asks."""
    weights = MoEWeights.random(case.config, case.seed, experts=experts)
    shaped = replace(
        weights,
        router_EH=_router(case, weights.router_EH),
        correction_bias_E=_bias(case, weights.correction_bias_E),
    )
    return scaled_weights(case.magnitude, case.config, case.seed, shaped)


def tokens_at(case: Case, step: int) -> tuple[int, ...]:
    """Tokens per rank ``step`` batches before the judged one (step 0).

    Other batches give every rank another rank's count, within the same bucket; a single
    rank gets half.  Every other one of them is half as large, in a smaller bucket; where
    batches alternate, a single rank's odd ones stay as large.  A batch whose size the case gives
    has that many tokens on its fullest rank, the others in proportion.
    """
    if step == 0:
        return case.tokens
    shift = step % case.ep_size
    counts = case.tokens[shift:] + case.tokens[:shift]
    if step <= len(case.batches):
        most = max(1, *counts)
        return tuple(-(-count * case.batches[step - 1] // most) for count in counts)
    alone = case.ep_size == 1 and case.routing != "alternating"
    halved = alone or step % 2 == 0
    return tuple((count + 1) // 2 for count in counts) if halved else counts


def largest_batch(case: Case) -> int:
    """The most tokens that a rank has in any forward of the case's history."""
    steps = {step.number for step in case.steps() if step.is_forward}
    return max(max(tokens_at(case, step)) for step in {0, *steps})


def hidden_for(case: Case, rank: int, step: int = 0) -> Tensor:
    """Hidden states [T, H] of ``rank`` in the case's dtype, ``step`` batches ago."""
    tokens = tokens_at(case, step)[rank]
    x_TH = _values(case, tokens, seed=(case.seed * 1009 + step) * 64 + rank)
    x_TH = x_TH * (1.0 + 0.25 * rank)
    if case.routing in ("ties", "equal") or case.values == "integers":
        x_TH = x_TH.round().clamp(-2, 2)
    if case.routing in ("one_expert", "one_rank"):
        x_TH[:, 0] = _CARRIER
    if case.routing == "silent":
        x_TH[:, 0] = _CARRIER * (torch.arange(tokens) % 3)
    if case.routing == "alternating":
        x_TH = ask_in_turn(x_TH, step)
    x_TH = scaled_input(case.magnitude, case.config, x_TH).to(case.config.dtype)
    return _strided(x_TH) if case.layout == "strided" else x_TH


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _values(case: Case, tokens: int, seed: int) -> Tensor:
    hidden = case.config.hidden_size
    if case.values == "recorded":
        return recorded_hidden_states(tokens, hidden, seed).float()
    x_TH = draws.normal((tokens, hidden), torch.float32, seed, "hidden")
    if case.values == "positive":
        return x_TH.abs()
    if case.values == "outlier":
        channels = torch.randperm(hidden, generator=_generator(seed))[: max(1, hidden // 64)]
        x_TH[:, channels] *= 30.0
    return x_TH


def _strided(x_TH: Tensor) -> Tensor:
    """The same values as a view into a larger tensor: row stride > H, odd offset."""
    tokens, hidden = x_TH.shape
    backing = torch.full((tokens, hidden + 3), torch.nan, dtype=x_TH.dtype)
    backing[:, 1 : hidden + 1] = x_TH
    return backing[:, 1 : hidden + 1]


def _router(case: Case, router_EH: Tensor) -> Tensor:
    shape, dtype = tuple(router_EH.shape), router_EH.dtype
    if case.routing == "free":
        return router_EH
    if case.routing == "equal":
        return torch.zeros_like(router_EH)
    generator = _generator(case.seed + 1)
    if case.routing == "ties":
        # small integers over a power of two: logits are exact, pairs of experts tie exactly
        base = torch.randint(-1, 2, shape, generator=generator).float()
        scale = 1.0 / (1 << round(math.sqrt(shape[1])).bit_length())
        return (base[torch.arange(shape[0]) // 2] * scale).to(dtype)
    if case.routing == "near_ties":
        paired = router_EH[torch.arange(shape[0]) // 2].clone()
        nudge = 1 + torch.finfo(dtype).eps
        paired[1::2, 0] = (paired[1::2, 0].float() * nudge).to(dtype)
        return paired
    return _favouring(case, router_EH * _BACKGROUND, generator)


def _favouring(case: Case, favoured: Tensor, generator: torch.Generator) -> Tensor:
    """Router whose first channels outvote the others, which ``favoured`` holds."""
    if case.routing == "alternating":
        return answer_in_turn(case.config, favoured, generator)
    favoured[:, 0] = 0
    if case.routing == "silent":
        favoured[:, 0] = -_SILENCE / _CARRIER
        return favoured
    favoured[_targets(case, generator), 0] = _ADVANTAGE / _CARRIER
    return favoured


def _targets(case: Case, generator: torch.Generator) -> Tensor:
    """Experts that every token shall want: k of them, or all of one rank."""
    config = case.config
    if case.routing == "one_rank" and config.n_group == 1:
        placement = Placement(config.num_experts, case.ep_size)
        rank = int(torch.randint(case.ep_size, (), generator=generator))
        return torch.tensor(placement.experts_of(rank))
    group_size = config.num_experts // config.n_group
    groups = torch.randperm(config.n_group, generator=generator)[: config.topk_group]
    experts = (groups[:, None] * group_size + torch.arange(group_size)).flatten()
    order = torch.randperm(len(experts), generator=generator)
    return experts[order[: config.num_experts_per_tok]]


def _disabled(case: Case, bias_E: Tensor) -> Tensor:
    """Biases of which so many are -inf that k finite ones remain, or one less; one may be NaN."""
    left = max(1, case.config.num_experts_per_tok - case.seed % 2)
    order_E = torch.randperm(len(bias_E), generator=_generator(case.seed))
    disabled_E = bias_E.index_fill(0, order_E[left:], -torch.inf)
    if case.bias == "disabled":
        return disabled_E
    return disabled_E.index_fill(0, order_E[case.seed % len(bias_E)], torch.nan)


def _bias(case: Case, bias_E: Tensor | None) -> Tensor | None:
    if bias_E is None or case.bias == "mixed":
        return bias_E
    if case.bias == "nan":
        return bias_E.index_fill(0, torch.tensor([case.seed % len(bias_E)]), torch.nan)
    if case.bias.startswith("disabled"):
        return _disabled(case, bias_E)
    if case.bias == "fine":
        return 1.0 + torch.arange(len(bias_E)) * _GRADE
    return bias_E - 2.0 if case.bias == "negative" else bias_E * 100.0
