"""Of many earlier cases the one that a failure needs is found in few worlds, or nothing is said."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from twinmoe.oracle.case import Case
from twinmoe.oracle.recurrence import MOST_TRIES, Recurrence, Tracing

FAILED = Case.parse("T=3,H=16,I=8,E=4,k=2")
BEFORE = tuple(replace(FAILED, seed=number) for number in range(1, 91))


@pytest.mark.parametrize("guilty", [90, 86, 85, 50])
def test_the_earlier_case_is_found(guilty: int) -> None:
    """One case of ninety, wherever it stood, in at most fourteen worlds; then both are replayed."""
    worlds: list[Sequence[Case]] = []

    def fails(cases: Sequence[Case]) -> bool:
        worlds.append(cases)
        return BEFORE[guilty - 1] in cases

    found = Tracing(fails).trace(FAILED, BEFORE)
    assert found.needs == (BEFORE[guilty - 1],)
    assert len(worlds) == found.tries <= MOST_TRIES
    assert found.line("", FAILED) == f"twinmoe replay '{BEFORE[guilty - 1]}' '{FAILED}'"


def test_a_failure_that_comes_again_alone_needs_nothing() -> None:
    """One world, and nothing beside the line."""
    found = Tracing(lambda _: True).trace(FAILED, BEFORE)
    assert (found.needs, found.tries, found.note) == ((), 1, "")


def test_two_guilty_cases_are_not_taken_apart() -> None:
    """Where halves do not suffice, the whole stretch is named."""
    pair = {BEFORE[88], BEFORE[86]}
    found = Tracing(lambda cases: pair <= set(cases)).trace(FAILED, BEFORE)
    assert set(found.needs) >= pair
    assert found.found


def test_what_never_comes_again_is_said_so() -> None:
    """With the number of runs; the line is that of the case alone."""
    found = Tracing(lambda _: False).trace(FAILED, BEFORE[:3])
    assert found.note.startswith("failed once in 5 runs; not repeated in a fresh world")
    assert found.line("", FAILED) == f"twinmoe replay '{FAILED}'"


def test_its_time_is_bounded() -> None:
    """What one failure has used up, the next one lacks, of which nothing is claimed."""
    clock = iter(range(0, 10_000, 40))
    tracing = Tracing(lambda _: False, seconds=60.0, now=lambda: next(clock))
    assert not tracing.trace(FAILED, BEFORE).found
    assert tracing.trace(FAILED, BEFORE) == Recurrence()
