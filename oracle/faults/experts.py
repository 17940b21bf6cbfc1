"""Faults of expert computation: layouts, activations, which experts are computed, and memory.

Legend: M rows, K experts per row, S slots, H hidden_size, I intermediate size, F rows of w13,
L local experts.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from twinmoe.optimized.experts import InferenceGroupedMLP
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults.fault import fault
from twinmoe.oracle.faults.misread import misread
from twinmoe.oracle.faults.seams import Seams, Wrong
from twinmoe.oracle.faults.triggers import (
    gathers,
    has_tokens,
    in_graph,
    is_gated,
    replays,
    shows_padding,
)
from twinmoe.oracle.faults.visits import visited, visits
from twinmoe.oracle.faults.wrong_routers import StepwiseRouter, routes_otherwise
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.placement import Placement

# --- the layout of the first matrix -----------------------------------------------------------


def _rearrange(seams: Seams, rows: Callable[[Tensor], Tensor]) -> None:
    """Let the first matrix of every gated expert be read as ``rows`` of it."""

    def construct(build: Wrong, experts: object, config: Any, weights: Any, *args: Any) -> None:
        if config.gated:
            weights = replace(weights, w13_LFH=rows(weights.w13_LFH))
        build(experts, config, weights, *args)

    seams.around(InferenceGroupedMLP, "__init__", construct)


@fault(
    "EX01",
    "sgl-project/sglang#32430",
    "the experts read [up | gate] where the weights hold [gate | up]",
    stage="experts",
    when=is_gated,
)
def swapped_gate_up(seams: Seams) -> None:
    """Every expert's first matrix has its halves exchanged."""
    _rearrange(seams, lambda w13_LFH: torch.cat(w13_LFH.chunk(2, dim=1)[::-1], dim=1))


@fault(
    "EX03",
    "microsoft/onnxruntime#28738",
    "the kernel takes gate and up rows for interleaved, where one half follows the other",
    stage="experts",
    when=is_gated,
)
def interleaved_gate_up(seams: Seams) -> None:
    """Even rows are read as the gate, odd ones as up."""
    _rearrange(seams, lambda w13_LFH: torch.cat([w13_LFH[:, ::2], w13_LFH[:, 1::2]], dim=1))


# --- the activation ---------------------------------------------------------------------------


@fault(
    "EX04",
    "lightseekorg/tokenspeed#1630, sgl-project/sglang#39939, vllm-project/vllm#42855",
    "the checkpoint's SwiGLU limit never reaches the kernels of the routed experts",
    stage="experts",
    when=lambda case: has_tokens(case) and case.config.swiglu_limit is not None,
)
def lost_clamp(seams: Seams) -> None:
    """Gate and up go unclamped."""
    misread(seams, (InferenceGroupedMLP,), lambda config: replace(config, swiglu_limit=None))


def _always_silu(config: MoEConfig) -> MoEConfig:
    return replace(config, hidden_act="silu")


@fault(
    "EX25",
    "sgl-project/sglang#3170",
    "the fused kernel knows one activation only and takes it for all",
    stage="experts",
    when=lambda case: has_tokens(case) and case.config.hidden_act != "silu",
)
def always_silu(seams: Seams) -> None:
    """The activation's name is ignored."""
    misread(seams, (InferenceGroupedMLP,), _always_silu)


# --- which experts are computed ---------------------------------------------------------------


def _beyond_k(case: Case) -> bool:
    """Some visited expert's place among its rank's experts is k or higher."""
    config = case.config
    local = Placement(config.num_experts, case.ep_size).local_id(torch.arange(config.num_experts))
    return has_tokens(case) and bool((visits(case)[local >= config.num_experts_per_tok] > 0).any())


