"""Correct layers in all the styles: none of them may be called wrong."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.meta.survey import ranks, styles
from tests.meta.survey.entries import right
from twinmoe.oracle import RoundingContract
from twinmoe.oracle.rounding import FORMATS


@right()
class LoopOverExperts(styles.Loop):
    """A loop over experts with an fp32 accumulator."""


@right()
class TransformersLoop(styles.HuggingFaceLoop):
    """One-hot masks and index_add_ in the model's dtype."""


@right()
class GptFastGather(styles.GatherWeights):
    """Every token gathers its experts' matrices."""


@right()
class SortedSegments(styles.Sorted):
    """Permute, segments, unpermute."""


@right()
class BatchedPadded(styles.PaddedBatch):
    """bmm over experts padded to the busiest."""


@right()
class ScatterAdded(styles.ScatterAdd):
    """scatter_add_ in fp32."""


@right()
class ChunkedTokens(styles.Chunked):
    """Chunks of 64 tokens."""


@right()
class GroupedGemm(styles.Grouped):
    """grouped_mm over sorted rows."""


@right()
class DeepSeekLayer(styles.DeepSeekRouter):
    """Groups, correction bias and scaling."""


@right()
class SharedAndRouted(styles.SharedExpert):
    """A shared expert, gated or not."""


@right()
class WithoutTaps(styles.Sorted):
    """A layer that shows its output alone."""

    def forward(self, x_TH: Tensor) -> Tensor:
        return super().forward(x_TH)[0]


@right()
class DenseMixture(styles.Loop):
    """Every expert computes every token, and the routing decides what is taken."""

    def routed(self, x_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        y_TEH = torch.stack([self.expert(x_TH, e) for e in range(self.num_experts)], dim=1)
        taken = ids_TK[..., None].expand(-1, -1, x_TH.shape[1])
        return (y_TEH.gather(1, taken).float() * weights_TK[..., None]).sum(dim=1)


@right()
class CachedWorkspace(styles.Sorted):
    """Intermediate rows live in a buffer that grows, and all that is read of it is written."""

    def prepare(self) -> None:
        self.buffer = torch.empty(0, self.config.hidden_size, dtype=self.config.dtype)

    def segments(self, x_SH: Tensor, ends_E: list[int]) -> Tensor:
        if len(self.buffer) < len(x_SH):
            self.buffer = torch.empty_like(x_SH)
        y_SH = self.buffer[: len(x_SH)]
        y_SH.copy_(super().segments(x_SH, ends_E))
        return y_SH


@right()
class SplitIntermediate(styles.Sorted):
    """The intermediate width in two shards, as tensor parallelism cuts it, summed in fp32."""

    def declare(self, contract: RoundingContract) -> RoundingContract:
        return replace(contract, expert_output=None)

    def expert(self, x: Tensor, expert: int) -> Tensor:
        gate, up = (x @ self.weights.w13_LFH[expert].T).chunk(2, dim=-1)
        h, w2_HI = self.act(gate, up).float(), self.weights.w2_LHI[expert].float()
        cut = h.shape[1] // 2
        return h[:, :cut] @ w2_HI[:, :cut].T + h[:, cut:] @ w2_HI[:, cut:].T

    def segments(self, x_SH: Tensor, ends_E: list[int]) -> Tensor:
        return super().segments(x_SH.float(), ends_E)

    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        return super().act(*(half.to(self.config.dtype) for half in (gate, up)))

    def routed(self, x_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        wide = replace(
            self.weights, w13_LFH=self.weights.w13_LFH.float(), w2_LHI=self.weights.w2_LHI.float()
        )
        kept, self.weights = self.weights, wide
        try:
            return super().routed(x_TH, weights_TK, ids_TK)
        finally:
            self.weights = kept


@right()
class WeightedInput(styles.Sorted):
    """As in Llama 4: weights multiply the expert's input, where the config says so."""

    reads = ("norm_topk_prob", "scoring_func", "router_weight_on_input")

    def scores(self, logits_TE: Tensor) -> Tensor:
        return styles.DeepSeekRouter.scores(self, logits_TE)

    def routed(self, x_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        if not self.config.router_weight_on_input:
            return super().routed(x_TH, weights_TK, ids_TK)
        order_S = self.permutation(ids_TK)
        x_SH = x_TH[order_S // ids_TK.shape[1]].float() * weights_TK.flatten()[order_S, None]
        y_SH = self.segments(x_SH.to(x_TH.dtype), self.ends(ids_TK))
        y_TKH = self.unpermuted(y_SH, order_S).unflatten(0, ids_TK.shape)
        return y_TKH.float().sum(dim=1)


@right()
class OtherActivations(styles.Sorted):
    """Activations by their names, with and without a gate, clamped or not."""

    reads = ("norm_topk_prob", "hidden_act", "gated", "swiglu_limit")

    def expert(self, x: Tensor, expert: int) -> Tensor:
        act = {
            "silu": F.silu,
            "gelu": F.gelu,
            "gelu_pytorch_tanh": lambda gate: F.gelu(gate, approximate="tanh"),
            "relu": F.relu,
            "relu2": lambda gate: F.relu(gate).square(),
        }[self.config.hidden_act]
        rows = (x @ self.weights.w13_LFH[expert].T).float()
        limit = self.config.swiglu_limit
        if not self.config.gated:
            return act(rows).to(x.dtype) @ self.weights.w2_LHI[expert].T
        gate, up = rows.chunk(2, dim=-1)
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (act(gate) * up).to(x.dtype) @ self.weights.w2_LHI[expert].T


@right()
class NarrowGate(styles.Sorted):
    """The gate is a linear layer of the model's dtype, and says so."""

    def declare(self, contract: RoundingContract) -> RoundingContract:
        return replace(contract, logits=FORMATS[self.config.dtype])

    def logits(self, x_TH: Tensor) -> Tensor:
        return (x_TH @ self.weights.router_EH.T).float()


@right(ep_size=2)
class RanksAllReduce(ranks.AllReduce):
    """All-gather and all-reduce."""


@right(ep_size=2)
class RanksReduceScatter(ranks.ReduceScatter):
    """All-gather and reduce-scatter."""


@right(ep_size=2)
class RanksAllToAll(ranks.AllToAll):
    """All-to-all there and back."""


@right(ep_size=2)
class RanksWithoutTaps(ranks.AllToAll):
    """All-to-all, showing its output alone."""

    def forward(self, x_TH: Tensor) -> Tensor:
        return super().forward(x_TH)[0]
