"""Which contract does a layer keep?  A guess from its answers, for a person to confirm.

A layer's answers fit every contract that is wide enough.  Of those that fit all of them,
the true one explains most bits: where a contract rounds as the layer does, both ends of an
element's interval round to what was seen.  So contracts are ranked by how many elements
differ from the rounded truth, and equal ones by how few points they declare.

A guess only: cases in which two contracts give the same bits cannot tell them apart, and a
mistake that resembles a rounding may fit.  The code of the layer decides.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from twinmoe.oracle.case import Case
from twinmoe.oracle.contract import RoundingContract, Ties, Wire, storage_contract
from twinmoe.oracle.emulation.remember import RememberingTruth
from twinmoe.oracle.judgement import judge
from twinmoe.oracle.observation import RankObservation
from twinmoe.oracle.plain_layer import PlainLayer, PlainSubject
from twinmoe.oracle.rounding import FORMATS, FP32
from twinmoe.oracle.scenario import Scenario
from twinmoe.oracle.subject import Call
from twinmoe.oracle.subject_spec import PlainName, load_factory
from twinmoe.oracle.torchrun import open_world
from twinmoe.oracle.verdict import Verdict
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights

#: What differs from "every tensor stored, sums in fp32", by a name; "stored" is the model's dtype.
FAMILY: dict[str, dict[str, str | None]] = {
    "everything stored": {},
    "fused GEMM1": {"gate_up": None},
    "fused GEMM2": {"expert_output": None},
    "fused": {"gate_up": None, "expert_output": None},
    "one kernel": {"gate_up": None, "activation": None, "expert_output": None},
    "gate stored": {"gate": "stored"},
    "terms stored": {"terms": "stored"},
    "narrow sum": {"terms": "stored", "combine": "stored"},
    "narrow sum, gate stored": {"gate": "stored", "terms": "stored", "combine": "stored"},
    "sum stored": {"reduced": "stored"},
    "sum stored, gate stored": {"gate": "stored", "reduced": "stored"},
}

#: The same for the router.
ROUTERS: dict[str, dict[str, str | None]] = {
    "fp32 router": {},
    "weights stored": {"router_weights": "stored"},
    "logits and weights stored": {"logits": "stored", "router_weights": "stored"},
}


@dataclass
class Fit:
    """How one contract of the family fared on all cases."""

    name: str
    changes: dict[str, str | None]
    fits: int = 0
    cases: int = 0
    undecided: int = 0
    flips: int = 0
    elements: int = 0
    worst_ratio: float = 0.0

    @property
    def fits_all(self) -> bool:
        """Nothing was outside in any case, and some case was decided."""
        return self.fits == self.cases and self.undecided < self.cases

    def add(self, verdict: Verdict) -> None:
        """Count one judgement."""
        self.cases += 1
        self.fits += not verdict.findings
        self.undecided += not verdict.conclusive
        self.flips += verdict.flips
        self.elements += verdict.elements
        self.worst_ratio = max(self.worst_ratio, verdict.worst_ratio)

    def code(self, ranks: int) -> str:
        """The contract as one would write it into a factory; ``narrow`` is the model's format."""
        points = [f"{point}={'narrow' if to else None}" for point, to in self.changes.items()]
        points.append("ties=Ties.ANY")
        if ranks > 1:
            points.append("partial=FP32, wire=Wire.PER_HOP, reduced=FP32")
        changes = ", ".join(points)
        return f"replace(storage_contract({self.name!r}, config.dtype), {changes})"


@dataclass
class Suggestion:
    """All contracts of the family, best first; ``ranks`` that ran the layer."""

    fits: list[Fit] = field(default_factory=list)
    ranks: int = 1

    @property
    def best(self) -> Fit | None:
        """The contract to propose, if any fits everything."""
        return self.fits[0] if self.fits and self.fits[0].fits_all else None

    @property
    def equals(self) -> list[str]:
        """Other contracts that explain as many bits as the best: the cases cannot tell."""
        best = self.best
        return [
            fit.name
            for fit in self.fits[1:]
            if best is not None and fit.fits_all and fit.flips == best.flips
        ]


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
    return subject.observe(hidden_TH, Call("alltoall", max(case.tokens)))


def suggest_contract(
    subject: PlainName,
    cases: Sequence[Case],
    *,
    device: str = "cpu",
    timeout_s: float = 15.0,
    advance: Callable[[], None] = lambda: None,
) -> Suggestion:
    """Judge the layer's answers to ``cases`` (of one EP size) under every contract of the family.

    Raises WorkerFailure when a rank fails.
    """
    ranks = cases[0].ep_size
    fits = _family(ranks)
    with open_world(ranks, device, timeout_s) as world:
        for case in cases:
            seen = world.run(answers_of, case, subject.text)
            scenario = Scenario(case)
            truth = RememberingTruth(scenario.config, scenario.weights(), scenario.hidden())
            for fit in fits:
                fit.add(judge(seen, truth, contract_of(fit.changes, case.config.dtype, ranks)))
            advance()
    fits.sort(key=lambda fit: (-fit.fits, fit.flips, len(fit.changes)))
    return Suggestion(fits, ranks)


def contract_of(
    changes: dict[str, str | None], dtype: torch.dtype, ranks: int = 1
) -> RoundingContract:
    """A contract of the family; over several ranks, shares travel in fp32."""
    points = {point: FORMATS[dtype] if to else None for point, to in changes.items()}
    if ranks > 1:
        points |= {"partial": FP32, "reduced": FP32}
    contract = replace(storage_contract("suggested", dtype), ties=Ties.ANY, **points)  # type: ignore[arg-type]
    return contract if ranks == 1 else replace(contract, wire=Wire.PER_HOP)


def _family(ranks: int) -> list[Fit]:
    return [
        Fit(f"{experts}, {router}", changes | more)
        for experts, changes in FAMILY.items()
        for router, more in ROUTERS.items()
        if ranks == 1 or "reduced" not in changes
    ]