@fault(
    "EX19",
    "huggingface/transformers#43154",
    "the loop over experts ends after k of them",
    stage="experts",
    when=_beyond_k,
)
def loop_ends_at_k(seams: Seams) -> None:
    """A rank computes its first k experts and leaves the others out, on either path."""
    k = seams.case.config.num_experts_per_tok

    def graphed(
        forward: Wrong, experts: Any, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor
    ) -> None:
        is_late = ids - experts._backend.first_expert >= k
        forward(experts, x, ids.masked_fill(is_late, -1), weights, out)

    def eager(rows: Wrong, experts: Any, x_SH: Tensor, local_expert_S: Tensor) -> Tensor:
        y_SH: Tensor = rows(experts, x_SH, local_expert_S)
        return y_SH.masked_fill((local_expert_S >= k)[:, None], 0.0)

    seams.around(InferenceGroupedMLP, "forward", graphed)
    seams.around(InferenceGroupedMLP, "expert_rows", eager)


@fault(
    "EX14",
    "deepseek-ai/DeepGEMM#34, deepseek-ai/DeepGEMM#38",
    "rows of id -1, said to be skipped, are computed with the last expert",
    stage="experts",
    when=lambda case: shows_padding(case) and case.padding == "nan",
)
def minus_one_is_the_last(seams: Seams) -> None:
    """An index of -1 wraps round, and nothing masks what comes of it."""

    def wrapped(
        forward: Wrong, experts: Any, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor
    ) -> None:
        backend = experts._backend
        last = backend.first_expert + len(backend.weights.w2_LHI) - 1
        is_none = ids < 0
        wrong = ids.masked_fill(is_none, last), weights.masked_fill(is_none, 1.0)
        forward(experts, x, *wrong, out)

    seams.around(InferenceGroupedMLP, "forward", wrapped)


class _FirstWeight(StepwiseRouter):
    def scale(self, weights_TK: Tensor) -> Tensor:
        return super().scale(weights_TK)[:, :1].expand_as(weights_TK)


@fault(
    "EX24",
    "vllm-project/vllm-xpu-kernels#66",
    "the kernel applies the weight of a row's first slot to all its slots",
    stage="experts",
    when=lambda case: in_graph(case) and routes_otherwise(_FirstWeight, by=0.1)(case),
)
def first_weight_for_all(seams: Seams) -> None:
    """Column 0 of the weights, whatever the slot."""

    def first(
        forward: Wrong, experts: object, x: Tensor, ids: Tensor, weights_MK: Tensor, out: Tensor
    ) -> None:
        first_MK = weights_MK[:, :1].expand_as(weights_MK).contiguous()
        forward(experts, x, ids, first_MK, out)

    seams.around(InferenceGroupedMLP, "forward", first)


# --- what is never written --------------------------------------------------------------------


def _leaves_rows(case: Case) -> bool:
    """Some row has no expert on some rank, but had one in the batch before."""
    if not (gathers(case) and replays(case)):
        return False
    owned = [_owners(case, step.number) for step in case.steps() if step.kind == "f"]
    return any(
        bool((~now & before).any()) for before, now in pairwise(owned) if before.shape == now.shape
    )


def _owners(case: Case, batch: int) -> Tensor:
    """Whether a rank (last axis) owns an expert of a row [R, N, R] of the bucket."""
    ids = visited(case, batch)
    placement = Placement(case.config.num_experts, case.ep_size)
    owned = torch.zeros(case.ep_size, max(map(len, ids)), case.ep_size, dtype=torch.bool)
    for rank, ids_TK in enumerate(ids):
        owned[rank, : len(ids_TK)].scatter_(1, placement.owner(ids_TK), True)
    return owned


@fault(
    "EX15",
    "tgale96/grouped_gemm#36, meta-pytorch/MSLK#158",
    "rows without an expert of this rank are never written, and keep what memory held",
    stage="experts",
    when=_leaves_rows,
)
def unwritten_rows(seams: Seams) -> None:
    """The share of such a row is the last batch's."""

    def skip(
        forward: Wrong, experts: Any, x: Tensor, ids_MK: Tensor, weights: Tensor, out: Tensor
    ) -> None:
        before = out.clone()
        forward(experts, x, ids_MK, weights, out)
        local_MK = ids_MK - experts._backend.first_expert
        is_local_MK = (local_MK >= 0) & (local_MK < len(experts._backend.weights.w2_LHI))
        out.copy_(out.where(is_local_MK.any(dim=1, keepdim=True), before))

    seams.around(InferenceGroupedMLP, "forward", skip)
