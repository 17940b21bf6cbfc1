"""Histories: programs of steps that are read from a case's line, and nothing else is."""

import pytest

from twinmoe.oracle.case import Case, CaseError
from twinmoe.oracle.history import FORWARDS, HISTORIES, KINDS, HistoryError, Step, parse


def test_a_program_is_read_step_by_step() -> None:
    """Letters with digits; a missing digit is 0."""
    assert parse("f0.k1.p.f2") == (Step("f", 0), Step("k", 1), Step("p", 0), Step("f", 2))
    assert [step.is_forward for step in parse("f0.k1.o1")] == [True, False, True]


def test_steps_are_written_as_they_are_read() -> None:
    """A program joined from its steps reads back as itself."""
    for program in HISTORIES.values():
        steps = parse(program)
        assert parse(".".join(map(str, steps))) == steps


@pytest.mark.parametrize("word", ["q1", "f12", "f-1", "", "F0", "f 0"])
def test_other_words_are_refused_by_name(word: str) -> None:
    """The word, what a word may be, and an example."""
    with pytest.raises(HistoryError, match="has no step") as caught:
        parse(f"f0.{word}")
    assert repr(word) in str(caught.value)
    assert ", ".join(KINDS) in str(caught.value)


def test_a_program_must_show_something() -> None:
    """Without a forward there is nothing to judge."""
    with pytest.raises(HistoryError, match="no forward"):
        parse("k1.p")


def test_the_classic_programs_use_every_kind_of_step() -> None:
    """Each kind of trouble has a program, and each program a forward."""
    used = {step.kind for program in HISTORIES.values() for step in parse(program)}
    assert used == set(KINDS)
    assert set(FORWARDS) < set(KINDS)


def test_a_case_tells_one_story() -> None:
    """A history and a relation at once, or a malformed history, are no case."""
    line = "T=3,H=32,I=16,E=4,k=2"
    assert Case.parse(f"{line},history=f0.k1.f0").steps() == parse("f0.k1.f0")
    assert Case.parse(f"{line},mode=replayed").steps() == parse("f1.f0")
    assert Case.parse(line).steps() == parse("f0")
    with pytest.raises(CaseError, match="one story"):
        Case.parse(f"{line},history=f0,relation=halves")
    with pytest.raises(CaseError, match="has no step 'z1'"):
        Case.parse(f"{line},history=f0.z1")
