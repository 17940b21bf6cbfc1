"""Faults of dispatch, from public reports of 2025 and 2026.

Legend: M rows, K experts per row, S slots, L local experts, R ranks, N rows of a bucket.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.meta.survey.planting import planted
from twinmoe.optimized.dispatcher import Gathered, InferenceCUDAGraphTokenDispatcher
from twinmoe.optimized.experts import InferenceGroupedMLP, backend
from twinmoe.optimized.experts.slots import SlotPlan
from twinmoe.optimized.graph import GraphRunner
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults.seams import Seams, Wrong
from twinmoe.oracle.faults.triggers import (
    bucket_of,
    gathers,
    has_padding,
    has_tokens,
    on_several_ranks,
    replays,
    takes_eager_path,
)
from twinmoe.reference.dispatch import MoEAlltoAllTokenDispatcher
from twinmoe.reference.placement import Placement


def _gathered(seams: Seams, change: Any) -> None:
    """Let the graphed dispatch hand on what ``change`` makes of (gathered, dispatcher)."""

    def dispatch(original: Wrong, dispatcher: Any, *args: Any) -> Gathered:
        gathered: Gathered = change(original(dispatcher, *args), dispatcher)
        return gathered

    seams.around(InferenceCUDAGraphTokenDispatcher, "token_dispatch", dispatch)


def _expert_ids(seams: Seams, change: Any) -> None:
    """Let the graphed experts see the ids that ``change`` makes of (ids, first, local)."""

    def forward(original: Wrong, experts: Any, x: Tensor, ids_MK: Tensor, *rest: Tensor) -> None:
        inner = experts._backend
        ids_MK = change(ids_MK, inner.first_expert, len(inner.weights.w2_LHI))
        original(experts, x, ids_MK.contiguous(), *rest)

    seams.around(InferenceGroupedMLP, "forward", forward)


@planted("sgl-project/sglang#28216", "dispatch", when=gathers)
def first_of_the_gathered(seams: Seams) -> None:
    """Of a list of gathered tensors only the first rank's is taken."""

    def change(gathered: Gathered, dispatcher: Any) -> Gathered:
        rows = len(gathered.hidden) // dispatcher.transport.world_size
        is_first_M = torch.arange(len(gathered.hidden), device=gathered.hidden.device) < rows
        return replace(gathered, hidden=gathered.hidden.where(is_first_M[:, None], 0.0))

    _gathered(seams, change)


@planted(
    "NVIDIA/TransformerEngine#2907",
    "experts",
    when=lambda case: gathers(case) or has_padding(case),
)
def sentinels_first(seams: Seams) -> None:
    """A signed sort puts the slots without a local expert at the head of the sorted list."""

    def head(plan_slots: Wrong, ids_MK: Tensor, first: int, local: int) -> SlotPlan:
        plan: SlotPlan = plan_slots(ids_MK, first, local)
        own_S = ids_MK.flatten() - first
        elsewhere = ((ids_MK.flatten() < 0) | (own_S < 0) | (own_S >= local)).sum()
        place_S = torch.arange(len(plan.slots_S), device=ids_MK.device) - elsewhere
        wrong_S = plan.slots_S[place_S.clamp(min=0)].where(place_S >= 0, 0)
        return replace(plan, slots_S=wrong_S.to(plan.slots_S.dtype))

    seams.around(backend, "plan_slots", head)


@planted("ROCm/ATOM#887", "experts", when=gathers)
def mask_equals_one(seams: Seams) -> None:
    """A map of local ids passes for a mask, so that only local expert 1 runs."""
    _expert_ids(seams, lambda ids, first, _local: ids.where(ids - first == 1, -1))


@planted("sgl-project/sglang#38160", "experts", when=on_several_ranks)
def rebased_twice(seams: Seams) -> None:
    """Ids that count from the rank's first expert are rebased once more."""

    def change(ids_MK: Tensor, first: int, local: int) -> Tensor:
        is_own = (ids_MK >= first) & (ids_MK < first + local)
        return (ids_MK - first).where(is_own, ids_MK) if first else ids_MK

    _expert_ids(seams, change)


@planted(
    "deepseek-ai/DeepEP#58",
    "dispatch|experts",
    when=lambda c: takes_eager_path(c) and c.ep_size > 1,
)
def unsorted_chunks(seams: Seams) -> None:
    """Received rows are taken for sorted by expert, where they come rank after rank."""

    def rows(original: Wrong, experts: Any, x_SH: Tensor, local_S: Tensor) -> Tensor:
        y_SH: Tensor = original(experts, x_SH, local_S.sort().values)
        return y_SH

    seams.around(InferenceGroupedMLP, "expert_rows", rows)


