"""Faults of the router, from public reports of 2025 and 2026.

Legend: T tokens, H hidden_size, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.meta.survey.planting import planted
from twinmoe.optimized.layer import MoELayer
from twinmoe.optimized.router import InferenceTopKRouter
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults.fault import Reaches
from twinmoe.oracle.faults.seams import Seams, Wrong
from twinmoe.oracle.faults.triggers import has_tokens, in_graph
from twinmoe.oracle.faults.wrong_routers import (
    StepwiseRouter,
    route_by,
    routes_otherwise,
)

#: The graphed path alone.
FUSED: Sequence[type] = (InferenceTopKRouter,)


def _fused(wrong: type[StepwiseRouter]) -> Reaches:
    """The graphed path runs, and ``wrong`` answers otherwise."""
    otherwise = routes_otherwise(wrong)
    return lambda case: in_graph(case) and otherwise(case)


class _NarrowBias(StepwiseRouter):
    def biased(self, scores_TE: Tensor) -> Tensor:
        bias_E = self.weights.correction_bias_E
        return scores_TE if bias_E is None else scores_TE + bias_E.to(self.config.dtype).float()


@planted("NVIDIA/TensorRT-LLM#13328", "router", when=_fused(_NarrowBias))
def bias_rounded_before_selection(seams: Seams) -> None:
    """The fused router rounds the fp32 bias to the output's dtype before it chooses."""
    route_by(seams, _NarrowBias, FUSED)


class _NarrowSelection(StepwiseRouter):
    def choice(self, scores_TE: Tensor) -> Tensor:
        return self.biased(scores_TE).to(self.config.dtype).float()


@planted("flagos-ai/FlagGems#5469", "router", when=_fused(_NarrowSelection))
def selection_in_16_bits(seams: Seams) -> None:
    """Biased scores are ranked in the model's dtype."""
    route_by(seams, _NarrowSelection, FUSED)


class _MarkedMinusOne(StepwiseRouter):
    def pick(self, limited_TE: Tensor) -> Tensor:
        left_TE, ids = limited_TE.clone(), []
        for _ in range(self.config.num_experts_per_tok):
            ids.append(left_TE.argmax(dim=1, keepdim=True))
            left_TE.scatter_(1, ids[-1], -1.0)
        return torch.cat(ids, dim=1)


@planted("vllm-project/vllm#42608", "router", when=_fused(_MarkedMinusOne))
def taken_is_minus_one(seams: Seams) -> None:
    """A taken expert's score becomes -1 in place, which biased scores may lie below."""
    route_by(seams, _MarkedMinusOne, FUSED)


class _UnnormalisedSigmoid(StepwiseRouter):
    def normalise(self, weights_TK: Tensor) -> Tensor:
        return (
            weights_TK if self.config.scoring_func == "sigmoid" else super().normalise(weights_TK)
        )


@planted(
    "pytorch/torchtitan#1419",
    "router",
    when=lambda case: (
        has_tokens(case) and case.config.scoring_func == "sigmoid" and case.config.norm_topk_prob
    ),
)
def sigmoid_unnormalised(seams: Seams) -> None:
    """Sigmoid scores are left as they are where they should sum to one."""
    route_by(seams, _UnnormalisedSigmoid)


class _SoftmaxFallback(StepwiseRouter):
    def forward(self, x_TH: Tensor) -> object:
        if self.config.n_group == self.config.num_experts:
            logits_TE = self.logits(x_TH)
            self.logits = lambda _: logits_TE.softmax(dim=1).logit()  # type: ignore[method-assign]
        return super().forward(x_TH)


@planted(
    "vllm-project/vllm#32872",
    "router",
    when=lambda case: (
        has_tokens(case)
        and case.config.n_group == case.config.num_experts
        and case.config.scoring_func == "sigmoid"
    ),
)
def one_expert_a_group(seams: Seams) -> None:
    """Groups of one expert fall back to a router that only knows softmax."""
    route_by(seams, _SoftmaxFallback)


class _StaleCandidates(StepwiseRouter):
    def pick(self, limited_TE: Tensor) -> Tensor:
        stale_TE = limited_TE.clone()
        if self.config.n_group == 1 and self.config.num_experts_per_tok < 8 and len(stale_TE) > 1:
            best_T, id_T = limited_TE.max(dim=1)
            stale_TE[1:].scatter_reduce_(1, id_T[:-1, None], best_T[:-1, None], "amax")
        return super().pick(stale_TE)


@planted("flashinfer-ai/flashinfer#5165", "router", when=_fused(_StaleCandidates))
def stale_candidates(seams: Seams) -> None:
    """With k < 8 in one group, unwritten slots of the reduction hold the row's before."""
    route_by(seams, _StaleCandidates, FUSED)


@planted(
    "ROCm/aiter#2369",
    "",
    when=lambda case: (
        in_graph(case)
        and case.config.num_experts // case.config.n_group > 32
        and max(case.tokens) > 8
    ),
)
def too_many_a_group(seams: Seams) -> None:
    """The kernel for larger batches refuses more than 32 experts in a group."""

    def refuse(forward: Wrong, router: object, x_TH: Tensor, *args: object) -> object:
        config = seams.case.config
        if len(x_TH) > 8 and config.num_experts // config.n_group > 32:
            raise RuntimeError("num_experts / n_group exceeds the maximum supported (32)")
        return forward(router, x_TH, *args)

    seams.around(InferenceTopKRouter, "forward", refuse)


class _Behind(StepwiseRouter):
    experts = 256

    def logits(self, x_TH: Tensor) -> Tensor:
        logits_TE = super().logits(x_TH).clone()
        logits_TE[:, self.experts :] = -torch.inf
        return logits_TE


class _Behind512(_Behind):
    experts = 512


def _more_than(experts: int, case: Case) -> bool:
    return in_graph(case) and case.config.num_experts > experts


@planted("sgl-project/sglang#8007", "router", when=lambda case: _more_than(256, case))
def gemm_for_256(seams: Seams) -> None:
    """The router's GEMM was written for 256 experts."""
    route_by(seams, _Behind, FUSED)


@planted("ROCm/aiter#4482", "router", when=lambda case: _more_than(512, case))
def scan_of_512(seams: Seams) -> None:
    """A scan in one pass reaches 512 experts."""
    route_by(seams, _Behind512, FUSED)


@planted(
    "huggingface/kernels-community#106",
    "router|dispatch|output",
    when=lambda case: has_tokens(case) and case.layout == "strided",
)
def strides_ignored(seams: Seams) -> None:
    """Rows are read as if they lay side by side, whatever their strides."""

    def flat(forward: Wrong, layer: object, x_TH: Tensor, *args: object) -> object:
        return forward(layer, x_TH.as_strided(x_TH.shape, (x_TH.shape[1], 1)), *args)

    seams.around(MoELayer, "_forward", flat)
