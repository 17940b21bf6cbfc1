"""The search: corners first, then drawn cases, a failure made simple, and no time wasted.

Trials are acted here, so that the search itself is what is tested; tests/meta plants real faults.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from twinmoe.oracle.case import MODES, Case
from twinmoe.oracle.case_figures import CaseFigures
from twinmoe.oracle.cell_result import CellResult
from twinmoe.oracle.check import SHRINK_TRIALS, Summary, check
from twinmoe.oracle.contracts import reference_contract
from twinmoe.oracle.corners import CORNERS
from twinmoe.oracle.failures import WorkerDied
from twinmoe.oracle.faults import FAULTS, Fault
from twinmoe.oracle.journal import Journal
from twinmoe.oracle.plan import Plan, plan_cells
from twinmoe.oracle.strategies import DTYPES, EP_SIZES
from twinmoe.oracle.trial import Outcome
from twinmoe.oracle.verdict import Finding, Verdict
from twinmoe.reference.config import ConfigError
from twinmoe.reference.published import PUBLISHED, scaled

PATH = "graphed: p2p, grouped_mm experts, fused router"


class ActedTrial:
    """Judges by a rule instead of running: ``wrong`` cases fail, ``deadly`` ones kill rank 1."""

    def __init__(
        self,
        wrong: Callable[[Case], bool] = lambda _: False,
        deadly: Callable[[Case], bool] = lambda _: False,
    ) -> None:
        self.wrong, self.deadly = wrong, deadly
        self.cases: list[Case] = []
        self.cut_off: list[tuple[Case, str]] = []

    def require_alive(self, ep_size: int) -> None:
        """Whoever is left is well."""

    def fails_again(self, cases: Sequence[Case]) -> bool:
        """Failures of this trial are of one case alone."""
        return self.wrong(cases[-1]) or self.deadly(cases[-1])

    def require_subjects_own(self, case: Case, failure: WorkerDied) -> None:
        """Whoever acts dead is dead by himself."""

    def run(self, case: Case) -> Outcome:
        """Return a verdict, or raise as a dead worker does."""
        self.cases.append(case)
        if self.deadly(case):
            raise WorkerDied(1, -9, {}, "rank 0: waiting in all_gather")
        found = [Finding("experts", 1, 0, 2, "out[...]")] if self.wrong(case) else []
        verdict = Verdict(reference_contract(case.config), PATH, found, worst_ratio=0.5)
        return Outcome(case, {"optimized": verdict}, {"optimized": PATH}, 0.25, 0.25)


def plan_of(ep_sizes: tuple[int, ...] = (2,), cases: int = 3, **changes: object) -> Plan:
    """Return a plan of one p2p, eager, bf16 cell for each group size."""
    cells = plan_cells(ep_sizes, ("p2p",), ("eager",), (torch.bfloat16,))
    return Plan(cells, cases, **changes)


def searched(trial: ActedTrial, plan: Plan) -> Summary:
    """Run a check on acted trials."""
    return check(plan, trial)


# --- what is tried ---------------------------------------------------------------------------


def test_a_clean_check_tries_corners_then_drawn_cases_as_planned() -> None:
    """Each cell takes its corners and its number of drawn cases; the plan knew the total."""
    trial, plan = ActedTrial(), plan_of((1, 2))
    seen: list[tuple[int, Case]] = []
    summary = check(plan, trial, lambda result, case: seen.append((result.cases, case)))
    assert summary.equivalent
    assert summary.cases == plan.total == len(trial.cases) == 2 * (len(CORNERS) + 3)
    assert [case for _, case in seen] == trial.cases
    corners = [case for _, case in plan.corners(plan.cells[0])]
    assert trial.cases[: len(corners)] == corners


def test_drawn_cases_differ_within_and_between_cells() -> None:
    """No cell spends its few cases on an example that another cell tries as well."""
    plan = Plan(plan_cells((2, 4), ("p2p", "gloo"), MODES, DTYPES), 2)
    trial = ActedTrial()
    searched(trial, plan)
    corners = {str(case) for cell in plan.cells for _, case in plan.corners(cell)}
    drawn = [case for case in trial.cases if str(case) not in corners]
    assert len(drawn) == 2 * len(plan.cells)
    assert (
        len({(case.config.hidden_size, case.seed, case.tokens) for case in drawn}) > len(drawn) / 2
    )


def test_the_seed_alone_decides_what_is_drawn() -> None:
    """The same plan tries the same cases again; another seed tries others."""
    runs = []
    for seed in (0, 0, 1):
        trial = ActedTrial()
        searched(trial, plan_of(cases=5, seed=seed))
        runs.append([str(case) for case in trial.cases[len(CORNERS) :]])
    assert runs[0] == runs[1]
    assert not set(runs[0]) & set(runs[2])


def test_a_published_model_has_no_corners() -> None:
    """With --model every case has the model's geometry in the cell's dtype."""
    model = scaled(PUBLISHED["qwen3-30b-a3b"], 32)
    trial = ActedTrial()
    plan = plan_of(cases=4, model=model)
    assert searched(trial, plan).cases == plan.total == 4
    assert {case.config for case in trial.cases} == {model}


def test_cells_are_distinct_and_only_those_that_exist() -> None:
    """An axis value given twice adds no cell, and alltoall comes without a graph."""
    cells = plan_cells((2, 2), ("p2p", "alltoall"), MODES, (torch.bfloat16, torch.bfloat16))
    assert sorted((cell.transport, cell.mode) for cell in cells) == [
        ("alltoall", "eager"), ("p2p", "eager"), ("p2p", "graphed"), ("p2p", "replayed"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("plan", "parts"),
    [
        (Plan((), 1), ("alltoall", "no cell", "add mode eager")),
        (plan_of((16,), model=PUBLISHED["mixtral-8x7b"]), ("(8)", "ep_size (16)", "divides 8")),
        (plan_of(fault="gremlin"), ("'gremlin'", "not in the registry", "use one of zeros")),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused(plan: Plan, parts: tuple[str, ...]) -> None:
    """A plan without cells, a model that ranks cannot share, an unknown fault: ConfigError."""
    trial = ActedTrial()
    with pytest.raises(ConfigError) as caught:
        searched(trial, plan)
    assert all(part in str(caught.value) for part in parts)
    assert trial.cases == []


# --- failures --------------------------------------------------------------------------------


def test_a_failing_corner_ends_its_cell_and_no_other() -> None:
    """Corners are simple as they are: the first that fails is the answer, the next cell runs."""
    trial = ActedTrial(wrong=lambda case: case.ep_size == 1 and case.values == "recorded")
    summary = searched(trial, plan_of((1, 2)))
    first, second = summary.results
    assert not summary.equivalent
    assert not first.passed
    assert first.failure is first.first_failure
    assert first.failure.case == trial.cases[first.cases - 1]
    assert second.passed
    assert second.cases == len(CORNERS) + 3


def test_a_drawn_failure_is_made_simple() -> None:
    """Shrinking keeps the failure and drops what it does not need; the first is remembered."""
    trial = ActedTrial(wrong=lambda case: case.seed > 100 and case.config.hidden_size == 24)
    (result,) = searched(trial, plan_of(cases=200)).results
    assert result.first_failure is not None
    assert result.failure is not None
    simple, first = result.failure.case, result.first_failure.case
    assert simple.config.hidden_size == first.config.hidden_size == 24
    assert 100 < simple.seed <= first.seed
    assert len(str(simple)) < len(str(first))


def test_shrinking_is_bounded_and_done_once() -> None:
    """A failure costs at most SHRINK_TRIALS more; a second failing cell is not shrunk at all."""
    trial = ActedTrial(wrong=lambda case: case.seed > 1)
    summary = searched(trial, plan_of((1, 2), cases=20))
    first, second = summary.results
    assert not first.passed
    assert not second.passed
    of_first = [case for case in trial.cases if case.ep_size == 1]
    assert first.cases < len(of_first) <= first.cases + SHRINK_TRIALS
    assert len(trial.cases) == len(of_first) + second.cases
    assert second.failure is second.first_failure


def test_a_failure_that_does_not_come_back_is_still_a_failure() -> None:
    """What was seen once was seen: a flaky layer is reported by the case that showed it."""
    calls = []

    def wrong(case: Case) -> bool:
        calls.append(case)
        return len(calls) == len(CORNERS) + 2

    (result,) = searched(ActedTrial(wrong=wrong), plan_of(cases=5)).results
    assert result.failure is not None
    assert result.failure.case == calls[len(CORNERS) + 1]


def test_dead_workers_fail_their_cell_at_once_and_the_next_cell_runs() -> None:
    """A cell whose worker died is given up, since each case could cost a timeout; others go on."""
    trial = ActedTrial(deadly=lambda case: case.ep_size == 2 and sum(case.tokens) > 3)
    summary = searched(trial, plan_of((1, 2, 4)))
    alone, dead, after = summary.results
    assert not summary.equivalent
    assert dead.worker_failure is not None
    assert dead.worker_failure[0] == trial.cases[alone.cases + dead.cases - 1]
    assert dead.worker_failure[1].rank == 1
    assert dead.cases < len(CORNERS)
    assert alone.passed
    assert after.passed
    assert after.cases == len(CORNERS) + 3


def test_a_death_while_shrinking_does_not_hide_the_failure() -> None:
    """When a simpler case kills a worker, both are reported: the failure and the death."""
    trial = ActedTrial(wrong=lambda case: case.seed > 100, deadly=lambda case: 1 < case.seed <= 100)
    (result,) = searched(trial, plan_of(cases=20)).results
    assert result.failure is not None
    assert result.failure.case.seed > 100
    assert not result.passed


# --- journals --------------------------------------------------------------------------------


class _Stopped(ActedTrial):
    """Somebody presses Ctrl-C in the middle of a case."""

    def __init__(self, at: int, wrong: Callable[[Case], bool] = lambda _: False) -> None:
        super().__init__(wrong)
        self._at = at

    def run(self, case: Case) -> Outcome:
        """Be interrupted in case number ``at``."""
        if len(self.cases) == self._at:
            raise KeyboardInterrupt
        return super().run(case)


def test_an_interrupted_check_goes_on_where_it_ended(tmp_path: Path) -> None:
    """Nothing that passed is run again, and the resumed check says what one in a piece says."""
    path, plan = tmp_path / "journal", plan_of((1, 2))
    whole, in_a_piece = ActedTrial(), plan.total
    expected = check(plan, whole)
    for stop in (3, len(CORNERS) + 5):
        path.unlink(missing_ok=True)
        with Journal(path, plan.identity) as journal:
            first = check(plan, _Stopped(stop), journal=journal)
        assert first.interrupted
        assert first.cases == stop
        trial = ActedTrial()
        with Journal(path, plan.identity, resume=True) as journal:
            second = check(plan, trial, journal=journal)
        assert [*whole.cases[:stop], *trial.cases] == whole.cases
        assert second.results == expected.results
        assert second.cases == in_a_piece
        assert not second.interrupted


def test_a_failure_is_run_again_when_a_check_is_resumed(tmp_path: Path) -> None:
    """It gets its diagnosis and its simplest case, as if nothing had ended the run."""
    path, plan = tmp_path / "journal", plan_of((1, 2), cases=20)

    def wrong(case: Case) -> bool:
        return case.ep_size == 1 and case.seed > 1

    expected = check(plan, ActedTrial(wrong))
    with Journal(path, plan.identity) as journal:
        failed = check(plan, _Stopped(len(CORNERS) + 4, wrong), journal=journal)
    assert failed.interrupted
    assert not failed.equivalent
    with Journal(path, plan.identity, resume=True) as journal:
        resumed = check(plan, ActedTrial(wrong), journal=journal)
    assert resumed.results == expected.results


def test_a_recorded_failure_that_does_not_come_again_is_one_still(tmp_path: Path) -> None:
    """What was seen before the interruption was seen, and its account is kept."""
    path, plan = tmp_path / "journal", plan_of((1,))
    with Journal(path, plan.identity) as journal:
        check(
            plan,
            _Stopped(6, lambda case: case == CORNERS["one token"](plan.cells[0])),
            journal=journal,
        )
    with Journal(path, plan.identity, resume=True) as journal:
        resumed = check(plan, ActedTrial(), journal=journal)
    (result,) = resumed.results
    assert not resumed.equivalent
    assert result.failure is not None
    account = result.failure.explain()
    assert "passes now, yet failed before this check was resumed" in account
    assert "out[...]" in account


# --- planted faults --------------------------------------------------------------------------


def test_a_fault_is_planted_wherever_it_can_be_reached_and_nowhere_else() -> None:
    """Cases within the fault's reach carry its name, the others stay clean, and both count."""
    trial = ActedTrial()
    (result,) = searched(trial, plan_of(fault="bias_in_weights")).results
    with_fault = [case for case in trial.cases if case.fault]
    assert result.planted == len(with_fault) > 0
    assert len(with_fault) < len(trial.cases)
    for case in trial.cases:
        reached = FAULTS["bias_in_weights"].reaches(replace(case, fault=""))
        assert case.fault == ("bias_in_weights" if reached else "")


