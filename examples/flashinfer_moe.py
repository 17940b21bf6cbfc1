"""FlashInfer's cutlass_fused_moe alone, without an engine around it.  Needs CUDA, and FlashInfer.

    twinmoe check --device cuda --dtype bf16 --subject examples/flashinfer_moe.py:FlashInferLayer

Without FlashInfer the command ends with exit code 2 and says so.

Legend: T tokens, H hidden_size, K experts per token, E experts, F rows of w13.
"""

from dataclasses import replace

import torch
from flashinfer.fused_moe import cutlass_fused_moe
from torch import Tensor, nn

from twinmoe.oracle import Taps, storage_contract
from twinmoe.oracle.testing import neutral, runs
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.router import TopKRouter
from twinmoe.reference.weights import MoEWeights


def supported(config: MoEConfig) -> MoEConfig:
    """Rows of 16 bytes for its copy engine; the routing is computed before the call."""
    reads = ("scoring_func", "norm_topk_prob", "routed_scaling_factor", "use_correction_bias")
    return replace(
        neutral(config, reads=reads),
        hidden_size=-(-config.hidden_size // 64) * 64,
        moe_intermediate_size=-(-config.moe_intermediate_size // 64) * 64,
    )


@runs(supported)
class FlashInferLayer(nn.Module):
    """SwiGLU experts in one call; it wants rows of w13 as [up | gate]."""

    def __init__(self, config: MoEConfig, weights: MoEWeights, place: RankContext) -> None:
        super().__init__()
        self.router = TopKRouter(config, weights)
        gate, up = weights.w13_LFH.chunk(2, dim=1)
        self.up_gate_LFH = torch.cat([up, gate], dim=1).contiguous()
        self.w2_LHI = weights.w2_LHI
        #: gate and up, h, y and the weighted sum are stored in bf16, as measured on Hopper.
        self.contract = storage_contract("cutlass_fused_moe", config.dtype)

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Taps]:
        """[T, H] to [T, H], and the router's answer."""
        routing = self.router(hidden_TH)
        out_TH = torch.empty_like(hidden_TH)
        if len(hidden_TH):
            cutlass_fused_moe(
                hidden_TH.contiguous(),
                routing.ids_TK.int(),
                routing.weights_TK.float(),
                self.up_gate_LFH,
                self.w2_LHI,
                hidden_TH.dtype,
                quant_scales=[],
                output=out_TH,
            )
        return out_TH, Taps(routing.ids_TK, routing.weights_TK)
