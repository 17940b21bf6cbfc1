"""A campaign: plant each fault and search until the judge sees it, or the budget is spent.

All faults meet one stream of cases, drawn as ``check`` draws them, so that the number of
cases until a fault is seen says what an engineer would wait.  A case that a fault cannot
reach is counted, and not run: planted or not, it would be the same forward.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from twinmoe.oracle.case import MODES, Case
from twinmoe.oracle.defects import JudgeDefectError, judging
from twinmoe.oracle.failures import WorkerFailure
from twinmoe.oracle.faults import Fault
from twinmoe.oracle.plan import plan_cells
from twinmoe.oracle.showing import Showing
from twinmoe.oracle.strategies import DEVICE_TRANSPORTS, DTYPES, EP_SIZES, Cell, cases
from twinmoe.oracle.trial import Trial

#: A case costs about twice as much with every doubling of ranks; most faults need two.
_EP_WEIGHTS = {1: 2, 2: 4, 4: 2, 8: 1}

#: AlltoAll has one mode where the others have three.
_ALLTOALL_WEIGHT = 3

#: Draws of one run of Hypothesis.
_PART = 6

#: What a hasty test would have used, with PyTorch's own relative tolerance for bf16.
_ATOL, _RTOL = 2e-2, 1.6e-2


@dataclass(frozen=True)
class Hunt:
    """What became of one planted fault.

    ``cases`` of the stream were needed, of which ``ran`` could show it, in ``seconds``.
    ``seen_by`` names what saw it: "truth", a relation, or a worker's failure; empty for a
    survivor, whose ``cases`` are the whole budget.  ``plain`` says whether ``assert_close``
    against the readable twin would have seen it on the first plain case that it reaches;
    None where the stream has no such case.  ``defects`` tell which cases could not be judged.
    """

    fault: Fault
    seen_by: str
    stage: str
    cases: int
    ran: int
    seconds: float
    plain: bool | None
    case: Case | None = None
    account: str = ""
    defects: tuple[str, ...] = ()

    @property
    def caught(self) -> bool:
        """Whether the judge saw it."""
        return bool(self.seen_by)


def case_stream(
    count: int, stream_seed: int, ep_sizes: Sequence[int] = EP_SIZES, device: str = "cpu"
) -> list[Case]:
    """``count`` cases over all cells of ``device``, drawn by Hypothesis as ``check`` draws them."""
    cells = plan_cells(ep_sizes, DEVICE_TRANSPORTS[device], MODES, DTYPES)
    weighted = [cell for cell in cells for _ in range(_weight(cell))]
    drawn: dict[str, Case] = {}
    for part in itertools.count():
        for case in _part(weighted, f"{stream_seed}/{part}", device):
            drawn.setdefault(str(case), case)
        if len(drawn) >= count:
            return list(drawn.values())[:count]
    raise AssertionError("unreachable: parts never end")


def _part(cells: Sequence[Cell], part_seed: str, device: str) -> list[Case]:
    """A few draws: of many, Hypothesis makes the later ones from the earlier, all alike."""
    drawn: list[Case] = []

    @seed(part_seed)
    @settings(
        max_examples=_PART,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(cells).flatmap(lambda cell: cases(cell, device=device)))
    def draw(case: Case) -> None:
        drawn.append(case)

    draw()
    return drawn[1:]  # it opens with the simplest case, the same every time


def _weight(cell: Cell) -> int:
    return _EP_WEIGHTS[cell.ep_size] * (_ALLTOALL_WEIGHT if cell.transport == "alltoall" else 1)


def hunt(
    fault: Fault,
    stream: Sequence[Case],
    trial: Trial,
    progress: Callable[[Fault, int], None] = lambda *_: None,
    *,
    compare_plain: bool = True,
) -> Hunt:
    """Run the cases that ``fault`` reaches until one is not equivalent.

    ``progress`` hears of every case that runs.  A case that cannot be judged shows nothing.
    """
    start, ran = time.perf_counter(), 0
    plain, defects = None, list[str]()
    if compare_plain:
        with _noted(defects):
            plain = _seen_by_assert_close(fault, stream, trial)
    for number, case in enumerate(stream, start=1):
        if not fault.reaches(case):
            continue
        ran += 1
        progress(fault, number)
        planted, seen = replace(case, fault=fault.name), None
        with _noted(defects):
            seen = _seen(planted, trial)
        if seen is not None:
            seconds, told = time.perf_counter() - start, tuple(defects)
            by, stage, account = seen
            return Hunt(fault, by, stage, number, ran, seconds, plain, planted, account, told)
    seconds, told = time.perf_counter() - start, tuple(defects)
    return Hunt(fault, "", "", len(stream), ran, seconds, plain, defects=told)


@contextmanager
def _noted(defects: list[str]) -> Iterator[None]:
    """Go on after a case that could not be judged."""
    try:
        yield
    except JudgeDefectError as defect:
        defects.append(str(defect))


def _seen(case: Case, trial: Trial) -> tuple[str, str, str] | None:
    """(what saw it, stage, account), or None if nothing did."""
    try:
        outcome = trial.run(case)
    except WorkerFailure as failure:
        _require_health(case, trial)
        return type(failure).__name__, "", str(failure)
    if outcome.equivalent:
        return None
    culprit = outcome.verdicts["optimized"].culprit
    if culprit is None:
        return None  # inconclusive: nothing was seen
    return culprit.relation or "truth", culprit.stage, outcome.explain()


def _require_health(case: Case, trial: Trial) -> None:
    """Raise WorkerFailure unless ``case`` ends well without its fault: else it shows nothing.

    A machine too busy for the timeout, or a broken installation, must not pass for a catch.
    """
    trial.run(replace(case, fault=""))


def _seen_by_assert_close(fault: Fault, stream: Sequence[Case], trial: Trial) -> bool | None:
    """Whether one plain forward beside the readable twin's would have been enough."""
    plain = (replace(case, history="", relation="", mode="eager", batches=()) for case in stream)
    case = next((case for case in plain if fault.reaches(case)), None)
    if case is None:
        return None
    planted = replace(case, fault=fault.name)
    try:
        showings = trial.observe(planted, ("optimized", "reference"))
    except WorkerFailure:
        return True
    with judging(planted):
        return any(_far_apart(showing) for showing in showings)


def _far_apart(showing: dict[str, Showing]) -> bool:
    outputs = [
        answer.observation.output_TH
        for one in showing.values()
        for answer in one.answers
        if answer is not None
    ]
    try:
        torch.testing.assert_close(*outputs, atol=_ATOL, rtol=_RTOL)
    except AssertionError:
        return True
    return False