def test_results_count_both_subjects_and_what_ran() -> None:
    """The worst ratio is over all subjects; paths are counted by transport and backend."""
    result = CellResult(plan_of().cells[0])
    case = CORNERS["k = E"](result.cell)
    contract = reference_contract(case.config)
    verdicts = {
        "reference": Verdict(contract, "", worst_ratio=0.75, elements=7),
        "optimized": Verdict(contract, PATH, worst_ratio=0.5, elements=5, flips=1),
    }
    result.add(case, CaseFigures.of(Outcome(case, verdicts, {"optimized": PATH}, 1.0, 0.5)))
    assert result.worst_ratio == 0.75
    assert (result.elements, result.flips) == (5, 1)
    assert result.ran == {("p2p", "grouped_mm"): 1}
    assert (result.seconds, result.judge_seconds) == (1.5, 0.5)


#: What goes wrong between ranks, and so not with one alone.
BETWEEN_RANKS = {
    "skipped_collective",
    "swapped_gate_up",
    "bias_in_weights",
    "swapped_segments",
    "stalled_rank",
    "mismatched_collective",
}


@pytest.mark.parametrize("ep_size", EP_SIZES)
@pytest.mark.parametrize("fault", [fault for fault in FAULTS.values() if not fault.id], ids=str)
def test_gross_faults_are_within_reach_of_some_corner(fault: Fault, ep_size: int) -> None:
    """None of them needs luck: a pinned corner triggers it, wherever there is a rank to cross."""
    cells = plan_cells((ep_size,), ("p2p", "alltoall"), ("eager",), (torch.bfloat16,))
    reached = any(fault.reaches(corner(cell)) for corner in CORNERS.values() for cell in cells)
    assert reached == (ep_size > 1 or fault.name not in BETWEEN_RANKS)
