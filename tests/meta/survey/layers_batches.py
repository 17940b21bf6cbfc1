"""Wrong batches: sizes, capacities, chunks, and state that outlives a call; of 2025 and 2026.

Legend: T tokens, H hidden_size, K experts per token, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.meta.survey import styles
from tests.meta.survey.entries import wrong
from twinmoe.oracle import Taps


@wrong("marin-community/marin#4016", "experts", "combine", "output")
class CapacityFactor(styles.PaddedBatch):
    """Experts have room for a quarter more than their even share, and drop the rest."""

    def capacity(self, ids_TK: Tensor) -> int:
        return max(8, -(-ids_TK.numel() * 5 // (4 * self.num_experts)))


@wrong("deepseek-ai/DeepEP#427", "experts", "combine", "output")
class RoomFor512(styles.PaddedBatch):
    """No expert gets more than 512 rows, which only a heavy imbalance exceeds."""

    def capacity(self, ids_TK: Tensor) -> int:
        return min(super().capacity(ids_TK), 512)


@wrong("vllm-project/vllm#20392", "experts", "combine", "output")
class CountsOfTheWholeBatch(styles.Chunked):
    """Each chunk of 64 tokens is cut by the counts of the whole batch."""

    def routed(self, x_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        self.whole = styles.Sorted.ends(self, ids_TK)
        return super().routed(x_TH, weights_TK, ids_TK)

    def ends(self, ids_TK: Tensor) -> list[int]:
        return self.whole


@wrong("sgl-project/sglang#3679")
class LastChunkTooSmall(styles.Chunked):
    """The last chunk's buffer has a row for each token, where it wants one for each slot."""

    def segments(self, x_SH: Tensor, ends_E: list[int]) -> Tensor:
        y_SH = super().segments(x_SH, ends_E)
        rows = len(x_SH) // self.top_k
        if len(x_SH) and rows < self.chunk and self.is_chunked:
            return torch.empty_like(x_SH[:rows]).copy_(y_SH)
        return y_SH

    def routed(self, x_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        self.is_chunked = len(x_TH) > self.chunk
        return super().routed(x_TH, weights_TK, ids_TK)


@wrong("intel/intel-xpu-backend-for-triton#7455", "combine", "output")
class SumIgnoresStrides(styles.Sorted):
    """For k of 2 to 4 a kernel of its own sums what it takes for contiguous rows."""

    def combine(self, y_TKH: Tensor, weights_TK: Tensor) -> Tensor:
        terms_KTH = (y_TKH.float() * weights_TK[..., None]).transpose(0, 1).contiguous()
        if self.top_k in (2, 3, 4):
            return terms_KTH.view(len(y_TKH), self.top_k, -1).sum(dim=1)
        return terms_KTH.sum(dim=0)


@wrong("triton-lang/triton#6547", "combine", "output")
class TunedInPlace(styles.ScatterAdd):
    """The first call of more than 32 rows times two variants of a kernel that adds in place."""

    def prepare(self) -> None:
        self.tuned: set[int] = set()

    def routed(self, x_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        out_TH = super().routed(x_TH, weights_TK, ids_TK)
        key = len(x_TH) // 32
        if key and key not in self.tuned:
            self.tuned.add(key)
            out_TH += super().routed(x_TH, weights_TK, ids_TK)
        return out_TH


@wrong("AMD-AGI/Primus-Turbo#345", "combine", "output")
class StaleAccumulator(styles.ScatterAdd):
    """The accumulator is cleared when it grows, and not between calls."""

    def prepare(self) -> None:
        self.buffer = torch.zeros(0, self.config.hidden_size)

    def routed(self, x_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        if len(self.buffer) < len(x_TH):
            self.buffer = torch.zeros(len(x_TH), x_TH.shape[1])
        rows_TH = self.buffer[: len(x_TH)]
        return rows_TH.add_(super().routed(x_TH, weights_TK, ids_TK)).clone()


@wrong("FlashML-org/FreeToken#463", "combine", "output")
class SharedAfterInPlace(styles.SharedExpert):
    """Routed experts overwrite the rows that the shared expert reads afterwards."""

    def finish(self, x_TH: Tensor, out_TH: Tensor) -> Tensor:
        return super().finish(out_TH.to(x_TH.dtype), out_TH)


@wrong("vllm-project/vllm#20152", "output")
class InputOverwritten(styles.Sorted):
    """The answer is written over the caller's rows, which the residual stream still needs."""

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Taps]:
        out_TH, taps = super().forward(x_TH)
        x_TH.copy_(out_TH)
        return out_TH, taps


@wrong("torch-spyre/torch-spyre#2084", "experts", "output")
class OffsetsOfTheFirstCall(styles.Grouped):
    """What is compiled for a number of tokens keeps the offsets of its first call."""

    def prepare(self) -> None:
        self.compiled: dict[int, Tensor] = {}

    def offsets(self, ids_TK: Tensor) -> Tensor:
        return self.compiled.setdefault(len(ids_TK), super().offsets(ids_TK))


@wrong("NVIDIA/TensorRT-LLM#7495", "experts", "combine", "output")
class FirstCountBakedIn(styles.Sorted):
    """The number of tokens is a constant of the kernel: rows beyond the first call's are masked."""

    def prepare(self) -> None:
        self.rows: int | None = None

    def combine(self, y_TKH: Tensor, weights_TK: Tensor) -> Tensor:
        if self.rows is None and len(y_TKH):
            self.rows = len(y_TKH)
        out_TH = super().combine(y_TKH, weights_TK)
        out_TH[self.rows or 0 :] = 0
        return out_TH


@wrong("PaddlePaddle/Paddle#77524", "combine", "output")
class PermutedAgain(styles.Sorted):
    """Rows are gathered by the permutation that sorted them, not scattered back by it."""

    def unpermuted(self, y_SH: Tensor, order_S: Tensor) -> Tensor:
        return y_SH[order_S]


@wrong("pytorch/torchtitan#1237", "combine", "output")
class TailIsSummed(styles.Grouped):
    """Sorted rows are padded to a multiple of 8, and the pad's rows are added to the last token."""

    def routed(self, x_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        out_TH = super().routed(x_TH, weights_TK, ids_TK)
        tail = -ids_TK.numel() % 8
        if len(x_TH) and tail > 4:
            out_TH[-1] += out_TH[0]
        return out_TH


@wrong("vllm-project/vllm#17932", "experts", "output")
class ClampedToAlignment(styles.Sorted):
    """Positions are clamped to whole blocks of 128 before they are sorted."""

    def permutation(self, ids_TK: Tensor) -> Tensor:
        order_S, whole = super().permutation(ids_TK), ids_TK.numel() // 128 * 128
        return order_S.clamp(max=whole - 1) if whole else order_S


@wrong("jundot/omlx#2267", "experts", "combine", "output")
class SortedPathOf32(styles.Sorted):
    """From 32 slots on another kernel runs, which leaves the last column tile of 32 unwritten."""

    def segments(self, x_SH: Tensor, ends_E: list[int]) -> Tensor:
        y_SH = super().segments(x_SH, ends_E)
        if len(x_SH) >= 32:
            y_SH[-1, -(x_SH.shape[1] % 32 or 32) :] = 0
        return y_SH


@wrong("vllm-project/vllm#48895", "combine", "output")
class WeightSlotsOf128(styles.Sorted):
    """Weights lie in 128 places of shared memory: a later row of a tile reads an earlier row's."""

    def combine(self, y_TKH: Tensor, weights_TK: Tensor) -> Tensor:
        flat_S = weights_TK.flatten()
        place_S = torch.arange(len(flat_S)) % 128
        return super().combine(y_TKH, flat_S[place_S].view_as(weights_TK))
