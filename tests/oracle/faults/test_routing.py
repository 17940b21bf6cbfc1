"""Planted faults of which experts a token visits: each reaches, and is named, where it says."""

import pytest

from tests.oracle.faults.planting import assert_does_not_reach, assert_names_its_stage

GROUPS = "H=64,I=16,E=8,k=2,n_group=4,topk_group=2,scoring_func=sigmoid,dtype=bf16"
FLAT = "H=64,I=16,E=6,k=3,scoring_func=sigmoid,dtype=bf16"

CASES = {
    "group_maximum": f"T=9,{GROUPS}",
    "masked_with_zero": f"T=5,{GROUPS},use_correction_bias=1,bias=negative",
    "running_maximum_from_zero": f"T=5,{FLAT},use_correction_bias=1,bias=negative",
    "padding_repeats_an_expert": f"T=3,{FLAT},padding=nan,mode=replayed",
    "guard_before_bias": f"T=5,{FLAT},use_correction_bias=1,bias=nan,seed=4",
    "narrow_logits": f"T=5,{FLAT}",
    "padded_experts": f"T=9,{FLAT},use_correction_bias=1,bias=negative",
    "unsorted_last_place": f"T=5,{FLAT},shared=24,transport=alltoall",
    "highest_on_tie": f"T=5,{FLAT},routing=equal,transport=alltoall",
    "k_from_shapes": f"T=5,{FLAT},transport=alltoall",
}

OUT_OF_REACH = {
    "group_maximum": f"T=9,{GROUPS},group_score=max",
    "masked_with_zero": f"T=5,{GROUPS}",
    "running_maximum_from_zero": f"T=5,{GROUPS},use_correction_bias=1,bias=negative",
    "padding_repeats_an_expert": f"T=4,{FLAT},padding=nan",
    "guard_before_bias": f"T=5,{FLAT},use_correction_bias=1",
    "narrow_logits": f"T=9,{FLAT}",
    "padded_experts": f"T=8,{FLAT},use_correction_bias=1,bias=negative",
    "unsorted_last_place": f"T=5,{FLAT}",
    "highest_on_tie": f"T=5,{FLAT},transport=alltoall",
    "k_from_shapes": "T=5,H=64,I=16,E=6,k=1,dtype=bf16",
}


@pytest.mark.parametrize("name", CASES)
def test_the_router_is_named_where_the_fault_reaches(name):
    """Each fault of selection is seen at the router, and nothing is without it."""
    assert_names_its_stage(name, CASES[name])


@pytest.mark.parametrize("name", OUT_OF_REACH)
def test_nothing_is_seen_where_the_fault_cannot_matter(name):
    """A case out of a fault's reach passes with the fault planted."""
    assert_does_not_reach(name, OUT_OF_REACH[name])
