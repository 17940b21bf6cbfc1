"""Which contract explains what a layer answered?  A search over points of a contract.

The layer is not run again: what it answered is held against the truth of one contract after
the other, from a first one on, which differ in one point, in any two, and, from the best of
those on, in as many as go on explaining more.

A layer's answers fit every contract that is wide enough.  Of those that fit, the true one
explains most bits: where a contract rounds as the layer does, both ends of an element's
interval round to what was seen.  So contracts are ranked by the share of elements that differ
from the rounded truth, with the share outside, and a small price for each point.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import combinations
from typing import Any

import torch

from twinmoe.oracle.comparison import compare
from twinmoe.oracle.contract import (
    Order,
    RoundingContract,
    Scales,
    Weighs,
    Wire,
    accumulator_of,
)
from twinmoe.oracle.envelope import Enclosure
from twinmoe.oracle.evidence import Evidence
from twinmoe.oracle.rounding import FORMATS, FP32
from twinmoe.oracle.truth import Truth
from twinmoe.reference.config import MoEConfig

#: What one more point must explain of all elements to be believed.
_PRICE = 0.005

#: So many of the best pairs are gone on from.
_BEAM = 3

#: What is stored at a point, in the plural.
_TENSORS = {
    "logits": "router logits",
    "scores": "router scores",
    "router_weights": "router weights",
    "weighted_input": "weighted inputs",
    "gate_up": "gate and up",
    "gate": "activated gates",
    "activation": "activations (h)",
    "expert_output": "expert outputs (y)",
    "terms": "weighted expert outputs",
    "combine": "running sums over a token's experts",
    "reduced": "routed sums",
    "shared_gate_up": "gate and up of the shared expert",
    "shared_output": "outputs of the shared expert",
}


#: What a router stores that never leaves the model's dtype: one difference, for one line of code.
_NARROW_ROUTER = ("logits", "scores", "score_sum", "normalised_weights", "router_weights")


@dataclass(frozen=True)
class Move:
    """One difference between contracts: points and what they become, and that in words."""

    points: tuple[tuple[str, Any], ...]
    says: str


#: Differences from a first contract.
Moves = frozenset[Move]


@dataclass(frozen=True)
class Sample:
    """One forward: what is true of it, and what was seen."""

    truth: Truth
    evidence: Evidence


@dataclass(frozen=True)
class Likeness:
    """How a contract fared: of ``elements``, those ``outside`` and those unlike the rounded truth.

    Without expert ids, near-tied tokens are left out.
    """

    elements: int = 0
    outside: int = 0
    flips: int = 0

    def __add__(self, other: "Likeness") -> "Likeness":
        return Likeness(
            self.elements + other.elements,
            self.outside + other.outside,
            self.flips + other.flips,
        )

    @property
    def share_outside(self) -> float:
        """Share of elements that no layer of this contract answers; 1 if nothing was compared."""
        return self.outside / self.elements if self.elements else 1.0

    @property
    def share_flipped(self) -> float:
        """Share of elements that differ from the rounded truth; 1 if nothing was compared."""
        return self.flips / self.elements if self.elements else 1.0

    def price(self, points: int) -> float:
        """What is left unexplained by a contract that differs in so many points; low is good."""
        return self.share_flipped + self.share_outside + _PRICE * points


def moves_from(first: RoundingContract, config: MoEConfig, ranks: int) -> list[Move]:
    """Every single difference from ``first`` that would change a layer of ``config``."""
    points = ["logits", "scores", "router_weights", "gate_up", "activation", "expert_output"]
    points += ["weighted_input"] if config.router_weight_on_input else ["terms"]
    points += ["gate"] if config.gated else []
    points += ["combine"] if config.num_experts_per_tok > 1 else []
    if config.has_shared_expert:
        points += ["shared_gate_up", "shared_output"]
        points += ["reduced"] if first.wire is Wire.NONE else []
    moves = [_move(first, config, point) for point in points]
    moves += [*_of_router(config), *_of_order(config), *_of_shared_expert(config)]
    return [move for move in moves if _changes(first, move)] + _wires(first, config, ranks)


def _move(first: RoundingContract, config: MoEConfig, point: str) -> Move:
    """To the other of two: stored as the model is, or kept."""
    model, wide = FORMATS[config.dtype], accumulator_of(config.dtype)
    kept = getattr(first, point) in (None, wide)  # whatever the hardware makes of it
    how = "stored in the model's dtype" if kept else "kept in the accumulator's format"
    format_ = model if kept else wide if point == "weighted_input" else None
    return Move(((point, format_),), f"{_TENSORS[point]} are {how}")


def _stored(config: MoEConfig, points: Iterable[str], says: str, **more: Any) -> Move:
    """All of ``points`` in the model's dtype, at once: one line of code makes them."""
    model = FORMATS[config.dtype]
    stored = [(point, model) for point in points]
    return Move((*stored, *more.items()), f"{says} stored in the model's dtype")


def _of_router(config: MoEConfig) -> Iterator[Move]:
    if config.norm_topk_prob:
        says = "the router's logits, scores, sums and weights are all"
        yield _stored(config, _NARROW_ROUTER, says)
    if not config.router_weight_on_input:
        says = "router weights multiply activations (h), not outputs, and h is"
        more = {"weighs": Weighs.ACTIVATION, "activation": None}
        yield _stored(config, ["weighted_activation"], says, **more)
        says = "router weights multiply stored activations (h), not outputs, and the result is"
        yield _stored(config, ["activation", "weighted_activation"], says, weighs=Weighs.ACTIVATION)
    if config.routed_scaling_factor != 1:
        says = "the routed sum is stored, then scaled, not the router weights, and again"
        yield _stored(config, ["reduced", "scaled"], says, scales=Scales.SUM)


