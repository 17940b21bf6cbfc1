"""Storage dtypes: the layer stays within derived bounds of the dense formulation."""

from dataclasses import replace

import pytest
import torch

from tests.reference.bounds import difference_bound
from tests.reference.inputs import tokens
from twinmoe.reference.config import DTYPES, MoEConfig
from twinmoe.reference.dense import dense_moe
from twinmoe.reference.experts import activate
from twinmoe.reference.layer import MoELayer
from twinmoe.reference.weights import MoEWeights

#: Scored in fp64 so that both formulations choose the same experts.
CONFIG = MoEConfig(
    hidden_size=96,
    moe_intermediate_size=80,
    num_experts=8,
    num_experts_per_tok=3,
    scoring_func="sigmoid",
    routed_scaling_factor=2.5,
    use_correction_bias=True,
    shared_expert_intermediate_size=48,
    router_dtype=torch.float64,
)


@pytest.fixture(params=DTYPES.values(), ids=DTYPES)
def config(request):
    """Return CONFIG in each storage dtype."""
    return replace(CONFIG, dtype=request.param)


def test_layer_and_dense_round_alike(config):
    """In every dtype the two differ by no more than neighbouring roundings explain."""
    weights = MoEWeights.random(config, 0)
    x_TH = tokens(config, 64, seed=0)
    out_TH, dense_TH = MoELayer(config, weights)(x_TH), dense_moe(config, weights, x_TH)
    assert out_TH.dtype == config.dtype
    difference = (out_TH.double() - dense_TH.double()).abs()
    assert (difference <= difference_bound(config, weights, x_TH)).all()


def test_the_bound_sees_an_exchanged_gate_and_up(config):
    """The bound has power: a real fault overshoots it in most elements, in every dtype."""
    weights = MoEWeights.random(config, 0)
    exchanged = replace(weights, w13_LFH=weights.w13_LFH.roll(config.moe_intermediate_size, 1))
    x_TH = tokens(config, 64, seed=0)
    difference = (dense_moe(config, weights, x_TH) - dense_moe(config, exchanged, x_TH)).abs()
    outside = difference.double() > difference_bound(config, weights, x_TH)
    assert outside.double().mean() > 0.5


def _whole_numbers(weights: MoEWeights) -> MoEWeights:
    """Replace weights by small integers, times 2^-4 in w13, and let all experts weigh the same.

    Every sum is then exact in fp32, whatever its order, and fits fp16.
    """
    generator = torch.Generator().manual_seed(0)
    for name, tensor in weights.tensors().items():
        most = 7 if "w13" in name else 1
        values = torch.randint(-most, most + 1, tensor.shape, generator=generator)
        tensor.copy_(values * 2**-4 if "w13" in name else values)
    weights.router_EH.zero_()
    return weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_layer_and_dense_round_at_the_same_places(dtype):
    """Where every sum is exact only roundings are left, and the two agree bit for bit."""
    config = MoEConfig(
        hidden_size=64,
        moe_intermediate_size=4,
        num_experts=4,
        num_experts_per_tok=4,
        hidden_act="relu",
        shared_expert_intermediate_size=4,
        dtype=dtype,
    )
    weights = _whole_numbers(MoEWeights.random(config, 0))
    x_TH = torch.randint(-7, 8, (64, 64), generator=torch.Generator().manual_seed(1)).to(dtype)
    out_TH = MoELayer(config, weights)(x_TH)
    assert torch.equal(out_TH, dense_moe(config, weights, x_TH))

    unrounded = replace(config, dtype=torch.float32)
    wide = replace(weights, **{name: t.float() for name, t in weights.tensors().items()})
    exact_TH = MoELayer(unrounded, wide)(x_TH.float())
    assert (out_TH != exact_TH.to(dtype)).float().mean() > 0.1, "roundings inside have to show"


def test_activation_rounds_once_and_clamps_wide():
    """act(gate) * up is one rounding of the wide result, with a limit no bf16 number holds."""
    config = replace(CONFIG, swiglu_limit=0.3)
    gate_up = torch.randn(64, 160, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    gate, up = gate_up.float().chunk(2, dim=1)
    gate, up = gate.clamp(max=0.3), up.clamp(-0.3, 0.3)
    expected = (torch.nn.functional.silu(gate) * up).to(torch.bfloat16)
    assert torch.equal(activate(config, gate_up), expected)


def test_the_router_weight_may_enter_before_the_experts():
    """With the weight on the input, it passes through the nonlinearity, rounded to the dtype."""
    config = replace(
        CONFIG,
        router_weight_on_input=True,
        shared_expert_intermediate_size=0,
        num_experts_per_tok=1,
    )
    weights = MoEWeights.random(config, 0)
    layer = MoELayer(config, weights)
    x_TH = tokens(config, 5, seed=0)
    routing = layer.router(x_TH)
    rows_TH = (routing.weights_TK.float() * x_TH.float()).to(torch.bfloat16)
    expected_TH = layer.experts(rows_TH, routing.ids_TK[:, 0])
    assert torch.equal(layer(x_TH), expected_TH)
