"""Planted faults of expert computation: each reaches, and is named, where it says."""

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

CASES = {
    "swapped_gate_up": f"T=5,{SIZES},k=3",
    "interleaved_gate_up": f"T=5,{SIZES},k=3,transport=alltoall",
    "lost_clamp": f"T=5,{SIZES},k=3,swiglu_limit=1.5",
    "always_silu": f"T=5,{SIZES},k=3,hidden_act=gelu,transport=alltoall",
    "loop_ends_at_k": f"T=5,{SIZES},k=2",
    "minus_one_is_the_last": f"T=3,{SIZES},k=2,padding=nan",
    "first_weight_for_all": f"T=5,{SIZES},k=3",
}

OUT_OF_REACH = {
    "swapped_gate_up": "T=5,H=64,I=16,E=6,k=3,gated=0,dtype=bf16",
    "interleaved_gate_up": "T=5,H=64,I=16,E=6,k=3,gated=0,dtype=bf16",
    "lost_clamp": f"T=5,{SIZES},k=3",
    "always_silu": f"T=5,{SIZES},k=3",
    "loop_ends_at_k": f"T=5,{SIZES},k=6,transport=alltoall",
    "minus_one_is_the_last": f"T=4,{SIZES},k=2,padding=nan",
    "first_weight_for_all": f"T=5,{SIZES},k=1",
    "unwritten_rows": f"T=5,{SIZES},k=3,mode=replayed",
}


@pytest.mark.parametrize("name", CASES)
def test_the_experts_are_named_where_the_fault_reaches(name):
    """Each fault of the experts is seen there, and nothing is without it."""
    assert_names_its_stage(name, CASES[name])


@pytest.mark.parametrize("name", OUT_OF_REACH)
def test_nothing_is_seen_where_the_fault_cannot_matter(name):
    """A case out of a fault's reach passes with the fault planted."""
    assert_does_not_reach(name, OUT_OF_REACH[name])


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
