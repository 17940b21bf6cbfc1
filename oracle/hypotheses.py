"""Named mistakes, each as the truth of the layer that somebody would have built by it.

An answer outside its envelope says that something is wrong; an answer inside the envelope
of a mistaken truth says what.  Every rule is one short function from what is true to what
would be true, or to None where the mistake changes nothing.

A rounding that a contract does not declare is no mistake of meaning: those are searched
for, in :mod:`twinmoe.oracle.nearest`.

Legend: F rows of w13, I moe_intermediate_size, R ranks, L experts of a rank.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from twinmoe.oracle import misread_truths as misread
from twinmoe.oracle.contract import RoundingContract
from twinmoe.oracle.truth import Truth
from twinmoe.reference.config import ConfigError, MoEConfig
from twinmoe.reference.weights import MoEWeights


@dataclass(frozen=True)
class Supposed:
    """A layer as somebody may have understood it: what one judgement is held against."""

    config: MoEConfig
    weights: MoEWeights
    contract: RoundingContract
    ranks: int
    truth: type[Truth] = Truth


Rule = Callable[[Supposed], Supposed | None]

#: Each mistake's rule, by the sentence that names it.
HYPOTHESES: dict[str, Rule] = {}


def _says(sentence: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        HYPOTHESES[sentence] = rule
        return rule

    return register


def suppositions(right: Supposed) -> dict[str, Supposed]:
    """Every mistake that changes a layer like ``right``, by its sentence."""
    found = {}
    for sentence, rule in HYPOTHESES.items():
        try:
            supposed = rule(right)
        except ConfigError:  # there is no such layer
            continue
        if supposed is not None and supposed != right:
            found[sentence] = supposed
    return found


def _with(right: Supposed, **settings: object) -> Supposed:
    return replace(right, config=replace(right.config, **settings))  # type: ignore[arg-type]


# --- experts ------------------------------------------------------------------------------


def _halves_exchanged(w13: Tensor) -> Tensor:
    gate, up = w13.chunk(2, dim=-2)
    return torch.cat([up, gate], dim=-2)


@_says("gate and up are swapped, or up is activated: rows of w13 are [gate | up], act(gate) * up")
def _swapped(right: Supposed) -> Supposed | None:
    if not right.config.gated:
        return None
    w13 = _halves_exchanged(right.weights.w13_LFH)
    return replace(right, weights=replace(right.weights, w13_LFH=w13))


@_says("gate and up of the shared expert are swapped: rows of its w13 are [gate | up]")
def _shared_swapped(right: Supposed) -> Supposed | None:
    shared = right.weights.shared_w13_FH
    if shared is None or not right.config.gated:
        return None
    return replace(right, weights=replace(right.weights, shared_w13_FH=_halves_exchanged(shared)))


@_says("gate and up are swapped in all experts, the shared one too: rows of w13 are [gate | up]")
def _all_swapped(right: Supposed) -> Supposed | None:
    shared_too = _shared_swapped(right)
    return None if shared_too is None else _swapped(shared_too)


@_says("gate and up are read interleaved: rows of w13 are [gate | up], not gate, up, gate, up")
def _interleaved(right: Supposed) -> Supposed | None:
    if not right.config.gated:
        return None
    pairs = right.weights.w13_LFH.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
    return replace(right, weights=replace(right.weights, w13_LFH=pairs))


def _activated_by(name: str) -> Rule:
    return lambda right: _with(right, hidden_act=name)


for _name, _sentence in {
    "silu": "SiLU",
    "gelu": "GELU, as erf gives it ('gelu'),",
    "gelu_pytorch_tanh": "GELU's tanh approximation ('gelu_pytorch_tanh')",
    "relu": "ReLU",
    "relu2": "squared ReLU ('relu2')",
}.items():
    _says(f"{_sentence} is computed, whatever hidden_act says")(_activated_by(_name))


@_says("swiglu_limit is ignored")
def _unlimited(right: Supposed) -> Supposed:
    return _with(right, swiglu_limit=None)


# --- router -------------------------------------------------------------------------------


@_says("the chosen weights are not renormalised, though norm_topk_prob says so")
def _not_renormalised(right: Supposed) -> Supposed:
    return _with(right, norm_topk_prob=False)


@_says("the chosen weights are renormalised, though norm_topk_prob says not to")
def _renormalised(right: Supposed) -> Supposed:
    return _with(right, norm_topk_prob=True)


@_says(
    "softmax is taken twice, or over scores: the chosen scores need only be divided by their sum"
)
def _softmax_twice(right: Supposed) -> Supposed | None:
    if right.config.num_experts_per_tok == 1:
        return None
    return replace(right, truth=misread.SoftmaxTwice)


@_says("only k - 1 experts are chosen: the last of a token's k is missing")
def _one_less(right: Supposed) -> Supposed | None:
    count = right.config.num_experts_per_tok
    return None if count == 1 else _with(right, num_experts_per_tok=count - 1)


@_says("the last of a token's k experts is dropped, after all k were weighted")
def _last_dropped(right: Supposed) -> Supposed | None:
    told_apart = right.config.norm_topk_prob and right.config.num_experts_per_tok > 1
    return replace(right, truth=misread.LastChoiceDropped) if told_apart else None


@_says("routed_scaling_factor is missing")
def _unscaled(right: Supposed) -> Supposed:
    return _with(right, routed_scaling_factor=1.0)


@_says("routed_scaling_factor is applied twice")
def _scaled_twice(right: Supposed) -> Supposed:
    return _with(right, routed_scaling_factor=right.config.routed_scaling_factor**2)


@_says("the correction bias is in the weights: it belongs to the selection alone")
def _bias_in_weights(right: Supposed) -> Supposed | None:
    return replace(right, truth=misread.BiasedWeights) if right.config.use_correction_bias else None


@_says("the correction bias is left out of the selection")
def _bias_ignored(right: Supposed) -> Supposed | None:
    if not right.config.use_correction_bias:
        return None
    unbiased = replace(right.weights, correction_bias_E=None)
    return replace(_with(right, use_correction_bias=False), weights=unbiased)


@_says("the correction bias is subtracted from the scores, where it is to be added")
def _bias_subtracted(right: Supposed) -> Supposed | None:
    bias_E = right.weights.correction_bias_E
    if bias_E is None:
        return None
    return replace(right, weights=replace(right.weights, correction_bias_E=-bias_E))


def _epsilon(value: float) -> Rule:
    truth = misread.with_epsilon(value)
    return lambda right: replace(right, truth=truth) if right.config.norm_topk_prob else None


for _value in (1e-6, 1e-9, 1e-12):
    _says(f"{_value:g} is added to the sum of the chosen scores, where 1e-20 is meant")(
        _epsilon(_value)
    )


@_says("groups are ranked by scores without the correction bias")
def _groups_unbiased(right: Supposed) -> Supposed | None:
    if right.config.n_group == 1 or not right.config.use_correction_bias:
        return None
    return replace(right, truth=misread.GroupsRankedUnbiased)


@_says("groups are ignored: all experts take part in the top-k")
def _ungrouped(right: Supposed) -> Supposed:
    return _with(right, n_group=1, topk_group=1)


@_says("experts of groups left out score 0, not -inf: they win where biased scores are negative")
def _masked_by_zero(right: Supposed) -> Supposed | None:
    if right.config.topk_group == right.config.n_group:
        return None
    return replace(right, truth=misread.GroupsMaskedByZero)


def _groups_by(score: str) -> Rule:
    def rule(right: Supposed) -> Supposed | None:
        return None if right.config.n_group == 1 else _with(right, group_score=score)

    return rule


_says("groups are ranked by their best expert, not by the sum of their two best")(_groups_by("max"))
_says("groups are ranked by the sum of their two best experts, not by their best")(
    _groups_by("top2_sum")
)


def _scored_by(name: str) -> Rule:
    return lambda right: _with(right, scoring_func=name)


for _name, _sentence in {
    "softmax": "softmax's",
    "sigmoid": "the sigmoid's",
    "sqrtsoftplus": "the root of softplus",
}.items():
    _says(f"scores are {_sentence}, whatever scoring_func says")(_scored_by(_name))


@_says("router weights are applied to the experts' inputs, not to their outputs")
def _weight_on_input(right: Supposed) -> Supposed:
    return _with(right, router_weight_on_input=True)


@_says("router weights are applied to the experts' outputs, not to their inputs")
def _weight_on_output(right: Supposed) -> Supposed:
    return _with(right, router_weight_on_input=False)


# --- shared expert ------------------------------------------------------------------------


@_says("the shared expert is missing")
def _no_shared(right: Supposed) -> Supposed | None:
    if not right.config.has_shared_expert:
        return None
    bare = replace(right.weights, shared_w13_FH=None, shared_w2_HI=None, shared_gate_1H=None)
    settings = {"shared_expert_intermediate_size": 0, "shared_expert_gate": False}
    return replace(_with(right, **settings), weights=bare)


@_says("the shared expert's gate is missing")
def _no_shared_gate(right: Supposed) -> Supposed | None:
    if not right.config.shared_expert_gate:
        return None
    ungated = replace(right.weights, shared_gate_1H=None)
    return replace(_with(right, shared_expert_gate=False), weights=ungated)


@_says("the shared expert is added once by every rank")
def _shared_by_all(right: Supposed) -> Supposed | None:
    w2 = right.weights.shared_w2_HI
    exact = right.ranks.bit_count() == 1  # a power of two, which scales without rounding
    if w2 is None or right.ranks == 1 or not exact:
        return None
    return replace(right, weights=replace(right.weights, shared_w2_HI=w2 * right.ranks))


@_says("routed_scaling_factor is applied to the shared expert too")
def _shared_scaled(right: Supposed) -> Supposed | None:
    if not right.config.has_shared_expert or right.config.routed_scaling_factor == 1:
        return None
    return replace(right, truth=misread.SharedScaled)


# --- capacity -----------------------------------------------------------------------------


def _dropping(rows: misread.Capacity, by_sender: bool) -> Rule:
    truth = misread.with_capacity(rows, by_sender)
    return lambda right: None if by_sender and right.ranks == 1 else replace(right, truth=truth)


#: Rows that an expert takes, in the words that end a sentence.
_CAPACITIES: dict[str, misread.Capacity] = {
    f"an expert takes {most} rows": lambda tokens, k, experts, most=most: most
    for most in (8, 16, 32, 64, 128, 256, 512)
} | {
    f"an expert takes {factor:g} times its even share of the rows"
    + f", or {least}" * bool(least): lambda tokens, k, experts, factor=factor, least=least: max(  # type: ignore[misc]
        least, math.ceil(factor * tokens * k / experts)
    )
    for factor in (1.0, 1.25, 1.5, 2.0)
    for least in (0, 4, 8)
}

for _words, _rows in _CAPACITIES.items():
    _says(f"tokens are dropped: {_words}, and no more")(_dropping(_rows, False))
    _says(f"tokens are dropped: of one rank's rows, {_words}, and no more")(_dropping(_rows, True))


# --- ranks --------------------------------------------------------------------------------


def _over_ranks(truth: type[Truth]) -> Rule:
    return lambda right: None if right.ranks == 1 else replace(right, truth=truth)


_says("each rank returns only what its own experts add: the sum over ranks is missing")(
    _over_ranks(misread.OwnExpertsOnly)
)
_says("the first rank's ids are taken for every rank's own: subtract weights.experts.start")(
    _over_ranks(misread.NoOffset)
)
_says("every rank computes every token's experts, by id modulo its number of experts")(
    _over_ranks(misread.WrappedIds)
)


@_says("the routed sum is added once by every rank")
def _summed_by_all(right: Supposed) -> Supposed:
    return _with(right, routed_scaling_factor=right.config.routed_scaling_factor * right.ranks)


@_says("experts are dealt to ranks in turn: rank r owns a row of experts, not every R-th one")
def _dealt(right: Supposed) -> Supposed | None:
    experts, ranks = right.config.num_experts, right.ranks
    if ranks in (1, experts):
        return None
    taken = torch.arange(experts).view(ranks, -1).T.flatten()
    weights = right.weights
    dealt = replace(weights, w13_LFH=weights.w13_LFH[taken], w2_LHI=weights.w2_LHI[taken])
    return replace(right, weights=dealt)
