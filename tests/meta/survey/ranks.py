"""Styles of expert parallelism, each right: all-reduce, reduce-scatter and all-to-all.

Legend: T tokens of this rank, N rows of all ranks, R ranks, H hidden_size, L local experts,
K experts per token, S slots received.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from tests.meta.survey.styles import Loop, Sorted
from twinmoe.oracle import RoundingContract
from twinmoe.oracle.contract import Wire
from twinmoe.oracle.rounding import FP32


class AllReduce(Loop):
    """Every rank gathers all rows, adds what its experts say to them, and the sums meet."""

    def declare(self, contract: RoundingContract) -> RoundingContract:
        if self.place.group is None:
            return contract
        return replace(contract, partial=FP32, wire=Wire.PER_HOP, reduced=FP32)

    def counts(self, x_TH: Tensor) -> list[int]:
        """Tokens of every rank."""
        own = torch.tensor([len(x_TH)])
        parts = [torch.zeros_like(own) for _ in range(self.place.world_size)]
        dist.all_gather(parts, own, group=self.place.group)
        return [int(part) for part in parts]

    def gathered(self, mine: Tensor, counts: list[int]) -> Tensor:
        """All ranks' rows, rank after rank."""
        own = pad(mine, (0, 0, 0, max(counts) - len(mine))).contiguous()
        parts = [torch.empty_like(own) for _ in counts]
        dist.all_gather(parts, own, group=self.place.group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def local(self, ids_NK: Tensor) -> Tensor:
        """Global ids as this rank's own, -1 for those of other ranks."""
        own_NK = ids_NK - self.weights.experts.start
        return own_NK.where((own_NK >= 0) & (own_NK < len(self.weights.experts)), -1)

    def share(self, x_NH: Tensor, weights_NK: Tensor, ids_NK: Tensor) -> Tensor:
        """What this rank's experts add to every row, in fp32."""
        out_NH = x_NH.new_zeros(x_NH.shape, dtype=torch.float32)
        for expert in range(len(self.weights.experts)):
            token, slot = (ids_NK == expert).nonzero(as_tuple=True)
            y = self.expert(x_NH[token], expert).float()
            out_NH.index_add_(0, token, weights_NK[token, slot, None] * y)
        return out_NH

    def reduced(self, share_NH: Tensor, counts: list[int]) -> Tensor:
        """This rank's rows of the sum over ranks."""
        dist.all_reduce(share_NH, group=self.place.group)
        return self.mine(share_NH, counts)

    def mine(self, rows_NH: Tensor, counts: list[int]) -> Tensor:
        """This rank's rows of all ranks'."""
        start = sum(counts[: self.place.rank])
        return rows_NH[start : start + counts[self.place.rank]]

    def routed(self, x_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        if self.place.group is None:
            return super().routed(x_TH, weights_TK, ids_TK)
        counts = self.counts(x_TH)
        x_NH, weights_NK, ids_NK = (self.gathered(t, counts) for t in (x_TH, weights_TK, ids_TK))
        return self.reduced(self.share(x_NH, weights_NK, self.local(ids_NK)), counts)


class ReduceScatter(AllReduce):
    """The sums meet in a reduce-scatter, over as many rows of every rank."""

    def reduced(self, share_NH: Tensor, counts: list[int]) -> Tensor:
        rows, ranks, hidden = max(counts), len(counts), share_NH.shape[1]
        padded = share_NH.new_zeros(ranks * rows, hidden)
        for rank, part in enumerate(share_NH.split(counts)):
            padded[rank * rows : rank * rows + len(part)] = part
        own = share_NH.new_empty(rows, hidden)
        dist.reduce_scatter_tensor(own, padded, group=self.place.group)
        return own[: counts[self.place.rank]]


class AllToAll(Sorted):
    """Slots travel to the ranks of their experts, and back; the owner of a token sums them."""

    def exchanged(self, rows: Tensor, send_R: list[int], receive_R: list[int]) -> Tensor:
        """``all_to_all_single`` with these splits."""
        received = rows.new_empty(sum(receive_R), *rows.shape[1:])
        dist.all_to_all_single(
            received, rows.contiguous(), receive_R, send_R, group=self.place.group
        )
        return received

    def splits(self, ids_S: Tensor) -> tuple[list[int], list[int]]:
        """Slots that this rank sends to each rank, and gets from each."""
        owner_S = ids_S // len(self.weights.experts)
        send_R = owner_S.bincount(minlength=self.place.world_size)
        receive_R = torch.empty_like(send_R)
        dist.all_to_all_single(receive_R, send_R, group=self.place.group)
        return send_R.tolist(), receive_R.tolist()

    def computed(self, x_SH: Tensor, local_S: Tensor, receive_R: list[int]) -> Tensor:
        """Expert outputs of received rows; ``local_S`` are this rank's own ids."""
        y_SH = torch.zeros_like(x_SH)
        for expert in range(len(self.weights.experts)):
            y_SH[local_S == expert] = self.expert(x_SH[local_S == expert], expert)
        return y_SH

    def own_ids(self, ids_S: Tensor) -> Tensor:
        """Global ids as this rank's own."""
        return ids_S - self.weights.experts.start

    def routed(self, x_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        if self.place.group is None:
            return super().routed(x_TH, weights_TK, ids_TK)
        order_S = self.permutation(ids_TK)
        ids_S = ids_TK.flatten()[order_S]
        send_R, receive_R = self.splits(ids_S)
        x_SH = self.exchanged(x_TH[order_S // self.top_k], send_R, receive_R)
        local_S = self.own_ids(self.exchanged(ids_S, send_R, receive_R))
        y_SH = self.exchanged(self.computed(x_SH, local_S, receive_R), receive_R, send_R)
        y_TKH = self.unpermuted(y_SH, order_S).unflatten(0, ids_TK.shape)
        return self.combine(y_TKH, weights_TK)
