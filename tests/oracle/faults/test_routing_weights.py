"""Planted faults of the router's weights: each reaches, and is named, where it says."""

import pytest
import torch

from tests.oracle.faults.planting import (
    CPU,
    assert_does_not_reach,
    assert_names_its_stage,
)
from twinmoe.optimized.router import InferenceTopKRouter
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults import FAULTS, planted
from twinmoe.oracle.inputs import hidden_for, weights_for
from twinmoe.oracle.worker import RankContext

SIZES = "H=64,I=16,E=6,dtype=bf16"

CASES = {
    "bias_in_weights": f"T=5,{SIZES},k=3,use_correction_bias=1,scoring_func=sigmoid",
    "biased_probabilities": f"T=5,{SIZES},k=3,use_correction_bias=1,transport=alltoall",
    "no_epsilon": f"T=3,{SIZES},k=3,routing=silent,scoring_func=sigmoid",
    "normalised_over_tokens": f"T=3,{SIZES},k=1",
    "raw_logits": f"T=5,{SIZES},k=3,norm_topk_prob=0",
    "scaled_twice": f"T=5,{SIZES},k=3,rsf=2.5,transport=alltoall",
    "scaled_if_normalised": f"T=5,{SIZES},k=3,rsf=2.5,norm_topk_prob=0",
    "shared_scaled_down": f"T=5,{SIZES},k=3,rsf=2.5,shared=24",
}

OUT_OF_REACH = {
    "bias_in_weights": f"T=5,{SIZES},k=3",
    "biased_probabilities": f"T=5,{SIZES},k=3,use_correction_bias=1,scoring_func=sigmoid",
    "no_epsilon": f"T=3,{SIZES},k=3,routing=silent",
    "normalised_over_tokens": f"T=1,{SIZES},k=1",
    "raw_logits": f"T=5,{SIZES},k=3,norm_topk_prob=0,scoring_func=sigmoid",
    "scaled_twice": f"T=5,{SIZES},k=3",
    "unscaled_when_parallel": f"T=5,{SIZES},k=3,rsf=2.5",
    "scaled_if_normalised": f"T=5,{SIZES},k=3,rsf=2.5",
    "shared_scaled_down": f"T=5,{SIZES},k=3,shared=24",
}


@pytest.mark.parametrize("name", CASES)
def test_the_stage_is_named_where_the_fault_reaches(name):
    """Each fault of weights is seen at its stage, and nothing is without it."""
    assert_names_its_stage(name, CASES[name])


@pytest.mark.parametrize("name", OUT_OF_REACH)
def test_nothing_is_seen_where_the_fault_cannot_matter(name):
    """A case out of a fault's reach passes with the fault planted."""
    assert_does_not_reach(name, OUT_OF_REACH[name])


def test_the_scaling_factor_is_lost_on_several_ranks():
    """With more than one rank the weights lack the factor of 2.5, with one they have it."""
    case = Case.parse(f"T=3/3,{SIZES},k=3,rsf=2.5,fault=unscaled_when_parallel")
    assert FAULTS[case.fault].reaches(case)
    sums = []
    for ranks in (1, 2):
        with planted(case, RankContext(0, ranks, None, CPU)):
            router = InferenceTopKRouter(case.config, weights_for(case))
            sums.append(router(hidden_for(case, 0)).weights_TK.sum(dim=1))
    assert torch.allclose(sums[0], torch.tensor(2.5))
    assert torch.allclose(sums[1], torch.tensor(1.0))
