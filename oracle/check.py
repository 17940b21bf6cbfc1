"""The main job: search every cell for a case on which the twins are not equivalent."""

import hashlib
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from twinmoe.oracle.case import Case
from twinmoe.oracle.cell_result import CellResult
from twinmoe.oracle.corners import CORNERS
from twinmoe.oracle.failures import SetUpError, WorkerFailure
from twinmoe.oracle.faults import patch_named, require_fault
from twinmoe.oracle.recurrence import Tracing
from twinmoe.oracle.strategies import Cell, cases
from twinmoe.oracle.subject_spec import PlainName
from twinmoe.oracle.trial import Outcome, Trial
from twinmoe.reference.config import ConfigError, MoEConfig

#: After a failure, so many more trials may go into finding a simpler one.
SHRINK_TRIALS = 40


@dataclass(frozen=True)
class Plan:
    """What to check: the cells, random cases a cell, geometry, seed, fault and device.

    ``subject`` is anyone's layer, instead of our twins.
    """

    cells: tuple[Cell, ...]
    cases_per_cell: int
    model: MoEConfig | None = None
    seed: int = 0
    fault: str = ""
    device: str = "cpu"
    subject: PlainName | None = None

    @property
    def total(self) -> int:
        """Cases that a clean run takes; a published geometry has no corners."""
        return sum(len(self.corners(cell)) + self.cases_per_cell for cell in self.cells)

    def corners(self, cell: Cell) -> list[tuple[str, Case]]:
        """This cell's share of the pinned corners; the cells of one size cover them all."""
        if self.model is not None:
            return []
        same_size = [other for other in self.cells if other.ep_size == cell.ep_size]
        share = range(same_size.index(cell), len(CORNERS), len(same_size))
        names = list(CORNERS)
        picked = share or [same_size.index(cell) % len(names)]
        corners = [(names[i], self.fit(CORNERS[names[i]](cell))) for i in picked]
        # what a layer cannot be asked makes some of them equal
        return list({str(case): (name, case) for name, case in corners}.values())

    @property
    def asked(self) -> str:
        """The subject as an option on a command line, with a blank before it."""
        return "" if self.subject is None else f" --subject {shlex.quote(self.subject.text)}"

    def fit(self, case: Case) -> Case:
        """``case`` as one that the subject can be asked."""
        return case if self.subject is None else self.subject.fit(case)

    def check(self) -> None:
        """Raise ConfigError for a plan that checks nothing, or that no ranks could share."""
        if not self.cells:
            raise ConfigError(
                "the transports and modes (alltoall, in a graph) form no cell: alltoall reads its "
                "split sizes on the host; add mode eager or another transport"
            )
        if self.model is not None:
            for cell in self.cells:
                self.model.check_ep_size(cell.ep_size)
        require_fault(self.fault)
        if self.fault and self.subject is not None:
            raise ConfigError(
                f"fault ({self.fault!r}) cannot be planted in {self.subject.text}: faults are "
                "changes of this project's own layer; drop --fault or --subject"
            )


def plan_cells(
    ep_sizes: Sequence[int],
    transports: Sequence[str],
    modes: Sequence[str],
    dtypes: Sequence[torch.dtype],
) -> tuple[Cell, ...]:
    """Every combination that exists, once each: alltoall has no graph."""
    cells = (
        Cell(ep_size, transport, mode, dtype)
        for ep_size in ep_sizes
        for transport in transports
        for mode in modes
        for dtype in dtypes
        if transport != "alltoall" or mode == "eager"
    )
    return tuple(dict.fromkeys(cells))


class _CounterexampleError(AssertionError):
    """Raised inside Hypothesis to make it look for a simpler case."""


def run_check(
    plan: Plan, trial: Trial, progress: Callable[[CellResult, Case], None] = lambda *_: None
) -> Iterator[CellResult]:
    """Check each cell in turn; yields its result.  The first failure is shrunk."""
    plan.check()
    shrink, tracing = True, Tracing(trial.fails_again)
    for cell in plan.cells:
        result = _Search(plan, cell, trial, progress, shrink, tracing).run()
        shrink = shrink and result.passed
        yield result


