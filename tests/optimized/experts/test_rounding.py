"""Real-valued layers: every output inside the radius that its backend's roundings allow.

Legend: M rows, K experts per row, H hidden_size, I moe_intermediate_size, N rows of one
expert.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.optimized.experts.inputs import ROUNDS_ALL, Call, config_of, poisoned_output
from twinmoe.optimized.experts import InferenceGroupedMLP
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.config_checks import HIDDEN_ACTS
from twinmoe.reference.experts import ACTIVATIONS
from twinmoe.reference.placement import Placement
from twinmoe.reference.weights import MoEWeights

#: Half a unit in the last place, relative: round to nearest even.
HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
FP32 = 2.0**-24

#: Bounds of |act'|, except relu2 whose slope is 2|a|.
SLOPE = {"silu": 1.1, "gelu": 1.13, "gelu_pytorch_tanh": 1.13, "relu": 1.0}

#: Roundings inside one activation: exp or erf, its argument, products, a division.
ACTIVATION_ROUNDINGS = 10


@dataclass(frozen=True)
class Interval:
    """A value in fp64 and the radius of what rounding may have made of it."""

    value: Tensor
    radius: Tensor

    def rounded(self, half_ulp: float) -> "Interval":
        """Widen by one rounding of anything inside, subnormals of fp16 included."""
        return Interval(
            self.value, self.radius + half_ulp * (self.value.abs() + self.radius) + 2.0**-25
        )

    def times(self, matrix: Tensor) -> "Interval":
        """Multiply by an exact matrix, summing n terms in fp32 in any order (Higham's gamma)."""
        gamma = matrix.shape[1] * FP32 / (1 - matrix.shape[1] * FP32)
        mass = (self.value.abs() + self.radius) @ matrix.abs().T
        return Interval(self.value @ matrix.T, self.radius @ matrix.abs().T + gamma * mass)


def activated(config: MoEConfig, gate: Interval, up: Interval) -> Interval:
    """Carry act(gate) * up: first derivative, second-order rest, roundings in fp32."""
    act = ACTIVATIONS[config.hidden_act]
    if config.swiglu_limit is not None:
        limit = config.swiglu_limit
        gate = Interval(gate.value.clamp(max=limit), gate.radius)
        up = Interval(up.value.clamp(-limit, limit), up.radius)
    if config.hidden_act == "relu2":
        moved = 2 * gate.value.abs() * gate.radius + gate.radius**2
    else:
        moved = SLOPE[config.hidden_act] * gate.radius
    # 1 + erf cancels for negative gates: an error relative to the gate, not to the result.
    a = Interval(act(gate.value), moved + ACTIVATION_ROUNDINGS * FP32 * gate.value.abs())
    a = a.rounded(ACTIVATION_ROUNDINGS * FP32)
    if not config.gated:
        return a
    radius = a.radius * (up.value.abs() + up.radius) + a.value.abs() * up.radius
    return Interval(a.value * up.value, radius).rounded(FP32)


def expected(config: MoEConfig, weights: MoEWeights, call: Call, *, rounds_all: bool) -> Interval:
    """Carry a whole forward into fp32 output."""
    half_ulp = HALF_ULP[config.dtype]
    value = torch.zeros(call.x_MH.shape, dtype=torch.float64)
    radius, mass = torch.zeros_like(value), torch.zeros_like(value)
    for expert in range(config.num_experts):
        row, k = torch.where(call.ids_MK == expert)
        x_NH = call.x_MH[row].double()
        gate_up = Interval(x_NH, torch.zeros_like(x_NH)).times(weights.w13_LFH[expert].double())
        gate_up = gate_up.rounded(half_ulp if rounds_all else 0.0)
        half = config.moe_intermediate_size if config.gated else 0
        gate = Interval(*(t[:, : config.moe_intermediate_size] for t in vars(gate_up).values()))
        up = Interval(*(t[:, half:] for t in vars(gate_up).values()))
        y = activated(config, gate, up).rounded(half_ulp).times(weights.w2_LHI[expert].double())
        y = y.rounded(half_ulp if rounds_all else 0.0)
        weight_N1 = call.weights_MK[row, k].double()[:, None]
        value.index_add_(0, row, weight_N1 * y.value)
        radius.index_add_(0, row, weight_N1 * y.radius)
        mass.index_add_(0, row, weight_N1 * (y.value.abs() + y.radius))
    # K products and K - 1 additions in fp32.
    return Interval(value, radius + 2 * config.num_experts_per_tok * FP32 * mass)


@pytest.mark.parametrize("dtype", list(HALF_ULP), ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("act", HIDDEN_ACTS)
@pytest.mark.parametrize("backend", list(ROUNDS_ALL))
def test_output_lies_within_the_declared_roundings(backend, act, gated, dtype):
    """O(1) layers with a limit that clamps: no element leaves its interval; zeros would."""
    config = config_of(
        hidden_size=104,
        moe_intermediate_size=56,
        num_experts=4,
        hidden_act=act,
        gated=gated,
        swiglu_limit=1.25 if gated else None,
        dtype=dtype,
    )
    weights = MoEWeights.random(config, 1)
    generator = torch.Generator().manual_seed(2)
    ids_MK = torch.rand(12, 4, generator=generator).argsort(dim=1)[:, :2].int().contiguous()
    call = Call(
        torch.randn(12, 104, generator=generator).to(dtype),
        ids_MK,
        torch.rand(12, 2, generator=generator) + 0.1,
    )
    out_MH = poisoned_output(12, config, torch.float32)
    mlp = InferenceGroupedMLP(config, weights, Placement(4, 1), 0, backend)
    mlp(call.x_MH, call.ids_MK, call.weights_MK, out_MH)
    truth = expected(config, weights, call, rounds_all=ROUNDS_ALL[backend])
    assert ((out_MH.double() - truth.value).abs() <= truth.radius).all()
    assert (truth.radius < truth.value.abs()).double().mean() > 0.5
