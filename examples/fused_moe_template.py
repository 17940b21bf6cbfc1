"""A template for an engine's fused MoE call: fill in ``fused_moe``, keep the rest.

    twinmoe check --subject examples/fused_moe_template.py:FusedLayer --ep 1,2,4

Calls of this style, as in vLLM and Megatron, differ in what a stranger gets wrong:

* **gate-up order**: rows of w13 are [gate | up] here.  Kernels that want [up | gate] need a
  copy, made again whenever the weights are loaded again (``engine_layout``).
* **-1 sentinel**: padding rows, and slots of other ranks' experts, carry expert id -1.  They
  must be skipped, not multiplied by 0: what lies in them may be NaN.
* **EP offset**: a rank's experts have local ids 0 .. L-1, tokens have global ids.

Legend: T tokens of this rank, N rows of one rank padded to the longest, M rows of all ranks,
H hidden_size, K experts per token, L local experts, F rows of w13.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from twinmoe.oracle import Taps, Wire, storage_contract
from twinmoe.oracle.rounding import FP32
from twinmoe.oracle.testing import neutral, runs
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.router import TopKRouter
from twinmoe.reference.weights import MoEWeights


def fused_moe(
    hidden_MH: Tensor, w13_LFH: Tensor, w2_LHI: Tensor, weights_MK: Tensor, ids_MK: Tensor
) -> Tensor:
    """Stand in for the engine's kernel; replace the body by its call.

    ``ids_MK`` are local expert ids, -1 where nothing is to be done.  Returns this rank's
    share of every row in fp32.
    """
    out_MH = hidden_MH.new_zeros(hidden_MH.shape, dtype=torch.float32)
    for expert in range(len(w13_LFH)):
        row, slot = (ids_MK == expert).nonzero(as_tuple=True)
        gate, up = (hidden_MH[row] @ w13_LFH[expert].T).float().chunk(2, dim=-1)
        y = (silu(gate) * up).to(hidden_MH.dtype) @ w2_LHI[expert].T
        out_MH.index_add_(0, row, weights_MK[row, slot, None] * y.float())
    return out_MH


def engine_layout(w13_LFH: Tensor) -> Tensor:
    """Rows as the kernel wants them; for [up | gate]: ``torch.cat(w13.chunk(2, 1)[::-1], 1)``."""
    return w13_LFH


ROUTER_SETTINGS = (
    *("scoring_func", "norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group"),
    *("group_score", "use_correction_bias"),
)


@runs(lambda config: neutral(config, reads=ROUTER_SETTINGS))
class FusedLayer(nn.Module):
    """All-gather, the fused call on this rank's experts, all-reduce."""

    def __init__(self, config: MoEConfig, weights: MoEWeights, place: RankContext) -> None:
        super().__init__()
        self.place, self.weights = place, weights
        self.router = TopKRouter(config, weights)  # or the engine's own
        self.w13_LFH, self.w2_LHI = engine_layout(weights.w13_LFH), weights.w2_LHI
        self.first_expert = weights.experts.start
        stored = storage_contract("fused", config.dtype)
        # each rank's share travels in fp32, and the all-reduce adds in an order of its own
        self.contract = replace(stored, partial=FP32, wire=Wire.PER_HOP, reduced=FP32)

    def reload(self, weights: MoEWeights) -> None:
        """Overwrite the weights in place, and make again what derives from them; optional."""
        self.weights.copy_(weights)
        self.w13_LFH.copy_(engine_layout(weights.w13_LFH))

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Taps]:
        """[T, H] to [T, H], and the router's answer."""
        routing = self.router(hidden_TH)
        rows = self.longest(len(hidden_TH))
        hidden_MH = self.gathered(hidden_TH, rows, filler=torch.nan)
        weights_MK = self.gathered(routing.weights_TK, rows, filler=0)
        ids_MK = self.gathered(routing.ids_TK, rows, filler=-1)
        local_MK = self.local_ids(ids_MK)
        out_MH = fused_moe(hidden_MH, self.w13_LFH, self.w2_LHI, weights_MK, local_MK)
        if self.place.group is not None:
            dist.all_reduce(out_MH, group=self.place.group)
        mine = slice(self.place.rank * rows, self.place.rank * rows + len(hidden_TH))
        return out_MH[mine].to(hidden_TH.dtype), Taps(routing.ids_TK, routing.weights_TK)

    def local_ids(self, ids_MK: Tensor) -> Tensor:
        """Global ids as this rank's own, -1 for those of other ranks."""
        local_MK = ids_MK - self.first_expert
        is_mine = (ids_MK >= 0) & (local_MK >= 0) & (local_MK < len(self.w2_LHI))
        return torch.where(is_mine, local_MK, -1)

    def longest(self, rows: int) -> int:
        """The largest number of rows of any rank."""
        if self.place.group is None:
            return rows
        count = torch.tensor([rows], device=self.place.device)
        dist.all_reduce(count, op=dist.ReduceOp.MAX, group=self.place.group)
        return int(count)

    def gathered(self, mine: Tensor, rows: int, filler: float) -> Tensor:
        """All ranks' rows in rank order, each rank's padded to ``rows``."""
        padded = pad(mine, (0, 0, 0, rows - len(mine)), value=filler).contiguous()
        if self.place.group is None:
            return padded
        parts = [torch.empty_like(padded) for _ in range(self.place.world_size)]
        dist.all_gather(parts, padded, group=self.place.group)
        return torch.cat(parts)
