"""What the cases of one cell have shown."""

from collections import Counter
from dataclasses import dataclass, field

from twinmoe.oracle.case import Case
from twinmoe.oracle.case_figures import CaseFigures
from twinmoe.oracle.defects import JudgeDefectError
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
    shows no expert ids.  ``left_out`` counts histories that asked what a layer does not offer,
    ``defects`` are the cases that could not be judged.
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
    defects: list[JudgeDefectError] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """No case failed or went without a verdict, and some were decided."""
        return not self.wrong and not self.defects

    @property
    def wrong(self) -> bool:
        """A case failed, in numbers or in processes, or near ties left all of them open."""
        decided = self.cases == 0 or self.undecided < self.cases
        return self.failure is not None or self.worker_failure is not None or not decided

    def add(self, case: Case, figures: CaseFigures | None) -> None:
        """Count one case; it has no figures if a worker failed, or the judge itself."""
        self.cases += 1
        self.planted += bool(case.fault) and (figures is None or figures.fault_met)
        self.configs.add(case.config)
        if figures is None:
            return
        self.answered += 1
        self.ran[figures.ran] += 1
        self.left_out.update(figures.left_out)
        self.worst_ratio = max(self.worst_ratio, figures.worst_ratio)
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(figures, name))


#: Figures that add up over cases.
_SUMS = (
    "seconds",
    "judge_seconds",
    "elements",
    "flips",
    "slots",
    "slots_visible",
    "ambiguous",
    "tokens",
)
