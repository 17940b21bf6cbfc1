"""The layer against the dense formulation, which shares no code with it, in fp64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.reference.inputs import (
    EVERYTHING,
    PLAIN,
    assert_close_per_token,
    at_least,
    fp64_config,
    fp64_configs,
    tokens,
)
from twinmoe.reference.config import ConfigError
from twinmoe.reference.dense import dense_moe, dense_routing
from twinmoe.reference.layer import MoELayer
from twinmoe.reference.router import TopKRouter
from twinmoe.reference.weights import MoEWeights


@given(fp64_configs(), st.integers(0, 9), st.integers(0, 2**32))
@at_least(150)
def test_layer_and_dense_agree_over_the_whole_config_space(config, count, seed):
    """Two independent formulations differ by summation order alone: 1e-12, relative."""
    weights = MoEWeights.random(config, seed)
    x_TH = tokens(config, count, seed)
    assert_close_per_token(
        MoELayer(config, weights)(x_TH), dense_moe(config, weights, x_TH), relative=1e-12
    )


@given(fp64_configs(), st.integers(0, 2**32), st.sampled_from([None, torch.nan, -torch.inf]))
@at_least(80)
def test_exact_ties_nan_and_groups_are_decided_alike(config, seed, poison):
    """On few-valued logits, full of exact ties, both choose the same experts for every token."""
    config = replace(config, hidden_size=config.num_experts, routed_scaling_factor=1.0)
    weights = MoEWeights.random(config, seed)
    # The identity makes logits of features: exactly representable, and exactly equal on a tie.
    weights.router_EH.copy_(torch.eye(config.num_experts, dtype=torch.float64))
    generator = torch.Generator().manual_seed(seed)
    if weights.correction_bias_E is not None:
        values = torch.randint(-3, 2, (config.num_experts,), generator=generator)
        weights.correction_bias_E.copy_(values)
        if poison is not None:
            weights.correction_bias_E[::3] = poison
    x_TH = torch.randint(0, 3, (8, config.num_experts), generator=generator).double()
    ids_TK = TopKRouter(config, weights)(x_TH).ids_TK
    chosen_TE = torch.zeros(8, config.num_experts, dtype=torch.bool).scatter(1, ids_TK, True)
    assert torch.equal(chosen_TE, dense_routing(config, weights, x_TH)[1])
    assert (chosen_TE.sum(dim=1) == config.num_experts_per_tok).all()


@pytest.mark.parametrize("settings", [EVERYTHING, PLAIN], ids=["everything", "plain"])
def test_gradients_agree(settings):
    """Gradients of tokens and of every weight equal the dense formulation's."""
    config = fp64_config(**settings)
    x_TH = tokens(config, 11, seed=5)
    cotangent_TH = tokens(config, 11, seed=6)

    def gradients(forward):
        weights = MoEWeights.random(config, 2)
        learned = [t for name, t in weights.tensors().items() if name != "correction_bias_E"]
        leaves = [x_TH.clone(), *learned]
        for leaf in leaves:
            leaf.requires_grad_()
        return torch.autograd.grad(forward(weights, leaves[0]), leaves, cotangent_TH)

    ours = gradients(lambda weights, x: MoELayer(config, weights)(x))
    theirs = gradients(lambda weights, x: dense_moe(config, weights, x))
    for mine, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 0
        assert (mine - other).abs().max() <= 1e-12 * other.abs().max()


def test_numerical_gradients_agree():
    """Autograd's answer is the derivative: finite differences give the same."""
    config = fp64_config(
        hidden_size=4,
        moe_intermediate_size=3,
        num_experts=4,
        num_experts_per_tok=2,
        shared_expert_intermediate_size=2,
        shared_expert_gate=True,
    )
    weights = MoEWeights.random(config, 0)

    def forward(x_TH, router_EH, w13_LFH, w2_LHI):
        changed = replace(weights, router_EH=router_EH, w13_LFH=w13_LFH, w2_LHI=w2_LHI)
        return MoELayer(config, changed)(x_TH)

    leaves = (tokens(config, 3, seed=1), weights.router_EH, weights.w13_LFH, weights.w2_LHI)
    assert torch.autograd.gradcheck(forward, [leaf.requires_grad_() for leaf in leaves])


def test_a_poisoned_token_stays_alone():
    """A NaN token makes its own row NaN and leaks into no other row."""
    config = fp64_config(**EVERYTHING)
    layer = MoELayer(config, MoEWeights.random(config, 0))
    x_TH = tokens(config, 6, seed=0)
    clean_TH = layer(x_TH)
    x_TH[2] = torch.nan
    poisoned_TH = layer(x_TH)
    others = [0, 1, 3, 4, 5]
    assert poisoned_TH[2].isnan().all()
    # Not bitwise: experts see other numbers of rows, for which a BLAS may sum in another order.
    assert_close_per_token(poisoned_TH[others], clean_TH[others], relative=1e-12)


def test_an_expert_that_nobody_chose_may_hold_anything():
    """NaN weights of an unused expert reach no output."""
    config = fp64_config(
        hidden_size=8, moe_intermediate_size=8, num_experts=8, num_experts_per_tok=2
    )
    weights = MoEWeights.random(config, 0)
    x_TH = tokens(config, 2, seed=0)
    unused = set(range(8)) - set(TopKRouter(config, weights)(x_TH).ids_TK.flatten().tolist())
    for expert in unused:
        weights.w2_LHI[expert] = torch.nan
    assert unused
    assert MoELayer(config, weights)(x_TH).isfinite().all()
    assert dense_moe(config, weights, x_TH).isfinite().all()


def test_tokens_of_another_shape_or_dtype_are_refused():
    """The message quotes what came and what is taken."""
    config = fp64_config(**PLAIN)
    layer = MoELayer(config, MoEWeights.random(config, 0))
    with pytest.raises(ConfigError, match=r"\[3, 16\] torch.float64.*\[tokens, 17\]"):
        layer(torch.zeros(3, 16, dtype=torch.float64))
    with pytest.raises(ConfigError, match=r"torch.float32.*torch.float64"):
        layer(torch.zeros(3, 17))
