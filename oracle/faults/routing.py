"""Faults of routers: which experts a token visits."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from twinmoe.optimized import router as fused
from twinmoe.optimized.router import InferenceTopKRouter
from twinmoe.optimized.router_kernels import router_logits
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults.fault import fault
from twinmoe.oracle.faults.misread import misread
from twinmoe.oracle.faults.seams import Seams, Wrong
from twinmoe.oracle.faults.triggers import (
    bucket_of,
    has_shared,
    in_graph,
    several_experts,
    shows_padding,
    takes_eager_path,
)
from twinmoe.oracle.faults.wrong_routers import (
    ROUTERS,
    StepwiseRouter,
    route_by,
    routes_otherwise,
)
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.router import TopKRouter, best

# --- groups and masks -------------------------------------------------------------------------


def _best_member(config: MoEConfig) -> MoEConfig:
    return replace(config, group_score="max")


@fault(
    "RT02",
    "vllm-project/vllm#13474",
    "groups are ranked by their best expert, not by the sum of their best two",
    stage="router",
    when=routes_otherwise(TopKRouter, _best_member),
)
def group_maximum(seams: Seams) -> None:
    """Both routers score a group by its maximum."""
    misread(seams, ROUTERS, _best_member)


class _MaskedWithZero(StepwiseRouter):
    def limit(self, choice_TE: Tensor) -> Tensor:
        limited_TE = super().limit(choice_TE)
        return limited_TE.masked_fill(limited_TE == -torch.inf, 0.0)


@fault(
    "RT03",
    "sgl-project/sglang#3705",
    "experts of groups that are out score 0, which beats a negative score",
    stage="router",
    when=routes_otherwise(_MaskedWithZero),
)
def masked_with_zero(seams: Seams) -> None:
    """The mask value is 0 where it should be minus infinity."""
    route_by(seams, _MaskedWithZero)


class _FromZero(StepwiseRouter):
    def pick(self, limited_TE: Tensor) -> Tensor:
        if self.config.n_group > 1:
            return super().pick(limited_TE)
        return super().pick(limited_TE.clamp(min=0.0))


@fault(
    "RT04",
    "flashinfer-ai/flashinfer#2168",
    "the search for the best starts at 0, so negative biased scores look alike",
    stage="router",
    when=routes_otherwise(_FromZero),
)
def running_maximum_from_zero(seams: Seams) -> None:
    """Without groups, a running maximum that begins at 0 never sees what lies below."""
    route_by(seams, _FromZero)


# --- NaN --------------------------------------------------------------------------------------


class _RepeatsNaN(StepwiseRouter):
    masks_padding = False

    def ordered(self, choice_TE: Tensor) -> Tensor:
        return choice_TE

    def pick(self, limited_TE: Tensor) -> Tensor:
        columns = []
        for _ in range(self.config.num_experts_per_tok):
            column_T1 = limited_TE.argmax(dim=1, keepdim=True)
            is_taken = torch.zeros_like(limited_TE, dtype=torch.bool).scatter(1, column_T1, True)
            # a NaN equals nothing, so it is never struck off
            is_taken &= limited_TE == limited_TE.gather(1, column_T1)
            limited_TE = limited_TE.masked_fill(is_taken, -torch.inf)
            columns.append(column_T1)
        return torch.cat(columns, dim=1)


@fault(
    "RT16",
    "vllm-project/vllm#39391, vllm-project/vllm#39593, vllm-project/vllm#39288",
    "padding rows are routed, and NaN among their scores names one expert k times",
    stage="router",
    when=shows_padding,
)
def padding_repeats_an_expert(seams: Seams) -> None:
    """Repeated argmax that strikes off by comparison, on rows that nobody masked."""
    route_by(seams, _RepeatsNaN)


class _GuardBeforeBias(StepwiseRouter):
    def choice(self, scores_TE: Tensor) -> Tensor:
        return (
            super().choice(scores_TE).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        )


@fault(
    "RT17",
    "ggml-org/llama.cpp#28370",
    "NaN is replaced before the bias is added, so a NaN bias still wins the top-k",
    stage="router",
    when=routes_otherwise(_GuardBeforeBias),
)
def guard_before_bias(seams: Seams) -> None:
    """The guard stands one step too early."""
    route_by(seams, _GuardBeforeBias)


# --- kernels chosen by size -------------------------------------------------------------------

#: Buckets up to this size take the small-batch kernel.
SMALL_BATCH = 8


class _NarrowLogits(StepwiseRouter):
    def logits(self, x_TH: Tensor) -> Tensor:
        logits_TE = super().logits(x_TH)
        return logits_TE.bfloat16().to(logits_TE.dtype)


def _in_small_batch(case: Case) -> bool:
    return in_graph(case) and bucket_of(case) <= SMALL_BATCH


@fault(
    "RT18",
    "sgl-project/sglang#33764",
    "the small-batch kernel stores logits in bf16",
    stage="router",
    when=lambda case: _in_small_batch(case) and routes_otherwise(_NarrowLogits)(case),
)
def narrow_logits(seams: Seams) -> None:
    """The graphed path's logits, rounded to bf16 up to a number of rows."""

    def rounded(launch: Wrong, kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
        launch(kernel, grid, *args, **constants)
        if kernel is router_logits and len(args[0]) <= SMALL_BATCH:
            partials_PTE = args[3]
            partials_PTE.copy_(partials_PTE.bfloat16())

    seams.around(fused, "launch", rounded)


class _PowerOfTwo(StepwiseRouter):
    def pick(self, limited_TE: Tensor) -> Tensor:
        experts = limited_TE.shape[1]
        padded_TE = pad(limited_TE, (0, (1 << (experts - 1).bit_length()) - experts))
        return super().pick(padded_TE if len(limited_TE) > SMALL_BATCH else limited_TE)


@fault(
    "RT25",
    "ROCm/aiter#2359",
    "the large-batch kernel rounds E up to a power of two and ranks the padding, as scores of 0",
    stage="router",
    when=lambda case: (
        in_graph(case) and bucket_of(case) > SMALL_BATCH and routes_otherwise(_PowerOfTwo)(case)
    ),
)
def padded_experts(seams: Seams) -> None:
    """Experts that do not exist beat those of negative score; 212 rows a core are here 8."""
    route_by(seams, _PowerOfTwo, (InferenceTopKRouter,))


# --- the order and the number of the chosen ---------------------------------------------------


class _UnsortedLast(StepwiseRouter):
    def pick(self, limited_TE: Tensor) -> Tensor:
        k = self.config.num_experts_per_tok
        one_more_TK = best(limited_TE, k + 1)
        return one_more_TK.sort(dim=1).values[:, :k]


def _one_more_in_reach(case: Case) -> bool:
    config = case.config
    reachable = config.num_experts // config.n_group * config.topk_group
    return has_shared(case) and config.num_experts_per_tok < reachable


@fault(
    "RT20",
    "sgl-project/sglang#8125",
    "the shared expert takes the last place of an unsorted top-k: any routed expert may go",
    stage="router",
    when=lambda case: _one_more_in_reach(case) and routes_otherwise(_UnsortedLast)(case),
)
def unsorted_last_place(seams: Seams) -> None:
    """The k + 1 best in order of their ids; what stands last makes room."""
    if _one_more_in_reach(seams.case):
        route_by(seams, _UnsortedLast)


def _ties(case: Case) -> bool:
    """Scores are equal in any arithmetic, on the path whose order is planted."""
    return case.routing in ("ties", "equal") and takes_eager_path(case)


class _HighestOnTie(StepwiseRouter):
    def pick(self, limited_TE: Tensor) -> Tensor:
        return limited_TE.shape[1] - 1 - super().pick(limited_TE.flip(1))


@fault(
    "RT26",
    "vllm-project/vllm#55514",
    "one path gives an exact tie to the highest expert id, the other to the lowest",
    stage="router",
    when=lambda case: _ties(case) and routes_otherwise(_HighestOnTie)(case),
)
def highest_on_tie(seams: Seams) -> None:
    """The eager router's order of equal scores is the other way round."""
    route_by(seams, _HighestOnTie, (TopKRouter,))


class _OnlyFirst(StepwiseRouter):
    def pick(self, limited_TE: Tensor) -> Tensor:
        ids_TK = super().pick(limited_TE)
        k = len(ids_TK) // max(1, len(limited_TE))  # rows by rows, where columns are meant
        return pad(ids_TK[:, :k], (0, ids_TK.shape[1] - k), value=-1)


@fault(
    "RT27",
    "laekov/fastmoe#129",
    "k is derived from the wrong axes of two shapes and comes out as 1",
    stage="router",
    when=several_experts,
)
def k_from_shapes(seams: Seams) -> None:
    """Every slot but the first stays without an expert."""
    route_by(seams, _OnlyFirst)