class _Search:
    """Hypothesis on one cell: pinned corners first, then drawn cases, then shrinking."""

    def __init__(
        self,
        plan: Plan,
        cell: Cell,
        trial: Trial,
        progress: Callable[[CellResult, Case], None],
        shrink: bool,
        tracing: Tracing,
    ) -> None:
        self.plan, self.cell, self.trial, self.progress = plan, cell, trial, progress
        self.shrink, self._tracing = shrink, tracing
        self.result = CellResult(cell)
        self._known: dict[str, Outcome] = {}
        self._trials_left = SHRINK_TRIALS
        self._opening = True
        #: Ended from outside twice in one case: more would cost as much, and say as little.
        self._lost = False

    def run(self) -> CellResult:
        """Search until the cases are spent or a failure has been made simple."""
        try:
            for _, corner in self.plan.corners(self.cell):
                self._try(corner)
            self._drawn()
        except _CounterexampleError:
            self._diagnose()
        self._look_back()
        return self.result

    def _look_back(self) -> None:
        """Find out whether workers are still there, and how what failed comes again."""
        try:
            self.trial.require_alive(self.cell.ep_size)
        except WorkerFailure as lost:
            self.result.worker_failure = lost.case, lost
        if (failed := self.result.failure) is not None:
            failed.recurrence = self._tracing.trace(failed.case, failed.before)
        if self.result.worker_failure is not None:
            case, failure = self.result.worker_failure
            self.result.recurrence = self._tracing.trace(case, failure.before)

    def _diagnose(self) -> None:
        if self.result.failure is not None and self.plan.subject is not None:
            with suppress(WorkerFailure):  # what it found stands without a diagnosis
                self.trial.diagnose(self.result.failure)

    def _drawn(self) -> None:
        phases = [Phase.generate, Phase.shrink] if self.shrink else [Phase.generate]
        drawn = cases(self.cell, self.plan.model, self.plan.device).map(self.plan.fit)
        search = given(drawn)(self._try_but_the_first)
        search = seed(self._cell_seed())(search)
        settings(
            max_examples=self.plan.cases_per_cell + 1,
            phases=phases,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            print_blob=False,
            suppress_health_check=list(HealthCheck),
        )(search)()

    def _try_but_the_first(self, case: Case) -> None:
        """Hypothesis opens with its simplest example: the same in all cells, no random case."""
        opening, self._opening = self._opening, False
        if not opening:
            self._try(case)

    def _cell_seed(self) -> int:
        digest = hashlib.blake2b(f"{self.plan.seed}/{self.cell}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")

    def _try(self, case: Case) -> None:
        """One case; raises _CounterexampleError so that Hypothesis may simplify it."""
        fault = patch_named(self.plan.fault)
        if fault is not None and fault.reaches(case):
            case = replace(case, fault=fault.name)
        line = str(case)
        if line not in self._known:
            if self._enough():
                return
            outcome = self._observe(case)
            if outcome is None or outcome.equivalent or self._left_open(outcome):
                return
            self._known[line] = outcome
        self.result.failure = self._known[line]
        self.result.first_failure = self.result.first_failure or self._known[line]
        raise _CounterexampleError(self._known[line].explain())

    def _left_open(self, outcome: Outcome) -> bool:
        """Whether nothing is wrong but that near ties leave the answer of a plain layer open."""
        if self.plan.subject is None or outcome.findings:
            return False
        self.result.undecided += self.result.failure is None
        return True

    def _enough(self) -> bool:
        """Whether new cases now pass untried: the cell has failed, and more of it costs too much.

        A failed worker may cost a timeout with every case; the simplest failure is kept.
        """
        shrunk = self.result.failure is not None and self._trials_left <= 0
        return shrunk or self.result.worker_failure is not None or self._lost

    def _observe(self, case: Case) -> Outcome | None:
        """Run the case; None if a worker failed, after which the cell is given up."""
        searching = self.result.failure is None
        self._trials_left -= 0 if searching else 1
        outcome = None
        try:
            outcome = self.trial.run(case)
        except WorkerFailure as failure:
            self.trial.require_subjects_own(case, failure)
            if failure.outside is None:
                self.result.worker_failure = failure.case or case, failure
            self._lost = failure.outside is not None
        if searching:
            self.result.add(case, outcome)
            self.progress(self.result, case)
        return outcome


@dataclass
class Summary:
    """A whole check: its cells and how long it took.

    ``stopped`` says why cells are missing, where a failure was found before that; ``cut_off``,
    in which cases something ended a rank from outside, which says nothing about any layer.
    """

    plan: Plan
    results: list[CellResult]
    seconds: float
    stopped: str = ""
    cut_off: Sequence[tuple[Case, str]] = ()

    @property
    def equivalent(self) -> bool:
        """Every cell passed."""
        return all(result.passed for result in self.results)

    @property
    def cases(self) -> int:
        """Cases judged."""
        return sum(result.cases for result in self.results)

    @property
    def undecided(self) -> int:
        """Cases of anyone's layer that near ties left open."""
        return sum(result.undecided for result in self.results)

    @property
    def left_out(self) -> Counter[str]:
        """Histories that asked what anyone's layer does not offer, by its name."""
        return sum((result.left_out for result in self.results), Counter())

    @property
    def configs(self) -> set[MoEConfig]:
        """All layers that were judged."""
        return set().union(*(result.configs for result in self.results))

    @property
    def planted(self) -> int:
        """Cases with the plan's fault."""
        return sum(result.planted for result in self.results)


def check(
    plan: Plan, trial: Trial, progress: Callable[[CellResult, Case], None] = lambda *_: None
) -> Summary:
    """Run the whole plan; raises SetUpError where no worker could be asked anything."""
    start, stopped = time.perf_counter(), ""
    results: list[CellResult] = []
    try:
        for result in run_check(plan, trial, progress):
            results.append(result)
    except SetUpError as error:  # a failure that was found stands, whatever became of the rest
        if all(result.passed for result in results):
            raise
        stopped = str(error)
    return Summary(plan, results, time.perf_counter() - start, stopped, tuple(trial.cut_off))
