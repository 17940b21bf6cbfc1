"""Wrong expert parallelism on two ranks, from public reports of 2025 and 2026.

Legend: T tokens of this rank, N rows of all ranks, R ranks, L local experts, K experts per token.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from tests.meta.survey import ranks
from tests.meta.survey.entries import wrong


@wrong("NVIDIA/TransformerEngine#2907", "experts", "combine", "output", ep_size=2)
class SentinelsFirst(ranks.AllReduce):
    """Slots of other ranks sort to the head, where the first expert's segment is read."""

    def share(self, x_NH: Tensor, weights_NK: Tensor, ids_NK: Tensor) -> Tensor:
        out_NH = x_NH.new_zeros(x_NH.shape, dtype=torch.float32)
        order_S, start = ids_NK.flatten().argsort(stable=True), 0
        for expert in range(len(self.weights.experts)):
            end = start + int((ids_NK == expert).sum())
            slot, start = order_S[start:end], end
            y = self.expert(x_NH[slot // self.top_k], expert).float()
            out_NH.index_add_(0, slot // self.top_k, weights_NK.flatten()[slot, None] * y)
        return out_NH


@wrong("ROCm/ATOM#887", "experts", "combine", "output", ep_size=2)
class MaskEqualsOne(ranks.AllReduce):
    """A map of local ids is passed for a mask, and only where it is 1 does an expert run."""

    def local(self, ids_NK: Tensor) -> Tensor:
        local_NK = super().local(ids_NK)
        return local_NK.where(local_NK == 1, -1)


@wrong("huggingface/transformers#48653", ep_size=2)
class OneHotOfNobody(ranks.AllReduce):
    """Slots of other ranks get an id that the one-hot encoding has no class for."""

    def share(self, x_NH: Tensor, weights_NK: Tensor, ids_NK: Tensor) -> Tensor:
        local = len(self.weights.experts)
        F.one_hot(ids_NK.where(ids_NK >= 0, local), num_classes=local)
        return super().share(x_NH, weights_NK, ids_NK)


@wrong("vllm-project/vllm#23745", "experts", "combine", "output", ep_size=2)
class DealtInTurn(ranks.AllReduce):
    """The map deals experts to ranks in turn, while weights are loaded in blocks."""

    def local(self, ids_NK: Tensor) -> Tensor:
        ranks_, rank = self.place.world_size, self.place.rank
        return (ids_NK // ranks_).where(ids_NK % ranks_ == rank, -1)


@wrong("sgl-project/sglang#28216", "dispatch", "experts", "combine", "output", ep_size=2)
class FirstOfTheGathered(ranks.AllReduce):
    """Of the gathered list only the first rank's rows are taken, and stand for all ranks'."""

    def gathered(self, mine: Tensor, counts: list[int]) -> Tensor:
        rows = super().gathered(mine, counts)
        first = rows[: counts[0]]
        return torch.cat([first, rows[counts[0] :] * 0]) if rows.is_floating_point() else rows


@wrong("ByteDance-Seed/VeOmni#896", ep_size=2)
class CountsOfTheFirstCall(ranks.AllReduce):
    """How many tokens each rank has is exchanged once, and kept."""

    def counts(self, x_TH: Tensor) -> list[int]:
        if not hasattr(self, "kept"):
            self.kept = super().counts(x_TH)
        return self.kept


@wrong("deepseek-ai/DeepEP#58", "experts", "combine", "output", ep_size=2)
class UnsortedChunks(ranks.AllToAll):
    """Received rows are taken for sorted by expert, where they come rank after rank."""

    def computed(self, x_SH: Tensor, local_S: Tensor, receive_R: list[int]) -> Tensor:
        return super().computed(x_SH, local_S.sort().values, receive_R)


@wrong("NVIDIA/Megatron-LM#5231", "experts", "combine", "output", ep_size=2)
class CountOfTheFirstToken(ranks.AllReduce):
    """Every token is believed to have as many experts on this rank as the first one."""

    def share(self, x_NH: Tensor, weights_NK: Tensor, ids_NK: Tensor) -> Tensor:
        if len(ids_NK):
            is_own = ids_NK >= 0
            nth_NK = is_own.int().cumsum(dim=1)
            ids_NK = ids_NK.where(nth_NK <= is_own[0].sum(), -1)
        return super().share(x_NH, weights_NK, ids_NK)


@wrong("NVIDIA/Megatron-LM#6458", "combine", "output", ep_size=2)
class NarrowShares(ranks.AllReduce):
    """Shares of a sum that is said to travel in fp32 are rounded to the model's dtype."""

    def reduced(self, share_NH: Tensor, counts: list[int]) -> Tensor:
        return super().reduced(share_NH.to(self.config.dtype).float(), counts)


@wrong("sgl-project/sglang#38160", "experts", "combine", "output", ep_size=2)
class RebasedTwice(ranks.AllToAll):
    """Ids that already count from this rank's first expert are rebased once more."""

    def own_ids(self, ids_S: Tensor) -> Tensor:
        return super().own_ids(ids_S) - self.weights.experts.start


@wrong("vllm-project/vllm-ascend#16477", "combine", "output", ep_size=2)
class OwnRowsByEvenCounts(ranks.AllReduce):
    """A rank finds its rows at its number times its own count, as if all counts were equal."""

    def mine(self, rows_NH: Tensor, counts: list[int]) -> Tensor:
        own = counts[self.place.rank]
        start = min(self.place.rank * own, max(0, len(rows_NH) - own))
        return rows_NH[start : start + own]


@wrong("NVIDIA-NeMo/Automodel#3641", ep_size=2)
class EqualCountsOnly(ranks.AllReduce):
    """The buffers of the exchange have one size for all ranks, which nobody sees to."""

    def gathered(self, mine: Tensor, counts: list[int]) -> Tensor:
        own = mine.contiguous()
        whole = own.new_empty(len(own) * len(counts), *own.shape[1:])
        dist.all_gather_into_tensor(whole, own, group=self.place.group)
        return whole


@wrong("flashinfer-ai/flashinfer#4531", ep_size=2)
class WaitsForNoRows(ranks.AllToAll):
    """A rank that has received no rows waits for tiles that nobody will finish."""

    def computed(self, x_SH: Tensor, local_S: Tensor, receive_R: list[int]) -> Tensor:
        while not len(x_SH):
            time.sleep(0.1)
        return super().computed(x_SH, local_S, receive_R)


@wrong("NVIDIA/Megatron-LM#4576", ep_size=2)
class DefaultBuffer(ranks.AllReduce):
    """The buffer has a default size, whatever the layer asks for."""

    def gathered(self, mine: Tensor, counts: list[int]) -> Tensor:
        buffer = mine.new_empty(2048)
        rows = super().gathered(mine, counts)
        buffer[: rows.numel()].view_as(rows).copy_(rows)
        return rows


@wrong("deepseek-ai/DeepEP#625", "dispatch", "experts", "combine", "output", ep_size=2)
class RowsBeyondCapacity(ranks.AllToAll):
    """Slots beyond the number that a rank said it would take are marked as not sent."""

    def computed(self, x_SH: Tensor, local_S: Tensor, receive_R: list[int]) -> Tensor:
        y_SH = super().computed(x_SH, local_S, receive_R)
        y_SH[48:] = 0
        return y_SH
