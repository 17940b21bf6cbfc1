"""Ways to evaluate the expert's activation, in fp32 and rounded by the caller.

An Activate takes gate_up [..., F] as fp32 values and returns h [..., I] before it is
stored.

Legend: F rows of w13, I moe_intermediate_size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from twinmoe.oracle.emulation.casts import to_bf16
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.experts import ACTIVATIONS

Activate = Callable[[MoEConfig, Tensor], Tensor]


def direct(config: MoEConfig, gate_up: Tensor) -> Tensor:
    """PyTorch's activation, then one product."""
    gate, up = _halves(config, gate_up)
    return ACTIVATIONS[config.hidden_act](gate) * up


def by_exponential(config: MoEConfig, gate_up: Tensor) -> Tensor:
    """SiLU as g / (1 + exp(-g)), the way kernels spell it; others directly."""
    if config.hidden_act != "silu":
        return direct(config, gate_up)
    gate, up = _halves(config, gate_up)
    return gate / (1 + torch.exp(-gate)) * up


def gate_last(config: MoEConfig, gate_up: Tensor) -> Tensor:
    """SiLU as (g u) sigmoid(g): the same factors in another order; others directly.

    Published kernels multiply so (kernel-hyperdrive's SwiGLU, g u / (1 + exp(-g)) elsewhere), and
    no contract that keeps the activated gate in registers tells them not to.  g u may overflow.
    """
    if config.hidden_act != "silu":
        return direct(config, gate_up)
    gate, up = _halves(config, gate_up)
    return gate * up * torch.sigmoid(gate)


def silu_rounded_early(config: MoEConfig, gate_up: Tensor) -> Tensor:
    """WRONG: act(gate) is rounded to bf16 before it meets up, so h is rounded twice."""
    gate, up = _halves(config, gate_up)
    return to_bf16(ACTIVATIONS[config.hidden_act](gate)) * up


def gate_and_up_swapped(config: MoEConfig, gate_up: Tensor) -> Tensor:
    """WRONG: rows of w13 taken as [up | gate]."""
    gate, up = _halves(config, gate_up)
    return ACTIVATIONS[config.hidden_act](up) * gate


def _halves(config: MoEConfig, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up, limited; a plain expert has ones for up, which multiply exactly."""
    if not config.gated:
        return gate_up, torch.ones_like(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    if config.swiglu_limit is None:
        return gate, up
    limit = config.swiglu_limit
    return gate.clamp(max=limit), up.clamp(-limit, limit)
