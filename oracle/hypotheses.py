"""Named mistakes, each as the truth of the layer that somebody would have built by it.

An answer outside its envelope says that something is wrong; an answer inside the envelope
of a mistaken truth says what.  Every rule is one short function from what is true to what
would be true, or to None where the mistake changes nothing.

Legend: F rows of w13, I moe_intermediate_size, R ranks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from twinmoe.oracle.contract import RoundingContract
from twinmoe.oracle.envelope import Enclosure, Grade
from twinmoe.oracle.rounding import FORMATS, Format
from twinmoe.oracle.routing import RoutingTruth
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


@_says("gate and up are swapped: rows of w13 are [gate | up]")
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


@_says("gate and up are read interleaved: rows of w13 are [gate | up], not gate, up, gate, up")
def _interleaved(right: Supposed) -> Supposed | None:
    if not right.config.gated:
        return None
    pairs = right.weights.w13_LFH.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
    return replace(right, weights=replace(right.weights, w13_LFH=pairs))


@_says("the other GELU is computed: 'gelu' is erf's, 'gelu_pytorch_tanh' its approximation")
def _other_gelu(right: Supposed) -> Supposed | None:
    other = {"gelu": "gelu_pytorch_tanh", "gelu_pytorch_tanh": "gelu"}.get(right.config.hidden_act)
    return None if other is None else _with(right, hidden_act=other)


@_says("SiLU is computed whatever hidden_act says")
def _always_silu(right: Supposed) -> Supposed:
    return _with(right, hidden_act="silu")


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


@_says("routed_scaling_factor is missing")
def _unscaled(right: Supposed) -> Supposed:
    return _with(right, routed_scaling_factor=1.0)


@_says("routed_scaling_factor is applied twice")
def _scaled_twice(right: Supposed) -> Supposed:
    return _with(right, routed_scaling_factor=right.config.routed_scaling_factor**2)


class _BiasedWeights(Truth):
    """Router weights taken from the biased scores."""

    def routing(
        self,
        contract: RoundingContract,
        grade: Grade = Grade.SHARP,
        carry: type[Enclosure] = Enclosure,
    ) -> RoutingTruth:
        routing = super().routing(contract, grade, carry)
        return replace(routing, score_TE=routing.selection_TE)


@_says("the correction bias is in the weights: it belongs to the selection alone")
def _bias_in_weights(right: Supposed) -> Supposed | None:
    return replace(right, truth=_BiasedWeights) if right.config.use_correction_bias else None


@_says("the correction bias is left out of the selection")
def _bias_ignored(right: Supposed) -> Supposed | None:
    if not right.config.use_correction_bias:
        return None
    unbiased = replace(right.weights, correction_bias_E=None)
    return replace(_with(right, use_correction_bias=False), weights=unbiased)


@_says("groups are ignored: all experts take part in the top-k")
def _ungrouped(right: Supposed) -> Supposed:
    return _with(right, n_group=1, topk_group=1)


@_says("groups are ranked by their best expert, not by the sum of their two best")
def _best_of_group(right: Supposed) -> Supposed | None:
    if right.config.n_group == 1:
        return None
    return _with(right, group_score="max")


@_says("scores are softmax's, whatever scoring_func says")
def _softmax(right: Supposed) -> Supposed:
    return _with(right, scoring_func="softmax")


@_says("scores are the sigmoid's, whatever scoring_func says")
def _sigmoid(right: Supposed) -> Supposed:
    return _with(right, scoring_func="sigmoid")


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


# --- roundings that the contract does not declare -----------------------------------------


def _declared(right: Supposed, points: Mapping[str, Format | None]) -> Supposed:
    return replace(right, contract=replace(right.contract, **points))  # type: ignore[arg-type]


def _stored(point: str) -> Rule:
    def rule(right: Supposed) -> Supposed:
        narrow = FORMATS[right.config.dtype]
        return _declared(right, {point: narrow})

    return rule


def _kept(*points: str) -> Rule:
    def rule(right: Supposed) -> Supposed:
        return _declared(right, dict.fromkeys(points))

    return rule


_UNDECLARED = "are stored in the model's dtype, which the contract does not declare"
_KEPT = "are kept in the accumulator's format, though the contract says that they are stored"

_says(f"router weights {_UNDECLARED} (router_weights)")(_stored("router_weights"))
_says(f"router logits {_UNDECLARED} (logits)")(_stored("logits"))
_says(f"activated gates {_UNDECLARED} (gate)")(_stored("gate"))
_says(f"weighted expert outputs {_UNDECLARED} (terms)")(_stored("terms"))
_says(f"running sums over a token's experts {_UNDECLARED} (combine)")(_stored("combine"))
_says(f"gate and up {_KEPT} (gate_up)")(_kept("gate_up"))
_says(f"activations {_KEPT} (activation)")(_kept("activation"))
_says(f"expert outputs {_KEPT} (expert_output)")(_kept("expert_output"))
_says(f"gate and up, and expert outputs, {_KEPT} (gate_up, expert_output)")(
    _kept("gate_up", "expert_output")
)
