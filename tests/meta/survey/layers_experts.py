"""Wrong experts: activations, layouts and formats, from public reports of 2025 and 2026.

Legend: T tokens, H hidden_size, I intermediate size, S slots, F rows of w13.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.meta.survey import styles
from tests.meta.survey.entries import wrong


class Clamped(styles.Sorted):
    """SwiGLU with a limit; right as it stands."""

    reads = ("norm_topk_prob", "swiglu_limit")

    def clamped(self, gate: Tensor, up: Tensor, limit: float) -> Tensor:
        """act(gate) * up in fp32 within the limit."""
        return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)

    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.config.swiglu_limit is None:
            return super().act(gate, up)
        return self.clamped(gate.float(), up.float(), self.config.swiglu_limit).to(gate.dtype)


@wrong("PrimeIntellect-ai/prime-rl#2365", "experts", "output")
class GateClampedBelow(Clamped):
    """The gate is clamped on both sides, as up is."""

    def clamped(self, gate: Tensor, up: Tensor, limit: float) -> Tensor:
        return F.silu(gate.clamp(-limit, limit)) * up.clamp(-limit, limit)


@wrong("sgl-project/sglang-jax#1358", "experts", "output")
class ClampedAfterwards(Clamped):
    """The limit is applied to silu(gate), not to the gate."""

    def clamped(self, gate: Tensor, up: Tensor, limit: float) -> Tensor:
        return F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)


@wrong("huggingface/transformers#47031", "experts", "output")
class TransposedDown(styles.Sorted):
    """A square down projection passes for one that is already transposed."""

    def expert(self, x: Tensor, expert: int) -> Tensor:
        gate, up = (x @ self.weights.w13_LFH[expert].T).chunk(2, dim=-1)
        w2 = self.weights.w2_LHI[expert]
        is_transposed = w2.shape[0] == self.config.moe_intermediate_size
        return self.act(gate, up) @ (w2 if is_transposed else w2.T)


@wrong("unslothai/unsloth-zoo#849", "experts", "output")
class TransposedGateUp(styles.Sorted):
    """Gate and up rows that are as many as hidden is wide pass for transposed ones."""

    def expert(self, x: Tensor, expert: int) -> Tensor:
        w13 = self.weights.w13_LFH[expert]
        is_transposed = w13.shape[0] == self.config.hidden_size
        gate, up = (x @ (w13 if is_transposed else w13.T)).chunk(2, dim=-1)
        return self.act(gate, up) @ self.weights.w2_LHI[expert].T


@wrong("linkedin/Liger-Kernel#1377", "experts", "output")
class ExpertsSideBySide(styles.Sorted):
    """Gate is a view of [gate | up], but experts are addressed as if gates lay side by side."""

    def prepare(self) -> None:
        w13, size = self.weights.w13_LFH, self.config.moe_intermediate_size
        strides = (size * w13.shape[2], w13.shape[2], 1)
        self.gate_LIH = w13.as_strided((w13.shape[0], size, w13.shape[2]), strides)

    def expert(self, x: Tensor, expert: int) -> Tensor:
        up = x @ self.weights.w13_LFH[expert].chunk(2)[1].T
        return self.act(x @ self.gate_LIH[expert].T, up) @ self.weights.w2_LHI[expert].T


@wrong("ROCm/hip-ep#672", "experts", "output")
class DownInHalf(styles.Sorted):
    """The down projection of a bf16 layer is stored in fp16, where it may overflow."""

    def expert(self, x: Tensor, expert: int) -> Tensor:
        gate, up = (x @ self.weights.w13_LFH[expert].T).chunk(2, dim=-1)
        y = self.act(gate, up).float() @ self.weights.w2_LHI[expert].T.float()
        return (y.half() if x.dtype is torch.bfloat16 else y).to(x.dtype)


@wrong("vllm-project/vllm#33972", "experts", "output")
class ProjectedInHalf(styles.Sorted):
    """Gate and up of a bf16 layer pass through fp16."""

    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        if gate.dtype is torch.bfloat16:
            gate, up = gate.half().bfloat16(), up.half().bfloat16()
        return super().act(gate, up)


@wrong("vllm-project/vllm#13232", "experts", "output")
class ActivatedInHalf(styles.Sorted):
    """The activation of a bf16 layer is stored in fp16."""

    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        h = F.silu(gate.float()) * up.float()
        return (h.half() if gate.dtype is torch.bfloat16 else h).to(gate.dtype)


@wrong("huggingface/kernels-community#76", "experts", "output")
class NarrowSilu(styles.Sorted):
    """The sigmoid of the gate is rounded to the model's dtype before it meets the gate."""

    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        sigmoid = torch.sigmoid(gate.float()).to(gate.dtype)
        return (gate.float() * sigmoid.float() * up.float()).to(gate.dtype)


@wrong("sgl-project/sgl-kernel-npu#221", "experts", "output")
class CountsForEnds(styles.Sorted):
    """Counts of the experts are taken for the ends of their segments."""

    def ends(self, ids_TK: Tensor) -> list[int]:
        return ids_TK.flatten().bincount(minlength=self.num_experts).tolist()


@wrong("ModelTC/LightLLM#1369", "experts", "combine", "output")
class BlocksWrapAround(styles.Loop):
    """Experts come in blocks of four by a modulo, so that the last block meets the first again."""

    def routed(self, x_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        out_TH = x_TH.new_zeros(x_TH.shape, dtype=torch.float32)
        for place in range(-(-self.num_experts // 4) * 4):
            expert = place % self.num_experts
            token, slot = (ids_TK == expert).nonzero(as_tuple=True)
            y = self.expert(x_TH[token], expert).float()
            out_TH.index_add_(0, token, weights_TK[token, slot, None] * y)
        return out_TH


@wrong("NousResearch/torchtitan#36", "combine", "output")
class SharedGateDropped(styles.SharedExpert):
    """The shared expert's gate is loaded, and never used."""

    def gated(self, x_TH: Tensor, y_TH: Tensor) -> Tensor:
        return y_TH


@wrong("NVIDIA-NeMo/Automodel#2173", "combine", "output")
class SharedUnclamped(styles.SharedExpert, Clamped):
    """The limit of SwiGLU reaches the routed experts alone."""

    reads = (*styles.SharedExpert.reads, "swiglu_limit")

    def act_shared(self, gate: Tensor, up: Tensor) -> Tensor:
        return styles.Sorted.act(self, gate, up)


@wrong("radixark/Megatron-LM#68", "experts", "combine", "output")
class NarrowTerms(styles.Sorted):
    """Weighted outputs are rounded to the model's dtype before they are summed."""

    def combine(self, y_TKH: Tensor, weights_TK: Tensor) -> Tensor:
        return super().combine(
            (y_TKH.float() * weights_TK[..., None]).to(y_TKH.dtype), torch.ones_like(weights_TK)
        )


@wrong("vllm-project/vllm#16744", "experts", "output")
class WeightOnTheWrongSide(styles.Sorted):
    """The router's weight multiplies the expert's input, which no config has asked for."""

    def routed(self, x_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        order_S = self.permutation(ids_TK)
        x_SH = x_TH[order_S // ids_TK.shape[1]].float() * weights_TK.flatten()[order_S, None]
        y_SH = self.segments(x_SH.to(x_TH.dtype), self.ends(ids_TK))
        y_TKH = self.unpermuted(y_SH, order_S).unflatten(0, ids_TK.shape)
        return y_TKH.float().sum(dim=1)
