"""The main job: search every cell for a case on which the twins are not equivalent."""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hypothesis import HealthCheck, Phase, given, seed, settings

from twinmoe.oracle.case import Case
from twinmoe.oracle.case_figures import CaseFigures
from twinmoe.oracle.cell_result import CellResult
from twinmoe.oracle.defects import JudgeDefectError
from twinmoe.oracle.failures import SetUpError, WorkerFailure, account
from twinmoe.oracle.faults import patch_named
from twinmoe.oracle.journal import Entry, Journal
from twinmoe.oracle.plan import Plan
from twinmoe.oracle.recurrence import Tracing
from twinmoe.oracle.strategies import Cell, cases
from twinmoe.oracle.trial import Outcome, Trial
from twinmoe.oracle.verdict import Finding
from twinmoe.reference.config import MoEConfig

#: After a failure, so many more trials may go into finding a simpler one.
SHRINK_TRIALS = 40


class _CounterexampleError(AssertionError):
    """Raised inside Hypothesis to make it look for a simpler case."""


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
        journal: Journal,
    ) -> None:
        self.plan, self.cell, self.trial, self.progress = plan, cell, trial, progress
        self.shrink, self._tracing, self._journal = shrink, tracing, journal
        self.result = CellResult(cell)
        self._known: dict[str, Outcome] = {}
        self._trials_left = SHRINK_TRIALS
        self._opening = True
        #: Ended from outside twice in one case: more would cost as much, and say as little.
        self._lost = False

    def run(self) -> None:
        """Search until the cases are spent or a failure has been made simple."""
        try:
            for _, corner in self.plan.corners(self.cell):
                self._try(corner)
            self._drawn()
        except _CounterexampleError:
            self._diagnose()
        self._look_back()

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
            try:  # what it found stands without a diagnosis
                self.trial.diagnose(self.result.failure)
            except WorkerFailure:
                pass
            except JudgeDefectError as defect:
                self.result.defects.append(defect)

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
            before = self._journal.recorded(str(self.cell), line)
            if before is not None and before.passed and self.result.failure is None:
                self._count(case, before)
                return
            outcome = self._observe(case, before)
            if outcome is None or outcome.equivalent or self._left_open(outcome):
                return
            self._known[line] = outcome
        self.result.failure = self._known[line]
        self.result.first_failure = self.result.first_failure or self._known[line]
        raise _CounterexampleError(self._known[line].explain())

    def _left_open(self, outcome: Outcome) -> bool:
        """Whether nothing is wrong but that near ties leave the answer of a plain layer open."""
        return self.plan.subject is not None and not outcome.findings and not outcome.equivalent

    def _enough(self) -> bool:
        """Whether new cases now pass untried: the cell has failed, and more of it costs too much.

        A failed worker may cost a timeout with every case; the simplest failure is kept.
        """
        shrunk = self.result.failure is not None and self._trials_left <= 0
        return shrunk or self.result.worker_failure is not None or self._lost

    def _observe(self, case: Case, before: Entry | None) -> Outcome | None:
        """Run the case; None if there is no verdict.

        After a worker's failure the cell is given up; after one of the judge itself it goes on.
        ``before`` is what an earlier run saw of it: a failure stays one that does not come again.
        """
        searching = self.result.failure is None
        self._trials_left -= 0 if searching else 1
        outcome, failed = None, ""
        try:
            outcome = self.trial.run(case)
        except WorkerFailure as failure:
            self.trial.require_subjects_own(case, failure)
            if failure.outside is None:
                self.result.worker_failure = failure.case or case, failure
            self._lost = failure.outside is not None
            failed = "" if self._lost else account(failure)
        except JudgeDefectError as defect:
            self._note(case, defect)
            return None
        if outcome is not None and outcome.equivalent and before is not None and before.failure:
            list(outcome.verdicts.values())[-1].findings.append(_seen_before(before))
        if searching:
            self._keep(case, outcome, failed)
        return outcome

    def _note(self, case: Case, defect: JudgeDefectError) -> None:
        """Count a case without a verdict; it is not journalled, so that a later run asks again."""
        self.result.defects.append(defect)
        if self.result.failure is None:
            self.result.add(case, None)
            self.progress(self.result, case)

    def _keep(self, case: Case, outcome: Outcome | None, failed: str) -> None:
        """Write the case into the journal, and count it."""
        figures, left_open = None, False
        if outcome is not None:
            figures, left_open = CaseFigures.of(outcome), self._left_open(outcome)
            failed = "" if outcome.equivalent or left_open else outcome.explain()
        entry = Entry(str(self.cell), str(case), figures, failed, left_open)
        self._journal.add(entry)
        self._count(case, entry)

    def _count(self, case: Case, entry: Entry) -> None:
        self.result.add(case, entry.figures)
        self.result.undecided += entry.undecided
        self.progress(self.result, case)


def _seen_before(entry: Entry) -> Finding:
    """What an earlier run of the same check saw, and this one does not."""
    message = f"passes now, yet failed before this check was resumed:\n{entry.failure}"
    return Finding("output", 0, None, None, message, relation="repeatability")


@dataclass
class Summary:
    """A whole check: its cells and how long it took.

    ``stopped`` says why cells are missing, where a failure was found before that; ``cut_off``,
    in which cases something ended a rank from outside, which says nothing about any layer.
    ``interrupted``: somebody ended the check before its last case.
    """

    plan: Plan
    results: list[CellResult]
    seconds: float
    stopped: str = ""
    cut_off: Sequence[tuple[Case, str]] = ()
    interrupted: bool = False

    @property
    def equivalent(self) -> bool:
        """Every cell passed."""
        return all(result.passed for result in self.results)

    @property
    def wrong(self) -> bool:
        """Some cell is not equivalent, whatever else could not be judged."""
        return any(result.wrong for result in self.results)

    @property
    def defects(self) -> list[str]:
        """An account of each case that could not be judged: no verdict, and no doubt of a layer."""
        return [str(defect) for result in self.results for defect in result.defects]

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
    plan: Plan,
    trial: Trial,
    progress: Callable[[CellResult, Case], None] = lambda *_: None,
    journal: Journal | None = None,
) -> Summary:
    """Check each cell in turn; the first failure is shrunk.

    ``journal`` keeps each case's result, and knows those of a run that ended early: see
    :meth:`Plan.identity`.  Raises SetUpError where no worker could be asked anything.
    """
    plan.check()
    start, stopped, interrupted = time.perf_counter(), "", False
    results: list[CellResult] = []
    tracing, journal = Tracing(trial.fails_again), journal or Journal()
    try:
        for cell in plan.cells:
            shrink = not any(result.wrong for result in results)
            search = _Search(plan, cell, trial, progress, shrink, tracing, journal)
            results.append(search.result)
            search.run()
    except SetUpError as error:  # a failure that was found stands, whatever became of the rest
        if all(result.passed for result in results):
            raise
        stopped = str(error)
    except KeyboardInterrupt:
        interrupted = True
    seconds = time.perf_counter() - start
    return Summary(plan, results, seconds, stopped, tuple(trial.cut_off), interrupted)
