"""Weights made late are the weights of record."""

import pytest
import torch

from twinmoe.oracle.seeded import SeededWeights
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_each_expert_is_that_of_the_whole_layer(scoring: str) -> None:
    """In any order and again, with everything that all experts share."""
    config = MoEConfig(
        hidden_size=16,
        moe_intermediate_size=8,
        num_experts=5,
        num_experts_per_tok=2,
        scoring_func=scoring,
        use_correction_bias=True,
        shared_expert_intermediate_size=8,
        shared_expert_gate=True,
    )
    whole, late = MoEWeights.random(config, 3), SeededWeights(config, 3)
    for expert in (0, 3, 3, 1, 4, 0):
        for made, expected in zip(late.expert(expert), whole.expert(expert), strict=True):
            assert torch.equal(made, expected)
    for name in ("router_EH", "correction_bias_E", "shared_w13_FH", "shared_w2_HI"):
        assert torch.equal(getattr(late, name), getattr(whole, name))
    assert torch.equal(late.shared_gate_1H, whole.shared_gate_1H)