@planted(
    "vllm-project/vllm#23745",
    "dispatch|experts",
    when=lambda case: case.ep_size > 1 and takes_eager_path(case),
)
def dealt_in_turn(seams: Seams) -> None:
    """The map deals experts to ranks in turn, while weights were loaded in blocks."""
    seams.around(
        Placement, "owner", lambda _, p, ids: ids.remainder(p.ep_size).where(ids >= 0, ids)
    )
    seams.around(Placement, "local_id", lambda _, p, ids: ids // p.ep_size)


def _later_ranks_have_more(case: Case) -> bool:
    return gathers(case) and max(case.tokens) > case.tokens[0]


@planted("NVIDIA/Megatron-LM#4922", "router|dispatch", when=_later_ranks_have_more)
def rows_of_another_count(seams: Seams) -> None:
    """Padding is masked by the first rank's number of rows, on all ranks."""

    def change(gathered: Gathered, dispatcher: Any) -> Gathered:
        ids_RNK = gathered.ids.unflatten(0, (dispatcher.transport.world_size, -1))
        is_row_N1 = (ids_RNK[:1] >= 0)[..., :1]
        return replace(gathered, ids=ids_RNK.where(is_row_N1, -1).flatten(0, 1))

    _gathered(seams, change)


#: Rows that a rank takes; the report's were set by the caller.
_CAPACITY = 48


@planted(
    "deepseek-ai/DeepEP#625",
    "dispatch|experts",
    when=lambda case: (
        has_tokens(case) and sum(case.tokens) * case.config.num_experts_per_tok > _CAPACITY
    ),
)
def slots_beyond_capacity(seams: Seams) -> None:
    """Slots beyond a number of rows given by the caller are marked as not sent."""

    def alltoall(original: Wrong, dispatcher: Any, x: Tensor, ids_TK: Tensor) -> Any:
        place = torch.arange(ids_TK.numel(), device=ids_TK.device).view_as(ids_TK)
        return original(dispatcher, x, ids_TK.where(place < _CAPACITY, -1))

    def change(ids_MK: Tensor, first: int, local: int) -> Tensor:
        is_own = (ids_MK >= first) & (ids_MK < first + local)
        nth_MK = is_own.flatten().int().cumsum(0).view_as(ids_MK)
        return ids_MK.where(~is_own | (nth_MK <= _CAPACITY), -1)

    seams.around(MoEAlltoAllTokenDispatcher, "token_dispatch", alltoall)
    _expert_ids(seams, change)


@planted(
    "vllm-project/vllm-ascend#16477",
    "dispatch",
    when=lambda case: gathers(case) and case.ep_size == 4,
)
def ranks_in_another_order(seams: Seams) -> None:
    """A grid of ranks is gathered in the order of its other axis."""

    def change(gathered: Gathered, dispatcher: Any) -> Gathered:
        if dispatcher.transport.world_size != 4:
            return gathered
        hidden = gathered.hidden.unflatten(0, (2, 2, -1)).transpose(0, 1).flatten(0, 2)
        return replace(gathered, hidden=hidden.contiguous())

    _gathered(seams, change)


@planted(
    "NVIDIA-NeMo/Automodel#3641",
    "",
    when=lambda c: c.ep_size > 1 and takes_eager_path(c) and len(set(c.tokens)) > 1,
)
def equal_counts_only(seams: Seams) -> None:
    """The exchange has buffers of one size, and aborts where ranks differ."""

    def alltoall(original: Wrong, dispatcher: Any, x: Tensor, ids_TK: Tensor) -> Any:
        if len(ids_TK) != max(seams.case.tokens):
            raise RuntimeError("bytes_per_rank must be the same on all ranks")
        return original(dispatcher, x, ids_TK)

    seams.around(MoEAlltoAllTokenDispatcher, "token_dispatch", alltoall)


@planted("hw-native-sys/pypto#2242", "dispatch", when=gathers)
def unflushed_tail(seams: Seams) -> None:
    """Of each rank's slice the elements behind the last whole 16 are never flushed."""

    def change(gathered: Gathered, dispatcher: Any) -> Gathered:
        flat = gathered.hidden.unflatten(0, (dispatcher.transport.world_size, -1)).flatten(1)
        whole = flat.shape[1] // 16 * 16
        is_whole = torch.arange(flat.shape[1], device=flat.device) < whole
        return replace(gathered, hidden=flat.where(is_whole, 0.0).view_as(gathered.hidden))

    _gathered(seams, change)


@planted(
    "NVIDIA/TensorRT-LLM#18207",
    "router|dispatch",
    when=lambda case: replays(case) and max(case.tokens) == bucket_of(case),
)
def count_not_refilled(seams: Seams) -> None:
    """An input that a full batch leaves out keeps what the replay before had."""
    is_full = False

    def call(original: Wrong, runner: Any, hidden_TH: Tensor, **kwargs: Any) -> Tensor:
        nonlocal is_full
        is_full = len(hidden_TH) in runner.buckets
        output_TH: Tensor = original(runner, hidden_TH, **kwargs)
        return output_TH

    def capture(original: Wrong, runner: Any, bucket: int) -> Any:
        captured = original(runner, bucket)
        if not is_full or not captured.replays:
            return captured
        return replace(captured, num_valid=torch.zeros_like(captured.num_valid))

    seams.around(GraphRunner, "__call__", call)
    seams.around(GraphRunner, "capture", capture)
