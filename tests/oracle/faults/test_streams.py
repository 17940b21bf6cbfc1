"""Each planted fault of streams shows where the trigger says, and not in a first forward."""

import pytest

from tests.oracle.faults.planting import assert_does_not_reach, assert_names_its_stage

_LAYER = "T=5,H=96,I=40,E=4,k=2,dtype=bf16,shared=24"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("unawaited_input", f"{_LAYER},history=f0.f1"),
        ("unawaited_input", f"{_LAYER},mode=graphed,history=f1.f2.f0"),
        ("returned_early", f"{_LAYER},transport=alltoall,history=p.f0"),
    ],
)
def test_names_its_stage(name: str, line: str) -> None:
    """On one rank, the fault is found, and found where it lies."""
    assert_names_its_stage(name, line)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("unawaited_input", f"{_LAYER},history=f0.k1.f0"),
        ("returned_early", f"{_LAYER},transport=alltoall,history=f0.g0.p"),
    ],
)
def test_does_not_reach(name: str, line: str) -> None:
    """The batch before was the same one, or memory is not filled: nothing shows."""
    assert_does_not_reach(name, line)