def _of_order(config: MoEConfig) -> Iterator[Move]:
    if config.num_experts_per_tok > 2:  # of two terms each is the first as well as the second
        # Not in any order: what allows more explains more, whatever the layer does.
        says = f"{_TENSORS['combine']}, best expert first, are"
        yield _stored(config, ["combine"], says, combine_order=Order.SLOT)


def _of_shared_expert(config: MoEConfig) -> Iterator[Move]:
    if config.has_shared_expert and config.gated:
        yield _stored(config, ["shared_activated_gate"], "activated gates of the shared expert are")
    if config.shared_expert_gate:
        points = ("shared_gate_logits", "shared_gate_weights", "shared_terms")
        yield _stored(config, points, "the shared expert's gate, its sigmoid and its product are")


def _wires(first: RoundingContract, config: MoEConfig, ranks: int) -> list[Move]:
    if ranks == 1:
        return []
    moves = []
    for payload in dict.fromkeys((FP32, FORMATS[config.dtype])):
        for wire, reduced in ((Wire.PER_HOP, payload), (Wire.ANY_ORDER, None)):
            points = (("partial", payload), ("wire", wire), ("reduced", reduced))
            added = "at every hop" if reduced else "in the accumulator"
            says = f"ranks' shares are stored in {payload.name} and summed {added}"
            moves.append(Move(points, says))
    return [move for move in moves if _changes(first, move)]


def _changes(first: RoundingContract, move: Move) -> bool:
    return made(first, frozenset([move])) != first


def made(first: RoundingContract, moves: Iterable[Move]) -> RoundingContract:
    """``first`` with these differences."""
    return replace(first, **{point: value for move in moves for point, value in move.points})


def likeness(sample: Sample, contract: RoundingContract) -> Likeness:
    """Hold one forward's output against one contract."""
    truth, evidence = sample.truth, sample.evidence
    routing = truth.routing(contract)
    ids_TK, judged_T = routing.ids_TK, ~routing.ambiguous()
    if evidence.ids_TK is not None and evidence.ids_TK.shape == ids_TK.shape:
        seen_TK = evidence.ids_TK.long().clamp(0, truth.config.num_experts - 1)
        ids_TK = torch.where(routing.admissible(seen_TK)[:, None], seen_TK, ids_TK)
        judged_T = torch.ones_like(judged_T)
    (outputs,) = truth.unweighted(contract, ids_TK, [Enclosure])
    stages = truth.stages(contract, ids_TK, routing.weights(ids_TK), expert_output_TKH=outputs)
    result = compare(evidence.output_TH, stages.sum_TH, contract.output)
    flipped = (evidence.output_TH.double() != result.centre) & ~result.centre.isnan()
    counted = result.outside[judged_T]
    return Likeness(counted.numel(), int(counted.sum()), int(flipped[judged_T].sum()))


class Search:
    """Contracts around ``first``, each held against the same ``samples`` once."""

    def __init__(
        self, first: RoundingContract, moves: Sequence[Move], samples: Sequence[Sample]
    ) -> None:
        self.first, self.moves, self.samples = first, tuple(moves), samples
        self.found: dict[Moves, Likeness] = {}

    def around(self, most: int) -> list[Moves]:
        """Everything up to two differences away, and what the best lead to, best first.

        ``most`` bounds the number of differences.
        """
        near = [frozenset(pick) for size in (0, 1, 2) for pick in combinations(self.moves, size)]
        # those of equal experts one after the other: a truth remembers some of them
        for moves in sorted(filter(_consistent, near), key=self._experts_of):
            if len(moves) <= most:
                self._try(moves)
        for start in self.ranked()[:_BEAM]:
            self._climb(start, most)
        return self.ranked()

    def ranked(self) -> list[Moves]:
        """All that were tried, best first."""
        return sorted(self.found, key=self._price)

    def _climb(self, moves: Moves, most: int) -> None:
        """Add or take back a difference while that explains more."""
        while True:
            nexts = [moves ^ {move} for move in self.moves]
            nexts = [each for each in nexts if len(each) <= most and _consistent(each)]
            for each in nexts:
                self._try(each)
            best = min([moves, *nexts], key=self._price)
            if best == moves:
                return
            moves = best

    def _try(self, moves: Moves) -> None:
        if moves not in self.found:
            contract = made(self.first, moves)
            shown = [likeness(sample, contract) for sample in self.samples]
            self.found[moves] = sum(shown, Likeness())

    def _price(self, moves: Moves) -> float:
        return self.found[moves].price(len(moves))

    def _experts_of(self, moves: Moves) -> tuple[str, ...]:
        contract = made(self.first, moves)
        points = ("logits", "gate_up", "gate", "activation", "expert_output")
        return tuple(str(getattr(contract, point)) for point in points)


def _consistent(moves: Moves) -> bool:
    """Whether no two differences contradict each other."""
    points = [point for move in moves for point, _ in move.points]
    return len(points) == len(set(points))


def as_code(moves: Iterable[Move], config: MoEConfig, narrow: str) -> str:
    """The differences as arguments of ``replace``; ``narrow`` stands for the model's format."""
    model = FORMATS[config.dtype]
    written = []
    parts = [part for move in moves for part in move.points]
    for point, value in sorted(parts, key=lambda part: part[0]):
        if isinstance(value, Enum):
            text = f"{type(value).__name__}.{value.name}"
        else:
            text = "None" if value is None else narrow if value == model else value.name.upper()
        written.append(f"{point}={text}")
    return ", ".join(written)
