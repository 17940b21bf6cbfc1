"""The main job: search every cell for a case on which the twins are not equivalent."""

import hashlib
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from twinmoe.oracle.case import Case
from twinmoe.oracle.corners import CORNERS
from twinmoe.oracle.failures import WorkerFailure
from twinmoe.oracle.faults import patch_named, require_fault
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


@dataclass
class CellResult:
    """What one cell's cases showed.  ``worst_ratio`` is over all subjects' outputs.

    ``planted`` counts the cases that the plan's fault could reach, ``answered`` those in which
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

    @property
    def passed(self) -> bool:
        """No case failed, in numbers or in processes, and some were decided."""
        decided = self.cases == 0 or self.undecided < self.cases
        return self.failure is None and self.worker_failure is None and decided

    def add(self, case: Case, outcome: Outcome | None) -> None:
        """Count one case; it has no outcome if a worker failed."""
        self.cases += 1
        self.planted += bool(case.fault)
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


class _CounterexampleError(AssertionError):
    """Raised inside Hypothesis to make it look for a simpler case."""


def run_check(
    plan: Plan, trial: Trial, progress: Callable[[CellResult, Case], None] = lambda *_: None
) -> Iterator[CellResult]:
    """Check each cell in turn; yields its result.  The first failure is shrunk."""
    plan.check()
    shrink = True
    for cell in plan.cells:
        result = _Search(plan, cell, trial, progress, shrink).run()
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
    ) -> None:
        self.plan, self.cell, self.trial, self.progress = plan, cell, trial, progress
        self.shrink = shrink
        self.result = CellResult(cell)
        self._known: dict[str, Outcome] = {}
        self._trials_left = SHRINK_TRIALS
        self._opening = True

    def run(self) -> CellResult:
        """Search until the cases are spent or a failure has been made simple."""
        try:
            for _, corner in self.plan.corners(self.cell):
                self._try(corner)
            self._drawn()
        except _CounterexampleError:
            self._diagnose()
        return self.result

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
        return shrunk or self.result.worker_failure is not None

    def _observe(self, case: Case) -> Outcome | None:
        """Run the case; None if a worker failed, after which the cell is given up."""
        searching = self.result.failure is None
        self._trials_left -= 0 if searching else 1
        outcome = None
        try:
            outcome = self.trial.run(case)
        except WorkerFailure as failure:
            self.result.worker_failure = case, failure
        if searching:
            self.result.add(case, outcome)
            self.progress(self.result, case)
        return outcome


@dataclass
class Summary:
    """A whole check: its cells and how long it took."""

    plan: Plan
    results: list[CellResult]
    seconds: float

    @property
    def equivalent(self) -> bool:
        """Every cell passed."""
        return all(result.passed for result in self.results)

    @property
    def cases(self) -> int:
        """Cases judged."""
        return sum(result.cases for result in self.results)

    @property
    def unanswered(self) -> bool:
        """Whether anyone's layer failed on every case: then nothing was judged."""
        return self.plan.subject is not None and not any(one.answered for one in self.results)

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
    """Run the whole plan."""
    start = time.perf_counter()
    results = list(run_check(plan, trial, progress))
    return Summary(plan, results, time.perf_counter() - start)
