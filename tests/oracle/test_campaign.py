"""Campaigns: one stream for all faults, honest counts, and failures that show nothing."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from twinmoe.oracle.campaign import Hunt, case_stream, hunt
from twinmoe.oracle.case import Case
from twinmoe.oracle.failures import WorkerFailure, WorkerHang
from twinmoe.oracle.faults import FAULTS
from twinmoe.oracle.trial import Outcome, Trial

FAULT = FAULTS["zeros"]


@pytest.fixture(scope="module")
def stream() -> list[Case]:
    """Thirty cases, drawn once all modules are imported: Hypothesis draws numbers found in them."""
    return case_stream(30, 5)


class Staged(Trial):
    """A trial whose outcomes are a function of the case."""

    def __init__(self, tell: Callable[[Case], Outcome]) -> None:
        super().__init__()
        self.tell, self.seen = tell, list[Case]()

    def run(self, case: Case) -> Outcome:
        """Tell, and remember what was asked."""
        self.seen.append(case)
        return self.tell(case)


def test_a_stream_is_the_same_for_a_seed_and_varied(stream: list[Case]) -> None:
    """Distinct cases of every size, transport and story; another seed, others."""
    assert case_stream(30, 5) == stream
    assert case_stream(30, 6) != stream
    assert len(set(map(str, stream))) == 30
    assert {case.ep_size for case in stream} >= {1, 2, 4}
    assert len({case.transport for case in stream}) > 2
    assert any(case.history for case in stream)
    assert any(case.relation for case in stream)
    assert {case.ep_size for case in case_stream(10, 5, (2,))} == {2}


def test_unreached_cases_are_counted_and_not_run(stream: list[Case]) -> None:
    """A survivor has met the whole stream; only what can show it is run."""
    fault = replace(FAULT, reaches=lambda case: case.ep_size == 2)
    trial = Staged(Outcome)
    found = hunt(fault, stream, trial, compare_plain=False)
    reached = [case for case in stream if case.ep_size == 2]
    assert not found.caught
    assert (found.cases, found.ran) == (30, len(reached))
    assert [replace(case, fault="") for case in trial.seen] == reached
    assert {case.fault for case in trial.seen} == {"zeros"}


def test_a_failed_process_counts_where_the_same_case_ends_well_without_the_fault(
    stream: list[Case],
) -> None:
    """A hang is a catch only if it is the fault that hangs."""

    def hang(case: Case) -> Outcome:
        if case.fault:
            raise WorkerHang([1], 2.0, {}, "rank 0: waiting")
        return Outcome(case)

    found = hunt(FAULT, stream, Staged(hang), compare_plain=False)
    assert found.seen_by == "WorkerHang"

    def broken(_case: Case) -> Outcome:
        raise WorkerHang([0, 1], 2.0, {}, "no operation yet")

    with pytest.raises(WorkerFailure):
        hunt(FAULT, stream, Staged(broken), compare_plain=False)


@pytest.fixture(scope="module")
def found(stream: list[Case]) -> Hunt:
    """A real hunt for a gross fault."""
    with Trial(subjects=("optimized",)) as trial:
        return hunt(FAULT, stream, trial)


def test_a_gross_fault_is_caught_at_once(found: Hunt) -> None:
    """By truth, at its stage, on the first case that reaches it, with a line that replays it."""
    assert found.seen_by == "truth"
    assert found.stage == "output"
    assert found.ran == 1
    assert found.case is not None
    assert found.case.fault == "zeros"
    assert str(found.case) in found.account
    assert found.plain is True
