"""A plain layer on torch.nn.functional.grouped_mm: sort slots by expert, two grouped GEMMs.

    twinmoe check --subject examples/grouped_mm_layer.py:GroupedLayer

Legend: T tokens, H hidden_size, K experts per token, S slots (T * K, sorted by expert),
F rows of w13 (gate, then up), E experts.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, silu

from twinmoe.oracle import Taps, storage_contract
from twinmoe.oracle.contract import Ties
from twinmoe.oracle.testing import neutral, runs
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights


def aligned(config: MoEConfig) -> MoEConfig:
    """grouped_mm wants strides of 16 bytes: widths in multiples of eight 16-bit numbers."""
    return replace(
        neutral(config, reads=("norm_topk_prob", "routed_scaling_factor")),
        hidden_size=-(-config.hidden_size // 8) * 8,
        moe_intermediate_size=-(-config.moe_intermediate_size // 8) * 8,
    )


@runs(aligned)
class GroupedLayer(nn.Module):
    """Softmax routing and SwiGLU experts on one rank."""

    def __init__(self, config: MoEConfig, weights: MoEWeights, place: RankContext) -> None:
        super().__init__()
        self.config, self.weights = config, weights
        #: Every GEMM's result is stored in the model's dtype; the weighted sum is fp32.
        self.contract = replace(storage_contract("grouped_mm", config.dtype), ties=Ties.ANY)

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Taps]:
        """[T, H] to [T, H], and the experts that were taken."""
        weights_TK, ids_TK = self.route(hidden_TH)
        slots_S = ids_TK.flatten().argsort(stable=True)
        counts_E = ids_TK.flatten().bincount(minlength=self.config.num_experts)
        ends_E = counts_E.cumsum(0).int()
        x_SH = hidden_TH[slots_S // ids_TK.shape[1]]
        gate_up_SF = grouped_mm(x_SH, self.weights.w13_LFH.transpose(1, 2), offs=ends_E)
        gate_SI, up_SI = gate_up_SF.float().chunk(2, dim=1)
        h_SI = (silu(gate_SI) * up_SI).to(hidden_TH.dtype)
        y_SH = grouped_mm(h_SI, self.weights.w2_LHI.transpose(1, 2), offs=ends_E)
        y_TKH = torch.empty_like(y_SH).index_copy_(0, slots_S, y_SH).unflatten(0, ids_TK.shape)
        out_TH = (weights_TK[..., None] * y_TKH.float()).sum(dim=1)
        return out_TH.to(hidden_TH.dtype), Taps(ids_TK=ids_TK, weights_TK=weights_TK)

    def route(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Router weights [T, K] in fp32 and expert ids [T, K]."""
        scores_TE = (hidden_TH.float() @ self.weights.router_EH.float().T).softmax(dim=-1)
        weights_TK, ids_TK = scores_TE.topk(self.config.num_experts_per_tok, dim=-1)
        if self.config.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return weights_TK * self.config.routed_scaling_factor, ids_TK
