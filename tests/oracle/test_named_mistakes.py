"""Mistakes in a layer as somebody would write it: each is named, and nothing else is.

The layers run in worlds of one and two ranks, without showing their experts' ids.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.oracle import cornered_layers, mistaken_layers, plain_layers
from tests.oracle.mistaken_layers import MISTAKES, NAMELESS, OF_RANKS, name_of
from twinmoe.oracle.case import Case
from twinmoe.oracle.corners import CORNERS
from twinmoe.oracle.diagnose import diagnosis_of, telling
from twinmoe.oracle.showing import judge_showings
from twinmoe.oracle.strategies import Cell
from twinmoe.oracle.subject_spec import PlainName
from twinmoe.oracle.trial import Trial

ONE = "T=3,H=64,I=24,E=6,k=3,rsf=2.5,shared=24,dtype=bf16,transport=alltoall,seed=3"
TWO = ONE.replace("T=3", "T=3/0")


@pytest.fixture(scope="module")
def trial() -> Iterator[Trial]:
    """Worlds for all layers of this file."""
    with Trial("cpu", 15.0, ()) as shared:
        yield shared


def named(trial: Trial, sentence: str, line: str) -> list[str]:
    """What the diagnosis says of a layer with that mistake, on a case and on a telling one."""
    name = f"{mistaken_layers.__file__}:{name_of(sentence)}"
    case = Case.parse(line)
    shown = [trial.observe(each, [name]) for each in (case, telling(case))]
    return diagnosis_of(*([rank[name] for rank in showings] for showings in shown))


@pytest.mark.parametrize("sentence", MISTAKES)
def test_a_mistake_is_named(sentence: str, trial: Trial) -> None:
    """Its sentence, and no other."""
    (found,) = named(trial, sentence, ONE)
    assert found.startswith(sentence)


@pytest.mark.parametrize(
    "sentence", OF_RANKS | {name: MISTAKES[name] for name in list(MISTAKES)[:2]}
)
def test_a_mistake_is_named_on_two_ranks(sentence: str, trial: Trial) -> None:
    """Those that only several ranks can make, and some of the others, one rank without tokens."""
    (found,) = named(trial, sentence, TWO)
    assert found.startswith(sentence)


@pytest.mark.parametrize("line", [ONE, TWO], ids=["ep1", "ep2"])
@pytest.mark.parametrize("wrong", NAMELESS)
def test_what_has_no_name_gets_none(wrong: str, line: str, trial: Trial) -> None:
    """A layer that is wrong for another reason is not told a wrong one."""
    assert named(trial, wrong, line) == []


@pytest.mark.parametrize("line", [ONE, TWO], ids=["ep1", "ep2"])
def test_a_right_layer_is_not_explained(line: str, trial: Trial) -> None:
    """Nor is it wrong."""
    assert named(trial, "right", line) == []


@pytest.mark.parametrize(
    ("layer", "capacity"),
    [
        ("capacity_64", "64 rows"),
        ("capacity_of_factor_2", "2 times its even share of the rows, or 8"),
    ],
)
def test_dropped_tokens_are_named(layer: str, capacity: str, trial: Trial) -> None:
    """With the capacity, in the corner that sweeps counts."""
    name = f"{cornered_layers.__file__}:{layer}"
    corner = CORNERS["counts beside tiles, to one expert"]
    case = PlainName(name).fit(corner(Cell(1, "alltoall", "eager", torch.bfloat16)))
    showings = trial.observe(case, [name])
    found = diagnosis_of([rank[name] for rank in showings])
    assert f"tokens are dropped: an expert takes {capacity}, and no more" in found
    # A least capacity that no batch here comes down to changes nothing.
    assert all(sentence.startswith("tokens are dropped: an expert takes") for sentence in found)


def test_one_token_proves_nothing(trial: Trial) -> None:
    """What fits a single row may do so by chance; the telling case has more of them."""
    name = f"{mistaken_layers.__file__}:{name_of('ReLU')}"
    case = Case.parse(ONE.replace("T=3", "T=1"))
    showings = trial.observe(case, [name])
    assert diagnosis_of([rank[name] for rank in showings]) == []
    assert min(telling(case).tokens) > 1


def test_a_bias_in_16_bits_is_not_taken_for_another_mistake(trial: Trial) -> None:
    """A bias in the weights would divide by next to nothing there: it fits whatever is answered."""
    name = f"{plain_layers.__file__}:narrow_bias"
    line = "T=12,H=32,I=16,E=8,k=2,dtype=bf16,use_correction_bias=1,bias=negative,seed=2"
    case = Case.parse(f"{line},transport=alltoall")
    showings = trial.observe(case, [name])
    assert judge_showings(case, [rank[name] for rank in showings]).findings
    assert diagnosis_of([rank[name] for rank in showings]) == []
