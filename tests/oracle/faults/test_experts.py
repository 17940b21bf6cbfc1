"""Planted faults of expert computation, where a single case does not tell all of them."""

import pytest
import torch

from tests.oracle.faults.planting import (
    assert_does_not_reach,
    assert_names_its_stage,
    shares,
)
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults import FAULTS

SIZES = "H=64,I=16,E=6,dtype=bf16"


def test_the_late_experts_are_left_out_on_the_other_path_too():
    """On the AlltoAll path as well, slots of a rank's experts from the k-th on are 0."""
    assert_names_its_stage("loop_ends_at_k", f"T=5,{SIZES},k=2,transport=alltoall")


def test_rows_without_a_local_expert_keep_the_last_batch():
    """An unwritten row of a rank's share is what the batch before left there."""
    line = f"T=5/5,{SIZES},k=1,mode=replayed"
    assert FAULTS["unwritten_rows"].reaches(Case.parse(line))
    before, right = shares(line)
    _, wrong = shares(f"{line},fault=unwritten_rows")
    stale = (right == 0).all(dim=1) & (before != 0).any(dim=1)
    assert stale.any()
    assert torch.equal(wrong, torch.where(stale[:, None], before, right))


@pytest.mark.parametrize(
    ("name", "hidden"), [("wrapped_row_offset", 96), ("exchanged_workspaces", 16)]
)
def test_the_other_backend_has_the_fault_too(name, hidden):
    """Offsets and workspaces are wrong with grouped_mm as they are with triton."""
    assert_names_its_stage(name, f"T=17,H={hidden},I=40,E=3,k=3,dtype=bf16,backend=grouped_mm")


@pytest.mark.parametrize("mode", ["eager", "graphed"])
def test_old_tiles_run_again_where_the_map_is_not_cleared(mode):
    """Three experts are busy where eight were, in one graph or in none: old tiles hit new rows."""
    line = f"T=4,H=96,I=40,E=8,k=3,dtype=bf16,backend=triton,routing=alternating,mode={mode}"
    assert_names_its_stage("uncleared_tile_map", f"{line},history=f0.f1.f0")
    assert_does_not_reach("uncleared_tile_map", f"{line},history=f1.f0")
