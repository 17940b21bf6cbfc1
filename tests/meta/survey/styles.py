"""The styles in which people write MoE layers, each right; the surveys' mistakes are made in them.

Legend: T tokens of this rank, N rows of all ranks, H hidden_size, E experts, L local experts,
K experts per token, S slots (T * K), I intermediate size, C rows of the busiest expert.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twinmoe.oracle import RoundingContract, Taps, storage_contract
from twinmoe.oracle.contract import Ties
from twinmoe.oracle.rounding import FORMATS
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights

#: What a DeepSeek router reads of a config.
GROUPED = (
    *("scoring_func", "norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group"),
    *("group_score", "use_correction_bias"),
)


class Loop(nn.Module):
    """A loop over experts that adds to an fp32 accumulator; the parts are what styles replace."""

    #: Settings that the layer reads.
    reads: ClassVar[tuple[str, ...]] = ("norm_topk_prob", "routed_scaling_factor")

    def __init__(self, config: MoEConfig, weights: MoEWeights, place: RankContext) -> None:
        super().__init__()
        self.config, self.weights, self.place = config, weights, place
        self.num_experts, self.top_k = config.num_experts, config.num_experts_per_tok
        stored = storage_contract(type(self).__name__, config.dtype)
        self.contract = self.declare(replace(stored, ties=Ties.ANY))
        self.prepare()

    def prepare(self) -> None:
        """What a style makes of the weights when it is built."""

    def declare(self, contract: RoundingContract) -> RoundingContract:
        """Where this style rounds otherwise."""
        return contract

    # --- routing ------------------------------------------------------------------------

    def logits(self, x_TH: Tensor) -> Tensor:
        """One logit for each expert, in fp32."""
        return x_TH.float() @ self.weights.router_EH.float().T

    def scores(self, logits_TE: Tensor) -> Tensor:
        """What experts are chosen by."""
        return logits_TE.softmax(dim=-1)

    def choose(self, scores_TE: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen scores and ids [T, K]."""
        top_TK, ids_TK = scores_TE.topk(self.top_k, dim=-1)
        return top_TK, ids_TK

    def weigh(self, top_TK: Tensor) -> Tensor:
        """Router weights of the chosen scores."""
        if self.config.norm_topk_prob:
            top_TK = top_TK / (top_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return top_TK * self.config.routed_scaling_factor

    def route(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Router weights and expert ids, [T, K] each."""
        top_TK, ids_TK = self.choose(self.scores(self.logits(x_TH)))
        return self.weigh(top_TK), ids_TK

    # --- experts ------------------------------------------------------------------------

    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        """Activated gate times up in fp32, rounded once."""
        return (F.silu(gate.float()) * up.float()).to(gate.dtype)

    def expert(self, x: Tensor, expert: int) -> Tensor:
        """One expert's output for its rows; ``expert`` counts this rank's own."""
        gate, up = (x @ self.weights.w13_LFH[expert].T).chunk(2, dim=-1)
        return self.act(gate, up) @ self.weights.w2_LHI[expert].T

    def routed(self, x_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        """The weighted sum of each token's experts, in fp32."""
        out_TH = x_TH.new_zeros(x_TH.shape, dtype=torch.float32)
        for expert in range(self.num_experts):
            token, slot = (ids_TK == expert).nonzero(as_tuple=True)
            y = self.expert(x_TH[token], expert).float()
            out_TH.index_add_(0, token, weights_TK[token, slot, None] * y)
        return out_TH

    def finish(self, x_TH: Tensor, out_TH: Tensor) -> Tensor:
        """What becomes of the routed sum; the shared expert would be added here."""
        return out_TH.to(x_TH.dtype)

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Taps]:
        """[T, H] to [T, H], and the router's answer."""
        weights_TK, ids_TK = self.route(x_TH)
        out_TH = self.finish(x_TH, self.routed(x_TH, weights_TK, ids_TK))
        return out_TH, Taps(ids_TK=ids_TK, weights_TK=weights_TK)


class HuggingFaceLoop(Loop):
    """As in transformers: one-hot masks, router weights in the model's dtype, ``index_add_``."""

    reads = ("norm_topk_prob",)

    def declare(self, contract: RoundingContract) -> RoundingContract:
        narrow = FORMATS[self.config.dtype]
        return replace(contract, router_weights=narrow, terms=narrow, combine=narrow, gate=narrow)

    def weigh(self, top_TK: Tensor) -> Tensor:
        return super().weigh(top_TK).to(self.config.dtype)

    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def routed(self, x_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        final_TH = torch.zeros_like(x_TH)
        mask_EKT = F.one_hot(ids_TK, num_classes=self.num_experts).permute(2, 1, 0)
        for expert in mask_EKT.sum(dim=(1, 2)).nonzero().flatten().tolist():
            slot, token = torch.where(mask_EKT[expert])
            current = self.expert(x_TH[token], expert) * weights_TK[token, slot, None]
            final_TH.index_add_(0, token, current.to(x_TH.dtype))
        return final_TH


class GatherWeights(Loop):
    """As in gpt-fast: every token gathers its experts' matrices, and einsum does the rest."""

    def declare(self, contract: RoundingContract) -> RoundingContract:
        return replace(contract, gate=FORMATS[self.config.dtype])

    def routed(self, x_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        gate_up_TKF = torch.einsum("ti,taoi->tao", x_TH, self.weights.w13_LFH[ids_TK])
        gate, up = gate_up_TKF.chunk(2, dim=-1)
        y_TKH = torch.einsum("tao,taio->tai", F.silu(gate) * up, self.weights.w2_LHI[ids_TK])
        return torch.einsum("tai,ta->ti", y_TKH.float(), weights_TK)


class Sorted(Loop):
    """Permute by a stable sort of the slots, each expert's segment at once, unpermute, sum."""

    def permutation(self, ids_TK: Tensor) -> Tensor:
        """The slots in the order of their experts."""
        return ids_TK.flatten().argsort(stable=True)

    def ends(self, ids_TK: Tensor) -> list[int]:
        """Where each expert's segment ends."""
        return ids_TK.flatten().bincount(minlength=self.num_experts).cumsum(0).tolist()

    def segments(self, x_SH: Tensor, ends_E: list[int]) -> Tensor:
        """Each expert on its segment of the sorted rows."""
        y_SH, start = torch.zeros_like(x_SH), 0
        for expert, end in enumerate(ends_E):
            y_SH[start:end] = self.expert(x_SH[start:end], expert)
            start = end
        return y_SH

    def unpermuted(self, y_SH: Tensor, order_S: Tensor) -> Tensor:
        """Rows back in the order of the slots."""
        return torch.empty_like(y_SH).index_copy_(0, order_S, y_SH)

    def combine(self, y_TKH: Tensor, weights_TK: Tensor) -> Tensor:
        """The weighted sum over K, in fp32."""
        return (y_TKH.float() * weights_TK[..., None].float()).sum(dim=1)

    def routed(self, x_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        order_S = self.permutation(ids_TK)
        y_SH = self.segments(x_TH[order_S // ids_TK.shape[1]], self.ends(ids_TK))
        y_TKH = self.unpermuted(y_SH, order_S).unflatten(0, ids_TK.shape)
        return self.combine(y_TKH, weights_TK)


class PaddedBatch(Sorted):
    """Experts as one batched matrix product, each padded to the rows of the busiest."""

    def capacity(self, ids_TK: Tensor) -> int:
        """Rows that every expert has room for."""
        return int(ids_TK.flatten().bincount(minlength=self.num_experts).max())

    def routed(self, x_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        if not len(x_TH):
            return x_TH.float()
        capacity, hidden = self.capacity(ids_TK), x_TH.shape[1]
        hot_SE = F.one_hot(ids_TK.flatten(), self.num_experts)
        place_S = ((hot_SE.cumsum(dim=0) - 1) * hot_SE).sum(dim=1)
        fits_S = place_S < capacity
        at_S = (ids_TK.flatten() * capacity + place_S).where(fits_S, self.num_experts * capacity)
        rows = x_TH.new_zeros(self.num_experts * capacity + 1, hidden)
        rows[at_S] = x_TH.repeat_interleave(self.top_k, dim=0)
        x_ECH = rows[:-1].view(self.num_experts, capacity, hidden)
        gate, up = torch.bmm(x_ECH, self.weights.w13_LFH.transpose(1, 2)).chunk(2, dim=-1)
        y_ECH = torch.bmm(self.act(gate, up), self.weights.w2_LHI.transpose(1, 2))
        y_SH = torch.cat([y_ECH.flatten(0, 1), rows.new_zeros(1, hidden)])[at_S]
        y_SH = y_SH.masked_fill(~fits_S[:, None], 0)
        return self.combine(y_SH.unflatten(0, ids_TK.shape), weights_TK)


class ScatterAdd(Sorted):
    """Weighted rows are added by ``scatter_add_`` in fp32, in the order in which they come."""

    def routed(self, x_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        order_S = self.permutation(ids_TK)
        token_S = order_S // ids_TK.shape[1]
        y_SH = self.segments(x_TH[token_S], self.ends(ids_TK)).float()
        y_SH = y_SH * weights_TK.flatten()[order_S, None]
        out_TH = x_TH.new_zeros(x_TH.shape, dtype=torch.float32)
        return out_TH.scatter_add_(0, token_S[:, None].expand_as(y_SH), y_SH)


class Chunked(Sorted):
    """Tokens in chunks, so that intermediate tensors stay small."""

    chunk: ClassVar[int] = 64

    def routed(self, x_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        chunks = zip(*(t.split(self.chunk) for t in (x_TH, weights_TK, ids_TK)), strict=True)
        return torch.cat([super(Chunked, self).routed(*chunk) for chunk in chunks])


class Grouped(Sorted):
    """``torch.nn.functional.grouped_mm`` over the sorted rows."""

    @staticmethod
    def fitted(config: MoEConfig) -> MoEConfig:
        """Widths in multiples of 16 bytes, which grouped_mm wants."""
        return replace(
            config,
            hidden_size=-(-config.hidden_size // 8) * 8,
            moe_intermediate_size=-(-config.moe_intermediate_size // 8) * 8,
        )

    def offsets(self, ids_TK: Tensor) -> Tensor:
        """Ends of the experts' segments, int32."""
        return ids_TK.flatten().bincount(minlength=self.num_experts).cumsum(0).int()

    def routed(self, x_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        order_S, ends_E = self.permutation(ids_TK), self.offsets(ids_TK)
        x_SH = x_TH[order_S // ids_TK.shape[1]]
        gate_up_SF = F.grouped_mm(x_SH, self.weights.w13_LFH.transpose(1, 2), offs=ends_E)
        h_SI = self.act(*gate_up_SF.chunk(2, dim=-1))
        y_SH = F.grouped_mm(h_SI, self.weights.w2_LHI.transpose(1, 2), offs=ends_E)
        y_TKH = self.unpermuted(y_SH, order_S).unflatten(0, ids_TK.shape)
        return self.combine(y_TKH, weights_TK)


class DeepSeekRouter(Sorted):
    """Scores, correction bias, groups: the router of DeepSeek-V3, over sorted slots."""

    reads = GROUPED

    def scores(self, logits_TE: Tensor) -> Tensor:
        if self.config.scoring_func == "softmax":
            return logits_TE.softmax(dim=-1)
        if self.config.scoring_func == "sigmoid":
            return logits_TE.sigmoid()
        return F.softplus(logits_TE).sqrt()

    def biased(self, scores_TE: Tensor) -> Tensor:
        """What experts are ranked by."""
        bias_E = self.weights.correction_bias_E
        return scores_TE if bias_E is None else scores_TE + bias_E

    def grouped(self, choice_TE: Tensor) -> Tensor:
        """Numbers in the order of experts, those of the groups that are out at -inf."""
        config = self.config
        if config.n_group == config.topk_group:
            return in_order(choice_TE)
        choice_TGM = choice_TE.unflatten(1, (config.n_group, -1))
        counted = min(2 if config.group_score == "top2_sum" else 1, choice_TGM.shape[2])
        best = in_order(choice_TGM).topk(counted, dim=-1).indices
        group_TG = in_order(choice_TGM.gather(2, best).sum(dim=-1))
        kept = group_TG.topk(config.topk_group, dim=-1).indices
        is_out_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter(1, kept, False)
        return in_order(choice_TGM).masked_fill(is_out_TG[..., None], -torch.inf).flatten(1)

    def choose(self, scores_TE: Tensor) -> tuple[Tensor, Tensor]:
        ids_TK = self.grouped(self.biased(scores_TE)).topk(self.top_k, dim=-1).indices
        return scores_TE.gather(1, ids_TK), ids_TK


class SharedExpert(Sorted):
    """A shared expert beside the routed ones, gated where the config says so, as in Qwen2-MoE."""

    reads = ("norm_topk_prob", "shared_expert_intermediate_size", "shared_expert_gate")

    def shared(self, x_TH: Tensor) -> Tensor:
        """What the shared expert adds, in fp32."""
        w13_FH, w2_HI = self.weights.shared_w13_FH, self.weights.shared_w2_HI
        if w13_FH is None or w2_HI is None:
            return x_TH.new_zeros(x_TH.shape, dtype=torch.float32)
        gate, up = (x_TH @ w13_FH.T).chunk(2, dim=-1)
        return self.gated(x_TH, (self.act_shared(gate, up) @ w2_HI.T).float())

    def act_shared(self, gate: Tensor, up: Tensor) -> Tensor:
        """The shared expert's activation."""
        return self.act(gate, up)

    def gated(self, x_TH: Tensor, y_TH: Tensor) -> Tensor:
        """The shared output times its gate."""
        gate_1H = self.weights.shared_gate_1H
        return y_TH if gate_1H is None else (x_TH.float() @ gate_1H.float().T).sigmoid() * y_TH

    def finish(self, x_TH: Tensor, out_TH: Tensor) -> Tensor:
        return (out_TH + self.shared(x_TH)).to(x_TH.dtype)


def in_order(scores: Tensor) -> Tensor:
    """Numbers in fp64 that stand as experts do: numbers by value, then NaN, then -inf."""
    return scores.double().nan_to_num(nan=-1e300, posinf=torch.inf, neginf=-1e301)
