"""Histories of anyone's layer: what it offers is asked of it, what it lacks is said."""

from __future__ import annotations

import pytest
import torch

from tests.oracle import living_layers
from twinmoe.oracle.case import Case
from twinmoe.oracle.corners import CORNERS
from twinmoe.oracle.offers import WITHOUT, left_out
from twinmoe.oracle.showing import Showing, judge_showings
from twinmoe.oracle.strategies import Cell
from twinmoe.oracle.subject_spec import PlainName
from twinmoe.oracle.trial import observe_case
from twinmoe.oracle.verdict import Verdict
from twinmoe.oracle.worker import RankContext

ALONE = RankContext(0, 1, None, torch.device("cpu"))
CELL = Cell(1, "alltoall", "eager", torch.bfloat16)
HISTORIES = [name for name in CORNERS if name.startswith("history: ")]


def asked(layer: str, corner: str) -> tuple[Verdict, Showing]:
    """What a layer of living_layers.py answers to a corner of every check, on one rank."""
    name = f"{living_layers.__file__}:{layer}"
    case: Case = PlainName(name).fit(CORNERS[corner](CELL))
    shown = observe_case(ALONE, case, [name])[name]
    return judge_showings(case, [shown]), shown


@pytest.mark.parametrize("corner", [*HISTORIES, "busy, then idle experts"])
def test_a_right_layer_lives_through_every_history(corner: str) -> None:
    """All that it offers is asked, and nothing is left out."""
    verdict, shown = asked("Living", corner)
    assert verdict.equivalent, str(verdict)
    assert not shown.left_out


@pytest.mark.parametrize(
    ("layer", "corner"),
    [
        ("StaleCopies", "history: reload"),
        ("StaleCopies", "history: checkpoint"),
        ("MovedWeights", "history: reload"),
        ("StuckSwitch", "history: kill switch"),
        ("SetUpRegardless", "history: switched before the first capture"),
        ("ReadsScratch", "history: poisoned memory"),
        ("KeyedByAddress", "history: reload"),
        ("SecondLife", "history: re-created group"),
    ],
)
def test_a_wrong_state_is_found(layer: str, corner: str) -> None:
    """By the one corner that asks for it; a plain forward is right."""
    living_layers.KeyedByAddress.cache.clear()
    living_layers.SecondLife.lives.clear()
    assert asked(layer, "one token")[0].equivalent
    living_layers.SecondLife.lives.clear()
    verdict, _ = asked(layer, corner)
    assert verdict.findings


def test_memory_that_nobody_filled_is_found() -> None:
    """New allocations hold NaN, whether the layer offers to be poisoned or not."""
    assert asked("NeverFilled", "history: poisoned memory")[0].findings


@pytest.mark.parametrize(
    ("corner", "name"),
    [
        ("checkpoint", "reload"),
        ("kill switch", "set_kill_switch"),
        ("poisoned memory", "poison"),
        ("swap", "graph_safe"),
    ],
)
def test_what_a_layer_lacks_is_said(corner: str, name: str) -> None:
    """By the name that it would have; what is left of the history is judged."""
    verdict, shown = asked("Silent", f"history: {corner}")
    assert shown.left_out == {name}
    assert verdict.equivalent


def test_the_line_counts_histories() -> None:
    """One line, in the order of the list; none where nothing was missing."""
    assert left_out({}) == ""
    assert left_out({"poison": 1, "reload": 14}) == (
        "left out: the layer has no reload (14 histories: built anew instead, on other weights at "
        "the same addresses), no poison (1 history: new allocations alone were poisoned)"
    )
    names = "reload", "set_kill_switch", "symmetric_calls", "poison", "graph_safe"
    assert tuple(WITHOUT) == names
