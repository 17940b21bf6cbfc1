"""The experts of one rank, one after another.

Legend: H hidden_size, I moe_intermediate_size, F rows of w13 (2I gated, [gate | up]; I plain),
L local experts, S slots, N rows of one expert.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda gate: F.gelu(gate, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda gate: F.relu(gate).square(),
}


class SequentialMLP(nn.Module):
    """Applies each local expert to its own rows."""

    def __init__(self, config: MoEConfig, weights: MoEWeights) -> None:
        super().__init__()
        self.config = config
        self.weights = weights

    def forward(self, x_SH: torch.Tensor, local_expert_S: torch.Tensor) -> torch.Tensor:
        """Return one row of the config's dtype per slot: its expert's output for its token."""
        y_SH = torch.zeros_like(x_SH)
        for expert, (w13_FH, w2_HI) in enumerate(
            zip(self.weights.w13_LFH, self.weights.w2_LHI, strict=True)
        ):
            rows = torch.where(local_expert_S == expert)
            y_SH[rows] = mlp(self.config, x_SH[rows], w13_FH, w2_HI)
        return y_SH


def mlp(
    config: MoEConfig, x_NH: torch.Tensor, w13_FH: torch.Tensor, w2_HI: torch.Tensor
) -> torch.Tensor:
    """Return act(x @ gate^T) * (x @ up^T) @ w2^T, rounded to the config's dtype after each step."""
    wide = config.accumulate_dtype
    gate_up_NF = (x_NH.to(wide) @ w13_FH.to(wide).T).to(config.dtype)
    h_NI = activate(config, gate_up_NF)
    return (h_NI.to(wide) @ w2_HI.to(wide).T).to(config.dtype)


def activate(config: MoEConfig, gate_up: torch.Tensor) -> torch.Tensor:
    """Return act(gate) * up, or act(up) of a plain expert, computed wide and rounded once.

    ``gate_up`` is [..., F] in any dtype: the limit is applied to it after widening.
    """
    act = ACTIVATIONS[config.hidden_act]
    wide = gate_up.to(config.accumulate_dtype)
    if not config.gated:
        return act(wide).to(config.dtype)
    gate, up = wide.chunk(2, dim=-1)
    if config.swiglu_limit is not None:
        gate = gate.clamp(max=config.swiglu_limit)
        up = up.clamp(-config.swiglu_limit, config.swiglu_limit)
    return (act(gate) * up).to(config.dtype)
