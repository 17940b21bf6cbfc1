"""Which contract does a layer keep?  A guess from its answers, for a person to confirm.

The layer runs once for each case; :mod:`twinmoe.oracle.nearest` searches contracts on some of
the answers, and the best of them are judged on all.

A guess only: cases in which two contracts give the same bits cannot tell them apart, and a
mistake that resembles a rounding may fit.  The code of the layer decides.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from twinmoe.oracle.admission import admitted
from twinmoe.oracle.case import Case
from twinmoe.oracle.contract import RoundingContract, Ties, Wire, storage_contract
from twinmoe.oracle.contracts import on_device
from twinmoe.oracle.emulation.remember import RememberingTruth
from twinmoe.oracle.evidence import Evidence
from twinmoe.oracle.judgement import judge
from twinmoe.oracle.nearest import (
    Likeness,
    Move,
    Moves,
    Sample,
    Search,
    as_code,
    likeness,
    made,
    moves_from,
)
from twinmoe.oracle.observation import RankObservation
from twinmoe.oracle.plain_layer import PlainLayer, PlainSubject
from twinmoe.oracle.rounding import FP32
from twinmoe.oracle.scenario import Scenario
from twinmoe.oracle.subject import Call
from twinmoe.oracle.subject_spec import PlainName, load_factory, load_layers
from twinmoe.oracle.torchrun import open_world
from twinmoe.oracle.verdict import Verdict
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights

#: Cases that the search looks at, those with most to tell; and contracts judged on all cases.
_SEARCHED, _JUDGED = 3, 12

#: Points in which a contract of the search may differ from storing everything.
_MOST = 6

#: Several ranks' shares travel in fp32, until something else explains more.
_WIRED: dict[str, Any] = {"partial": FP32, "wire": Wire.PER_HOP, "reduced": FP32}

#: One case: as the search takes it, and as the judge does.
Shown = tuple[Sample, Sequence[RankObservation]]


@dataclass
class Fit:
    """How one contract fared on all cases; ``moves`` lead to it from storing everything."""

    moves: Moves
    fits: int = 0
    cases: int = 0
    undecided: int = 0
    likeness: Likeness = field(default_factory=Likeness)

    @property
    def fits_all(self) -> bool:
        """Nothing was outside in any case, and some case was decided."""
        return self.fits == self.cases and self.undecided < self.cases

    def add(self, verdict: Verdict, seen: Likeness) -> None:
        """Count one judgement."""
        self.cases += 1
        self.fits += not verdict.findings
        self.undecided += not verdict.conclusive
        self.likeness += seen


@dataclass
class Suggestion:
    """The nearest contracts, best first, for the layers of ``configs``, one for each case."""

    fits: list[Fit]
    configs: Sequence[MoEConfig]
    ranks: int = 1

    @property
    def best(self) -> Fit | None:
        """The contract to propose, if any fits everything."""
        return self.fits[0] if self.fits[0].fits_all else None

    @property
    def equals(self) -> list[Fit]:
        """Other contracts that explain as many bits as the best: the cases cannot tell."""
        best = self.best
        return [
            fit
            for fit in self.fits[1:]
            if best is not None and fit.fits_all and fit.likeness.flips == best.likeness.flips
        ]

    def changes(self, fit: Fit) -> str:
        """What differs from storing everything, as code; ``narrow`` is the model's format."""
        return as_code(fit.moves, self.configs[0], narrow="narrow")

    def code(self, fit: Fit) -> list[str]:
        """The contract as lines of a factory; ``narrow`` is the model's format.

        The wire stands apart: a layer on one rank has none.
        """
        points: dict[str, Any] = {"ties": Ties.ANY}
        points |= {point: value for move in fit.moves for point, value in move.points}
        usual = _WIRED if self.ranks > 1 else {}
        wire = {point: points.pop(point, value) for point, value in usual.items()}
        lines = [
            f"contract = replace(storage_contract('mine', config.dtype), {self._code(points)})"
        ]
        if wire:
            lines += ["if place.group:", f"    contract = replace(contract, {self._code(wire)})"]
        return lines

    def _code(self, points: dict[str, Any]) -> str:
        return as_code([Move(tuple(points.items()), "")], self.configs[0], narrow="narrow")


def first_contract(dtype: torch.dtype, ranks: int) -> RoundingContract:
    """Everything stored, ties left open: where the search begins."""
    stored = replace(storage_contract("mine", dtype), ties=Ties.ANY)
    return stored if ranks == 1 else replace(stored, **_WIRED)


def answers_of(context: RankContext, case: Case, name: str) -> RankObservation:
    """One forward of a layer on this rank, whatever contract it declares, or none."""
    factory = load_factory(name)

    def undeclared(config: MoEConfig, weights: MoEWeights, place: RankContext) -> PlainLayer:
        layer = factory(config, weights, place)
        return PlainLayer(layer.forward, storage_contract("undeclared", config.dtype))

    scenario = Scenario(case)
    size = context.world_size
    share = case.config.num_experts // size
    mine = range(context.rank * share, (context.rank + 1) * share)
    weights = scenario.weights(mine).to(context.device)
    hidden_TH = scenario.hidden()[context.rank].to(context.device)
    subject = PlainSubject(name, undeclared, scenario, weights, context)
    call = Call("alltoall", max(case.tokens))
    seen, promised = subject.observe(hidden_TH, call), subject.contract(call)
    return admitted(seen, context.rank, case.tokens, scenario.config, promised)


def suggest_contract(
    subject: PlainName,
    cases: Sequence[Case],
    *,
    device: str = "cpu",
    timeout_s: float = 15.0,
    advance: Callable[[], None] = lambda: None,
) -> Suggestion:
    """Run the layer on ``cases`` (of one EP size and dtype), and search contracts for its answers.

    ``timeout_s`` without progress is a hang.  Raises WorkerFailure when a rank fails.
    """
    ranks = cases[0].ep_size
    shown: list[Shown] = []
    opening = load_layers, ((subject.text,),)
    with open_world(ranks, device, timeout_s, opening) as world:
        for case in cases:
            seen = world.run(answers_of, case, subject.text)
            scenario = Scenario(case)
            truth = RememberingTruth(scenario.config, scenario.weights(), scenario.hidden())
            shown.append((Sample(truth, Evidence.of(seen, truth)), seen))
            advance()
    return _nearest(shown, [case.config for case in cases], ranks, device)


def _nearest(
    shown: Sequence[Shown], configs: Sequence[MoEConfig], ranks: int, device: str
) -> Suggestion:
    """Search by the cases in which most points matter; judge by all of them."""
    dtype = configs[0].dtype
    first = on_device(first_contract(dtype, ranks), dtype, device)
    moves = [moves_from(first, sample.truth.config, ranks) for sample, _ in shown]
    telling = sorted(zip(moves, shown, strict=True), key=lambda pair: -len(pair[0]))[:_SEARCHED]
    every = dict.fromkeys(move for some, _ in telling for move in some)
    search = Search(first, list(every), [sample for _, (sample, _) in telling])
    fits = [Fit(found) for found in search.around(_MOST)[:_JUDGED]]
    for sample, seen in shown:
        for fit in fits:
            contract = made(first, fit.moves)
            fit.add(judge(seen, sample.truth, contract), likeness(sample, contract))
    fits.sort(key=lambda fit: (not fit.fits_all, fit.likeness.price(len(fit.moves))))
    return Suggestion(fits, configs, ranks)
