"""Wrong routers, from public reports of 2025 and 2026.

Legend: T tokens, H hidden_size, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.meta.survey import styles
from tests.meta.survey.entries import wrong
from twinmoe.oracle import Taps


@wrong("lablup/mlxcel#391", "router")
class TopkSoftmax(styles.Loop):
    """Only the chosen logits are softmaxed, so that weights always sum to one."""

    def weigh(self, top_TK: Tensor) -> Tensor:
        return top_TK.log().softmax(dim=-1) * self.config.routed_scaling_factor


@wrong("pytorch/torchtitan#1419", "router")
class UnnormalisedSigmoid(styles.DeepSeekRouter):
    """Sigmoid scores are never divided by their sum."""

    def weigh(self, top_TK: Tensor) -> Tensor:
        if self.config.scoring_func == "sigmoid":
            return top_TK * self.config.routed_scaling_factor
        return super().weigh(top_TK)


@wrong("flagos-ai/FlagGems#5469", "router")
class NarrowSelection(styles.DeepSeekRouter):
    """Scores and bias are added in the model's dtype before experts are chosen."""

    def biased(self, scores_TE: Tensor) -> Tensor:
        return super().biased(scores_TE).to(self.config.dtype).float()


@wrong("sgl-project/sglang#37133", "router")
class NarrowBias(styles.DeepSeekRouter):
    """The correction bias is kept in 16 bits."""

    def biased(self, scores_TE: Tensor) -> Tensor:
        bias_E = self.weights.correction_bias_E
        return scores_TE if bias_E is None else scores_TE + bias_E.bfloat16().float()


@wrong("vllm-project/vllm#32872", "router")
class OneExpertAGroup(styles.DeepSeekRouter):
    """Where every group is one expert, a fallback scores by softmax whatever the config says."""

    def scores(self, logits_TE: Tensor) -> Tensor:
        if self.config.n_group == self.num_experts:
            return logits_TE.softmax(dim=-1)
        return super().scores(logits_TE)


@wrong("ROCm/aiter#2369")
class ThirtyTwoAGroup(styles.DeepSeekRouter):
    """The kernel for larger batches refuses groups of more than 32 experts."""

    def grouped(self, choice_TE: Tensor) -> Tensor:
        if len(choice_TE) > 16 and self.num_experts // self.config.n_group > 32:
            raise RuntimeError("num_experts / n_group exceeds the maximum supported (32)")
        return super().grouped(choice_TE)


@wrong("ROCm/aiter#4482", "router")
class ScanOf512(styles.Loop):
    """A scan in one pass covers 512 experts, and those behind it are never reached."""

    def choose(self, scores_TE: Tensor) -> tuple[Tensor, Tensor]:
        return scores_TE[:, :512].topk(self.top_k, dim=-1)


@wrong("sgl-project/sglang#8007", "router")
class Gemm256(styles.Loop):
    """The router's GEMM was written for 256 experts."""

    def logits(self, x_TH: Tensor) -> Tensor:
        logits_TE = super().logits(x_TH)
        logits_TE[:, 256:] = -torch.inf
        return logits_TE


@wrong("vllm-project/vllm#42608", "router")
class MarkedMinusOne(styles.DeepSeekRouter):
    """An expert that is taken gets the score -1, which biased scores may lie below."""

    def choose(self, scores_TE: Tensor) -> tuple[Tensor, Tensor]:
        choice_TE, ids = self.grouped(self.biased(scores_TE)).clone(), []
        for _ in range(self.top_k):
            ids.append(choice_TE.argmax(dim=-1, keepdim=True))
            choice_TE.scatter_(1, ids[-1], -1.0)
        ids_TK = torch.cat(ids, dim=1)
        return scores_TE.gather(1, ids_TK), ids_TK


@wrong("sgl-project/sglang#38719", "router")
class NarrowLogits(styles.DeepSeekRouter):
    """Logits of an fp32 gate are cast back to the model's dtype before the top-k."""

    def logits(self, x_TH: Tensor) -> Tensor:
        return super().logits(x_TH).to(self.config.dtype).float()


@wrong("vllm-project/vllm-xpu-kernels#102", "router", "combine", "output")
class NarrowWeights(styles.Sorted):
    """Router weights reach the gather kernel in 16 bits, where it wants fp32."""

    def combine(self, y_TKH: Tensor, weights_TK: Tensor) -> Tensor:
        return super().combine(y_TKH, weights_TK.to(y_TKH.dtype))


@wrong("vllm-project/vllm#55147", "router")
class HalfWrittenIds(styles.Loop):
    """Ids of 32 bits are written into a buffer of 64, whose upper halves keep what they held."""

    def choose(self, scores_TE: Tensor) -> tuple[Tensor, Tensor]:
        top_TK, ids_TK = super().choose(scores_TE)
        buffer = torch.full_like(ids_TK, 7 << 32)
        buffer.view(torch.int32)[:, ::2] = ids_TK.int()
        return top_TK, buffer


@wrong("flashinfer-ai/flashinfer#5165", "router")
class StaleCandidates(styles.DeepSeekRouter):
    """With one group and k < 8, a slot of the reduction is the row's before, and may win."""

    def choose(self, scores_TE: Tensor) -> tuple[Tensor, Tensor]:
        choice_TE = self.grouped(self.biased(scores_TE))
        if self.config.n_group > 1 or self.top_k >= 8 or len(choice_TE) < 2:
            return super().choose(scores_TE)
        best_T, id_T = choice_TE.max(dim=-1)
        stale_TE = choice_TE.clone()
        stale_TE[1:].scatter_reduce_(1, id_T[:-1, None], best_T[:-1, None], "amax")
        ids_TK = stale_TE.topk(self.top_k, dim=-1).indices
        return scores_TE.gather(1, ids_TK), ids_TK


@wrong("vllm-project/vllm#32058", "router")
class PaddingWins(styles.DeepSeekRouter):
    """Lanes behind a group's experts carry index 0, and win where no score is above -inf."""

    def choose(self, scores_TE: Tensor) -> tuple[Tensor, Tensor]:
        choice_TE = self.grouped(self.biased(scores_TE))
        ids_TK = choice_TE.topk(self.top_k, dim=-1).indices
        ids_TK = ids_TK.masked_fill(choice_TE.gather(1, ids_TK) < -1e299, 0)
        return scores_TE.gather(1, ids_TK), ids_TK


@wrong("huggingface/kernels-community#106", "router", "output")
class RawPointerGate(styles.Loop):
    """The gate's kernel reads rows as if they lay side by side, whatever the strides."""

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Taps]:
        return super().forward(x_TH.as_strided(x_TH.shape, (x_TH.shape[1], 1)))
