"""Verdicts of several forwards become one: the worst of each."""

from __future__ import annotations

import pytest
import torch

from twinmoe.oracle.contract import storage_contract
from twinmoe.oracle.verdict import Finding, Verdict, merged

CONTRACT = storage_contract("any", torch.bfloat16)


def verdicts() -> list[Verdict]:
    """One that fails late, one that fails early, one that decides nothing."""
    late, early = (
        Finding(stage, rank, 0, 0, word)
        for stage, rank, word in (("output", 0, "late"), ("router", 1, "early"))
    )
    return [
        Verdict(CONTRACT, "a", [late], worst_ratio=0.75, elements=2),
        Verdict(CONTRACT, "b", [early], worst_ratio=0.25, elements=3),
        Verdict(CONTRACT, "c", worst_ratio=0.5, conclusive=False, ratios={"router": 0.5}),
    ]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_merged_verdicts_keep_the_worst_of_each(order: tuple[int, ...]) -> None:
    """In any order: ratios, counts, what was left open, and the first stage at fault."""
    whole = merged([verdicts()[place] for place in order])
    assert (whole.worst_ratio, whole.elements, whole.conclusive) == (0.75, 5, False)
    assert (whole.path, len(whole.findings)) == ("b", 2)
    assert whole.culprit is not None
    assert whole.culprit.message == "early"
    assert whole.ratios == {"router": 0.5}
