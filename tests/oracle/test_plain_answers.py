"""What forwards of anyone's layer answer: whatever it is, it is a finding about the layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest

from tests.oracle import plain_layers
from twinmoe.oracle.case import Case
from twinmoe.oracle.showing import judge_showings
from twinmoe.oracle.trial import Trial
from twinmoe.oracle.verdict import Verdict

LINE = "T=3,H=32,I=16,E=4,k=2,dtype=bf16,transport=alltoall"


@pytest.fixture(scope="module")
def asked() -> Iterator[Callable[[str, str], Verdict]]:
    """Return a function that judges one of the layers of plain_layers.py, all in one world."""
    with Trial("cpu", 15.0, ()) as trial:

        def verdict_of(layer: str, line: str) -> Verdict:
            name, case = f"{plain_layers.__file__}:{layer}", Case.parse(line)
            return judge_showings(case, [rank[name] for rank in trial.observe(case, [name])])

        yield verdict_of


@pytest.mark.parametrize(
    ("layer", "stage", "words"),
    [
        ("wrong_shape", "output", r"output_TH has shape \(3, 31\), expected \(3, 32\)"),
        (
            "wrong_dtype",
            "output",
            "holds torch.float64, expected bf16, which .* declares: cast it",
        ),
        ("wrong_device", "output", "on meta, expected a dense tensor in memory"),
        ("wrong_taps", "router", r"ids_TK has shape \(3, 1\), expected \(3, 2\)"),
        ("wrong_layout", "output", r"layout torch.sparse_coo .*to_dense\(\)"),
        ("listed_taps", "router", "ids_TK is list"),
        ("scores_for_ids", "router", "ids_TK holds torch.float32, expected integers"),
    ],
)
def test_whatever_an_answer_holds_is_a_finding(
    layer: str, stage: str, words: str, asked: Callable[[str, str], Verdict]
) -> None:
    """Rows, ids or weights of the wrong kind: no error of a process, and the stage is named."""
    verdict = asked(layer, LINE)
    (found,) = [one for one in verdict.findings if re.search(words, one.message)]
    assert found.stage == stage


def test_ids_in_a_buffer_that_is_used_again_are_those_of_their_forward(
    asked: Callable[[str, str], Verdict],
) -> None:
    """A static buffer of ids is no mistake: each forward's are copied when they are shown."""
    verdict = asked("static_ids", f"{LINE},history=f0.f1.f2.f0")
    assert verdict.equivalent, str(verdict)
