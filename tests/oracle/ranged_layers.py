"""Layers of one rank that are right within fp16's range, and squeeze one stage through it.

Legend: T tokens, E experts, K experts per token, F rows of w13, H hidden_size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from twinmoe.oracle import storage_contract
from twinmoe.oracle.layer_space import neutral, runs
from twinmoe.oracle.plain_layer import LayerFactory, PlainLayer
from twinmoe.oracle.rounding import FP16
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights


def _squeezed(values: Tensor) -> Tensor:
    """The range of fp16, and the precision of what it is given."""
    size = values.abs()
    outside = (size > FP16.max_value) | (size < FP16.smallest_normal)
    return torch.where(outside, values.half().to(values.dtype), values)


def _kept_finite(values: Tensor) -> Tensor:
    largest = torch.finfo(values.dtype).max
    return values.clamp(-largest, largest)


def _without_nan(values: Tensor) -> Tensor:
    return values.masked_fill(values.isnan(), 0.0)


def _spoilt_at(where: str, spoil: object = _squeezed) -> LayerFactory:
    """A SwiGLU layer under softmax whose stage ``where`` is spoilt."""

    @runs(lambda config: neutral(config, reads=("routed_scaling_factor",)))
    def make(config: MoEConfig, weights: MoEWeights, _place: RankContext) -> PlainLayer:
        def at(stage: str, values: Tensor) -> Tensor:
            return spoil(values) if stage == where else values  # type: ignore[operator,no-any-return]

        def linear(x: Tensor, matrix: Tensor) -> Tensor:
            return (x.float() @ matrix.float().T).to(config.dtype)

        def forward(hidden_TH: Tensor) -> Tensor:
            x_TH = at("input", hidden_TH)
            logits_TE = at("logits", x_TH.float() @ weights.router_EH.float().T)
            top_TK, ids_TK = logits_TE.softmax(dim=1).topk(config.num_experts_per_tok)
            top_TK = top_TK / top_TK.sum(dim=1, keepdim=True) * config.routed_scaling_factor
            sum_TH = torch.zeros(x_TH.shape)
            for expert in range(config.num_experts):
                token, slot = (ids_TK == expert).nonzero(as_tuple=True)
                gate_up = at("gate and up", linear(x_TH[token], weights.w13_LFH[expert]))
                gate, up = gate_up.float().chunk(2, dim=1)
                h = at("activation", (F.silu(gate) * up).to(config.dtype))
                y = at("expert output", linear(h, weights.w2_LHI[expert]))
                sum_TH.index_add_(0, token, top_TK[token, slot, None] * y.float())
            return at("output", at("sum", sum_TH).to(config.dtype))

        return PlainLayer(forward, storage_contract("mine", config.dtype))

    return make


unspoilt = _spoilt_at("nowhere")
fp16_input = _spoilt_at("input")
fp16_logits = _spoilt_at("logits")
fp16_gate_and_up = _spoilt_at("gate and up")
fp16_activation = _spoilt_at("activation")
fp16_expert_output = _spoilt_at("expert output")
fp16_sum = _spoilt_at("sum")
saturating = _spoilt_at("output", _kept_finite)
nan_is_zero = _spoilt_at("output", _without_nan)
