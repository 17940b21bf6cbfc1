"""Two surveys of public mistakes, made before anyone looked at how cases are drawn.

``survey/refuted.txt`` holds, for each entry that the judge saw, the case that refuted it; a few
of them run always, all in the nightly profile.  ``python -m tests.meta.survey`` asks anew.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.meta.survey.asking import AskingTrial, load_entries
from tests.meta.survey.entries import LAYERS
from tests.meta.survey.planting import PLANTED, PlantingTrial
from tests.profiles import NIGHTLY
from twinmoe.oracle.case import Case
from twinmoe.oracle.failures import WorkerFailure
from twinmoe.oracle.faults import FAULTS, VARIANTS

load_entries()

HERE = Path(__file__).parent / "survey"
REFUTED = [line.split(" ", 1) for line in (HERE / "refuted.txt").read_text().splitlines()]

#: One in so many runs always.
SAMPLE = 1 if NIGHTLY else 12

#: What a hang may cost here, on a machine that runs other tests besides.
PATIENCE_S = 8.0


def sampled(names: dict[str, object]) -> list[tuple[str, str]]:
    """Entries of a survey with the case that refuted each, and as many as the profile asks for."""
    return [(name, line) for name, line in REFUTED if name in names][::SAMPLE]


@pytest.fixture(scope="module")
def asking() -> Iterator[AskingTrial]:
    """Share worlds between the layers."""
    with AskingTrial("cpu", PATIENCE_S, ()) as trial:
        yield trial


@pytest.fixture(scope="module")
def planting() -> Iterator[PlantingTrial]:
    """Share worlds between the faults."""
    with PlantingTrial("cpu", PATIENCE_S, ("optimized",)) as trial:
        yield trial


def test_the_surveys_are_as_large_as_they_say() -> None:
    """Forty faults, forty wrong layers and fifteen right ones, each from a report of its own."""
    wrong = [layer for layer in LAYERS.values() if layer.is_wrong]
    assert len(PLANTED) >= 40
    assert len(wrong) >= 40
    assert len(LAYERS) - len(wrong) >= 15
    for entry in [*PLANTED.values(), *wrong]:
        assert re.match(r"[\w.-]+/[\w.-]+#\d+", entry.source), entry.name
        assert entry.what, entry.name


def test_no_entry_is_in_the_catalogue() -> None:
    """The surveys add to what was known: no name is taken, no report quoted again."""
    known = FAULTS | VARIANTS
    quoted = {source for fault in known.values() for source in fault.source.split(", ")}
    for fault in PLANTED.values():
        assert fault.name not in known
        assert fault.source not in quoted, fault.name


@pytest.mark.slow
@pytest.mark.parametrize(("name", "line"), sampled(LAYERS), ids=lambda value: value[:24])
def test_a_wrong_layer_is_refuted_again(asking: AskingTrial, name: str, line: str) -> None:
    """By the case that refuted it: in numbers, or because a process fails."""
    asking.ask(LAYERS[name].subject)
    try:
        assert asking.run(Case.parse(line)).findings, json.dumps(name)
    except WorkerFailure:
        assert not LAYERS[name].stages


@pytest.mark.slow
@pytest.mark.parametrize(("name", "line"), sampled(PLANTED), ids=lambda value: value[:24])
def test_a_fault_is_refuted_again(planting: PlantingTrial, name: str, line: str) -> None:
    """By the case that refuted it, which ends well without the fault where a process failed."""
    case = Case.parse(line)
    assert PLANTED[name].reaches(case)
    try:
        assert planting.run(case).findings
    except WorkerFailure:
        assert not PLANTED[name].stage
