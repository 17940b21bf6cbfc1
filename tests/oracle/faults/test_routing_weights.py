"""Planted faults of the router's weights, where a single case does not tell all of them."""

import torch

from tests.oracle.faults.planting import CPU
from twinmoe.optimized.router import InferenceTopKRouter
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults import FAULTS, planted
from twinmoe.oracle.inputs import hidden_for, weights_for
from twinmoe.oracle.worker import RankContext

SIZES = "H=64,I=16,E=6,dtype=bf16"


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
