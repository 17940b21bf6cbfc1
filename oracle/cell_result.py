"""What the cases of one cell have shown."""

from collections import Counter
from dataclasses import dataclass, field

from twinmoe.oracle.case import Case
from twinmoe.oracle.failures import WorkerFailure
from twinmoe.oracle.recurrence import Recurrence
from twinmoe.oracle.strategies import Cell
from twinmoe.oracle.trial import Outcome
from twinmoe.reference.config import MoEConfig


@dataclass
class CellResult:
    """What one cell's cases showed.  ``worst_ratio`` is over all subjects' outputs.

    ``planted`` counts the cases in which the plan's fault was met, ``answered`` those in which
    no worker failed, ``undecided`` those of anyone's layer that near ties leave open, because it
    shows no expert ids.  ``left_out`` counts histories that asked what a layer does not offer.
    """

    cell: Cell
    cases: int = 0
    planted: int = 0
    undecided: int = 0
    worst_ratio: float = 0.0
    elements: int = 0
    flips: int = 0
    slots: int = 0
    slots_visible: int = 0
    ambiguous: int = 0
    tokens: int = 0
    seconds: float = 0.0
    judge_seconds: float = 0.0
    answered: int = 0
    ran: Counter[tuple[str, str]] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    configs: set[MoEConfig] = field(default_factory=set)
    failure: Outcome | None = None
    first_failure: Outcome | None = None
    worker_failure: tuple[Case, WorkerFailure] | None = None
    recurrence: Recurrence = field(default_factory=Recurrence)

    @property
    def passed(self) -> bool:
        """No case failed, in numbers or in processes, and some were decided."""
        decided = self.cases == 0 or self.undecided < self.cases
        return self.failure is None and self.worker_failure is None and decided

    def add(self, case: Case, outcome: Outcome | None) -> None:
        """Count one case; it has no outcome if a worker failed."""
        self.cases += 1
        self.planted += bool(case.fault) and (outcome is None or outcome.fault_met)
        self.configs.add(case.config)
        if outcome is None:
            return
        self.answered += 1
        self.seconds += outcome.run_seconds + outcome.judge_seconds
        self.judge_seconds += outcome.judge_seconds
        self.left_out.update(outcome.left_out)
        self.ran[_what_ran(list(outcome.paths.values())[-1])] += 1
        for verdict in outcome.verdicts.values():
            self.worst_ratio = max(self.worst_ratio, verdict.worst_ratio)
        verdict = outcome.verdicts.get("optimized") or next(iter(outcome.verdicts.values()))
        self.elements += verdict.elements
        self.flips += verdict.flips
        self.slots += verdict.slots
        self.slots_visible += verdict.slots_visible
        self.ambiguous += verdict.ambiguous
        self.tokens += verdict.tokens


def _what_ran(path: str) -> tuple[str, str]:
    """The parts of a path report that name software: transport, or layer, and expert backend."""
    transport, experts = path.partition(": ")[2].split(", ")[:2]
    return transport, experts.removesuffix(" experts")
