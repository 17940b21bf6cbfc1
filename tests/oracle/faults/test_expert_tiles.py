"""Planted faults of tiles and index ranges: each reaches, and is named, where it says."""

import pytest

from tests.oracle.faults.planting import assert_does_not_reach, assert_names_its_stage

SIZES = "H=96,I=40,E=3,dtype=bf16,backend=triton"

CASES = {
    "wrapped_row_offset": f"T=17,{SIZES},k=3",
    "wrapped_expert_offset": f"T=5,{SIZES},k=2,transport=alltoall",
    "unmasked_overhang": f"T=5,{SIZES},k=2",
    "half_tile": f"T=9,{SIZES},k=3",
    "half_depth": f"T=17,{SIZES},k=3",
    "grid_limit": f"T=5,{SIZES},k=3",
    "exchanged_workspaces": "T=5,H=16,I=40,E=3,k=3,dtype=bf16,backend=triton,transport=alltoall",
}

OUT_OF_REACH = {
    "wrapped_row_offset": f"T=5,{SIZES},k=3",
    "wrapped_expert_offset": "T=5,H=16,I=16,E=3,k=2,dtype=bf16",
    "unmasked_overhang": "T=5,H=96,I=64,E=3,k=2,dtype=bf16,backend=triton",
    "half_tile": f"T=8,{SIZES},k=3",
    "half_depth": f"T=16,{SIZES},k=3",
    "grid_limit": "T=5,H=96,I=40,E=2,k=2,dtype=bf16,backend=triton",
    "exchanged_workspaces": f"T=5,{SIZES},k=3",
}


@pytest.mark.parametrize("name", CASES)
def test_the_experts_are_named_where_the_fault_reaches(name):
    """Each fault of sizes is seen at the experts, and nothing is without it."""
    assert_names_its_stage(name, CASES[name])


@pytest.mark.parametrize("name", OUT_OF_REACH)
def test_nothing_is_seen_where_the_fault_cannot_matter(name):
    """A case out of a fault's reach passes with the fault planted."""
    assert_does_not_reach(name, OUT_OF_REACH[name])


@pytest.mark.parametrize(
    ("name", "hidden"), [("wrapped_row_offset", 96), ("exchanged_workspaces", 16)]
)
def test_the_other_backend_has_the_fault_too(name, hidden):
    """Offsets and workspaces are wrong with grouped_mm as they are with triton."""
    assert_names_its_stage(name, f"T=17,H={hidden},I=40,E=3,k=3,dtype=bf16,backend=grouped_mm")
