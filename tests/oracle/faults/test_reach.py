"""Planted faults of routing, experts and combine: each reaches, and is named, where it says."""

import pytest

from tests.oracle.faults.planting import assert_does_not_reach, assert_names_its_stage

SIZES = "H=64,I=16,E=6,dtype=bf16"
TILES = "H=96,I=40,E=3,dtype=bf16,backend=triton"
GROUPS = "H=64,I=16,E=8,k=2,n_group=4,topk_group=2,scoring_func=sigmoid,dtype=bf16"
FLAT = "H=64,I=16,E=6,k=3,scoring_func=sigmoid,dtype=bf16"

CASES = {
    # which experts a token visits
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
    # the router's weights
    "bias_in_weights": f"T=5,{SIZES},k=3,use_correction_bias=1,scoring_func=sigmoid",
    "biased_probabilities": f"T=5,{SIZES},k=3,use_correction_bias=1,transport=alltoall",
    "no_epsilon": f"T=3,{SIZES},k=3,routing=silent,scoring_func=sigmoid",
    "normalised_over_tokens": f"T=3,{SIZES},k=1",
    "raw_logits": f"T=5,{SIZES},k=3,norm_topk_prob=0",
    "scaled_twice": f"T=5,{SIZES},k=3,rsf=2.5,transport=alltoall",
    "scaled_if_normalised": f"T=5,{SIZES},k=3,rsf=2.5,norm_topk_prob=0",
    "shared_scaled_down": f"T=5,{SIZES},k=3,rsf=2.5,shared=24",
    # the computation of experts
    "swapped_gate_up": f"T=5,{SIZES},k=3",
    "interleaved_gate_up": f"T=5,{SIZES},k=3,transport=alltoall",
    "lost_clamp": f"T=5,{SIZES},k=3,swiglu_limit=1.5",
    "always_silu": f"T=5,{SIZES},k=3,hidden_act=gelu,transport=alltoall",
    "loop_ends_at_k": f"T=5,{SIZES},k=2",
    "minus_one_is_the_last": f"T=3,{SIZES},k=2,padding=nan",
    "first_weight_for_all": f"T=5,{SIZES},k=3",
    # tiles and index ranges
    "wrapped_row_offset": f"T=17,{TILES},k=3",
    "wrapped_expert_offset": f"T=5,{TILES},k=2,transport=alltoall",
    "unmasked_overhang": f"T=5,{TILES},k=2",
    "half_tile": f"T=9,{TILES},k=3",
    "half_depth": f"T=17,{TILES},k=3",
    "grid_limit": f"T=5,{TILES},k=3",
    "exchanged_workspaces": "T=5,H=16,I=40,E=3,k=3,dtype=bf16,backend=triton,transport=alltoall",
    # the combine
    "narrow_sum": f"T=5,{SIZES},k=3",
    "skipped_local_sum": f"T=5,{SIZES},k=3",
    "zero_times_garbage": f"T=3,{SIZES},k=3",
    "weighed_twice": f"T=5,{SIZES},k=3,router_weight_on_input=1",
    "weighed_in_place": f"T=5,{SIZES},k=3,router_weight_on_input=1,shared=24",
}

OUT_OF_REACH = {
    # which experts a token visits
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
    # the router's weights
    "bias_in_weights": f"T=5,{SIZES},k=3",
    "biased_probabilities": f"T=5,{SIZES},k=3,use_correction_bias=1,scoring_func=sigmoid",
    "no_epsilon": f"T=3,{SIZES},k=3,routing=silent",
    "normalised_over_tokens": f"T=1,{SIZES},k=1",
    "raw_logits": f"T=5,{SIZES},k=3,norm_topk_prob=0,scoring_func=sigmoid",
    "scaled_twice": f"T=5,{SIZES},k=3",
    "unscaled_when_parallel": f"T=5,{SIZES},k=3,rsf=2.5",
    "scaled_if_normalised": f"T=5,{SIZES},k=3,rsf=2.5",
    "shared_scaled_down": f"T=5,{SIZES},k=3,shared=24",
    # the computation of experts
    "swapped_gate_up": "T=5,H=64,I=16,E=6,k=3,gated=0,dtype=bf16",
    "interleaved_gate_up": "T=5,H=64,I=16,E=6,k=3,gated=0,dtype=bf16",
    "lost_clamp": f"T=5,{SIZES},k=3",
    "always_silu": f"T=5,{SIZES},k=3",
    "loop_ends_at_k": f"T=5,{SIZES},k=6,transport=alltoall",
    "minus_one_is_the_last": f"T=4,{SIZES},k=2,padding=nan",
    "first_weight_for_all": f"T=5,{SIZES},k=1",
    "unwritten_rows": f"T=5,{SIZES},k=3,mode=replayed",
    # tiles and index ranges
    "wrapped_row_offset": f"T=5,{TILES},k=3",
    "wrapped_expert_offset": "T=5,H=16,I=16,E=3,k=2,dtype=bf16",
    "unmasked_overhang": "T=5,H=96,I=64,E=3,k=2,dtype=bf16,backend=triton",
    "half_tile": f"T=8,{TILES},k=3",
    "half_depth": f"T=16,{TILES},k=3",
    "grid_limit": "T=5,H=96,I=40,E=2,k=2,dtype=bf16,backend=triton",
    "exchanged_workspaces": f"T=5,{TILES},k=3",
    # the combine
    "narrow_sum": "T=5,H=64,I=16,E=6,k=3,dtype=fp32",
    "order_of_atomics": f"T=5,{SIZES},k=2,history=f0.f1.f0",
    "skipped_local_sum": f"T=5,{SIZES},k=1",
    "zero_times_garbage": f"T=4,{SIZES},k=3",
    "weighed_twice": f"T=5,{SIZES},k=3",
    "weighed_in_place": f"T=5,{SIZES},k=3,router_weight_on_input=1",
    "shared_on_every_rank": f"T=5,{SIZES},k=3,shared=24",
    "ids_of_other_tokens": f"T=5,{SIZES},k=3",
}


@pytest.mark.parametrize("name", CASES)
def test_the_stage_is_named_where_the_fault_reaches(name):
    """Each fault is seen at the stage that it declares, and nothing is without it."""
    assert_names_its_stage(name, CASES[name])


@pytest.mark.parametrize("name", OUT_OF_REACH)
def test_nothing_is_seen_where_the_fault_cannot_matter(name):
    """A case out of a fault's reach passes with the fault planted."""
    assert_does_not_reach(name, OUT_OF_REACH[name])
