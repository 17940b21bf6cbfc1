"""Every fault of the registry, on the case on which a campaign caught it, is caught again.

``caught.txt`` holds what saw the fault, and the case with the fault: one line each.  After a
change of faults or strategies it is made anew from ``twinmoe faults --json``.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.profiles import NIGHTLY
from twinmoe.oracle.case import Case
from twinmoe.oracle.failures import WorkerFailure
from twinmoe.oracle.faults import FAULTS
from twinmoe.oracle.trial import Trial

CAUGHT = [
    line.split(" ", 1) for line in (Path(__file__).parent / "caught.txt").read_text().splitlines()
]

#: What a hang may cost here, on a machine that runs other tests besides.
PATIENCE_S = 8.0


@pytest.fixture(scope="module")
def trial() -> Iterator[Trial]:
    """Share worlds between the tests of this file; the readable twin need not run."""
    with Trial(subjects=("optimized",)) as shared:
        yield shared


@pytest.fixture(scope="module")
def impatient() -> Iterator[Trial]:
    """A trial for cases that hang."""
    with Trial("cpu", PATIENCE_S, ("optimized",)) as shared:
        yield shared


def cases(*seen_by: str) -> list[Case]:
    """Return the cases caught in one of these ways."""
    return [Case.parse(line) for how, line in CAUGHT if how in seen_by]


def test_every_fault_has_its_case() -> None:
    """None is missing, and each case reaches its fault."""
    all_cases = [Case.parse(line) for _, line in CAUGHT]
    assert sorted(case.fault for case in all_cases) == sorted(FAULTS)
    for case in all_cases:
        assert FAULTS[case.fault].reaches(case), case.fault


@pytest.mark.slow
@pytest.mark.parametrize("case", cases("verdict"), ids=lambda case: case.fault)
def test_a_fault_is_found_in_what_the_ranks_showed(trial: Trial, case: Case) -> None:
    """A verdict that is not equivalent, with a line that replays it."""
    outcome = trial.run(case)
    assert not outcome.equivalent
    assert outcome.verdicts["optimized"].culprit is not None
    assert str(case) in outcome.explain()


@pytest.mark.slow
@pytest.mark.parametrize("case", cases("WorkerError", "WorkerDied"), ids=lambda case: case.fault)
def test_a_fault_that_ends_a_process_names_it(trial: Trial, case: Case) -> None:
    """A typed failure that blames ranks; the same case without the fault then ends well."""
    with pytest.raises(WorkerFailure) as caught:
        trial.run(case)
    assert caught.value.ranks
    assert trial.run(replace(case, fault="")).equivalent


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", cases("WorkerHang")[:: 1 if NIGHTLY else 4], ids=lambda case: case.fault
)
def test_a_fault_that_stalls_ranks_is_told_in_seconds(impatient: Trial, case: Case) -> None:
    """Ranks and operations are named, and the run goes on."""
    assert impatient.run(replace(case, fault="")).equivalent
    with pytest.raises(WorkerFailure) as caught:
        impatient.run(case)
    assert caught.value.ranks
    assert any(caught.value.last_operations.values())
