"""Layers of small integers, whose every product and sum is exact in fp32.

Only the roundings that a backend declares are left, so its output is known bit for
bit; and ranks, experts, gate and up, rows and columns all differ.

Legend: M rows, K experts per row, H hidden_size, I moe_intermediate_size, F rows of w13,
L local experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twinmoe.reference.config import MoEConfig
from twinmoe.reference.experts import ACTIVATIONS
from twinmoe.reference.weights import MoEWeights

#: Which of the backends that run on a CPU rounds gate/up and the expert output to the model dtype.
ROUNDS_ALL = {"grouped_mm": True, "triton": False}


@dataclass(frozen=True)
class Call:
    """The arguments of one forward: x_MH, global ids_MK (-1 is padding), weights_MK."""

    x_MH: Tensor
    ids_MK: Tensor
    weights_MK: Tensor


def config_of(**settings: Any) -> MoEConfig:
    """Return a small layer that both backends can run."""
    defaults: dict[str, Any] = {
        "hidden_size": 24,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "hidden_act": "relu",
        "dtype": torch.bfloat16,
    }
    return MoEConfig(**(defaults | settings))


def integer_weights(config: MoEConfig, seed: int) -> MoEWeights:
    """Draw expert weights from {-1, 0, 1}."""
    generator = torch.Generator().manual_seed(seed)
    weights = MoEWeights.random(config, seed)
    for tensor in (weights.w13_LFH, weights.w2_LHI):
        tensor.copy_(torch.randint(-1, 2, tensor.shape, generator=generator))
    return weights


def integer_call(config: MoEConfig, num_rows: int, seed: int) -> Call:
    """Draw tokens from {-1, 0, 1}, distinct ids per row, and weights in (1/2, 1).

    The weights need nine bits, one more than bf16 has, so that rounding them shows.
    """
    generator = torch.Generator().manual_seed(seed)
    x_MH = torch.randint(-1, 2, (num_rows, config.hidden_size), generator=generator)
    order_ME = torch.rand(num_rows, config.num_experts, generator=generator).argsort(dim=1)
    ids_MK = order_ME[:, : config.num_experts_per_tok].to(torch.int32).contiguous()
    odd_MK = 2 * torch.randint(128, 256, ids_MK.shape, generator=generator) + 1
    return Call(x_MH.to(config.dtype), ids_MK, odd_MK / 512)


def poison_rows(call: Call, rows: list[int]) -> Call:
    """Turn ``rows`` into padding that would spoil whatever computes on it."""
    x_MH, ids_MK = call.x_MH.clone(), call.ids_MK.clone()
    weights_MK = call.weights_MK.clone()
    for row in rows:
        x_MH[row] = torch.nan if row % 2 else torch.inf
        ids_MK[row] = -1
        weights_MK[row] = 0.0
    return Call(x_MH, ids_MK, weights_MK)


def poisoned_output(num_rows: int, config: MoEConfig, dtype: torch.dtype) -> Tensor:
    """Return an output buffer full of NaN."""
    return torch.full((num_rows, config.hidden_size), torch.nan, dtype=dtype)


def expert_rows(
    config: MoEConfig, weights: MoEWeights, expert: int, x_NH: Tensor, *, rounds_all: bool
) -> Tensor:
    """Return the expert's output in fp64, rounded to the model dtype where declared."""

    def declared(values: Tensor) -> Tensor:
        return values.to(config.dtype).double() if rounds_all else values

    gate_up_NF = declared(x_NH.double() @ weights.w13_LFH[expert].double().T)
    act = ACTIVATIONS[config.hidden_act]
    if config.gated:
        gate_NI, up_NI = gate_up_NF.chunk(2, dim=1)
        if config.swiglu_limit is not None:
            gate_NI = gate_NI.clamp(max=config.swiglu_limit)
            up_NI = up_NI.clamp(-config.swiglu_limit, config.swiglu_limit)
        h_NI = act(gate_NI) * up_NI
    else:
        h_NI = act(gate_up_NF)
    return declared(h_NI.to(config.dtype).double() @ weights.w2_LHI[expert].double().T)


def weighted_sum(
    config: MoEConfig, weights: MoEWeights, call: Call, experts: range, *, rounds_all: bool
) -> Tensor:
    """Return the sum over ``experts`` of weight * output in fp64; ``weights`` hold all experts."""
    out_MH = torch.zeros(call.x_MH.shape, dtype=torch.float64)
    for row, ids_K in enumerate(call.ids_MK.tolist()):
        for k, expert in enumerate(ids_K):
            if expert not in experts:
                continue
            x_1H, weight = call.x_MH[row : row + 1], call.weights_MK[row, k].double()
            if config.router_weight_on_input:
                x_1H, weight = (x_1H.double() * weight).to(config.dtype), weight.new_ones(())
            y_1H = expert_rows(config, weights, expert, x_1H, rounds_all=rounds_all)
            out_MH[row] += weight * y_1H[0]
    return out_MH
