"""Faults of dispatch: slots lost or misplaced, ids that mean something else, rows cut off.

Legend: M rows, K experts per row, S = M * K slots, H hidden_size, L local experts, R ranks,
N rows of a bucket.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from twinmoe.optimized.dispatcher import Gathered, InferenceCUDAGraphTokenDispatcher
from twinmoe.optimized.experts import InferenceGroupedMLP, backend
from twinmoe.optimized.experts.slots import SlotPlan
from twinmoe.optimized.launch import run, sizes
from twinmoe.optimized.layer import MoELayer
from twinmoe.optimized.router import Routing
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults.fault import fault
from twinmoe.oracle.faults.seams import Seams, Wrong
from twinmoe.oracle.faults.triggers import has_padding, has_tokens, on_several_ranks
from twinmoe.oracle.faults.visits import leaves_rank_0, visited, visits
from twinmoe.reference.dispatch import MoEAlltoAllTokenDispatcher
from twinmoe.reference.placement import Placement

# --- sorting slots by expert ------------------------------------------------------------------


def _placed(slots_S: Tensor, place_S: Tensor, is_placed_S: Tensor) -> Tensor:
    """Write each slot that ``is_placed_S`` at its place of ``slots_S``; other slots nowhere."""
    nowhere = len(slots_S)
    slot_S = torch.arange(nowhere, dtype=slots_S.dtype, device=slots_S.device)
    index_S = place_S.where(is_placed_S, nowhere).long()
    return torch.cat([slots_S, slots_S.new_zeros(1)]).scatter(0, index_S, slot_S)[:-1]


@fault(
    "DP01",
    "vllm-project/vllm-xpu-kernels#453",
    "of each expert's slots only the first is written into the sorted list",
    stage="experts",
    when=lambda case: has_tokens(case) and bool((visits(case) > 1).any()),
)
def first_slot_only(seams: Seams) -> None:
    """All other positions keep the filler, slot 0."""

    def first_only(plan_slots: Wrong, *args: Any) -> SlotPlan:
        plan: SlotPlan = plan_slots(*args)
        starts_L = torch.cat([plan.ends_L.new_zeros(1), plan.ends_L[:-1]])
        position_S = torch.arange(len(plan.slots_S), device=plan.slots_S.device)
        is_first_S = (position_S[:, None] == starts_L).any(dim=1)
        return replace(plan, slots_S=plan.slots_S.where(is_first_S, 0))

    seams.around(backend, "plan_slots", first_only)


@fault(
    "DP02",
    "vllm-project/vllm-xpu-kernels#571, ROCm/aiter#4827",
    "an expert id is only checked against its upper bound, so -1 counts before the counters",
    stage="experts",
    when=has_padding,
)
def negative_ids_counted(seams: Seams) -> None:
    """What lies before expert 0's start is taken for a start of 0: padding overwrites slots."""

    def unchecked(plan_slots: Wrong, ids_MK: Tensor, *args: Any) -> SlotPlan:
        plan: SlotPlan = plan_slots(ids_MK, *args)
        is_padding_S = ids_MK.flatten() < 0
        place_S = is_padding_S.cumsum(0) - 1
        return replace(plan, slots_S=_placed(plan.slots_S, place_S, is_padding_S))

    seams.around(backend, "plan_slots", unchecked)


def _same_expert_twice(case: Case) -> bool:
    """Two forwards of the history visit one expert."""
    before = torch.zeros(case.config.num_experts, dtype=torch.bool)
    for step in case.steps():
        if step.kind in "fga":
            now = visits(case, step.number) > 0
            if (before & now).any():
                return True
            before |= now
    return False


@fault(
    "DP05",
    "sgl-project/sglang#3339",
    "the counters by which slots are placed are never zeroed between calls",
    stage="experts",
    when=_same_expert_twice,
)
def stale_counters(seams: Seams) -> None:
    """Each call places an expert's slots behind those of all calls before, the last ones lost."""
    counters: dict[int, Tensor] = {}

    def construct(original: Wrong, experts: Any, *args: Any) -> None:
        original(experts, *args)
        weights = experts._backend.weights.w2_LHI
        counters.setdefault(
            len(weights), torch.zeros(len(weights), dtype=torch.int32, device=weights.device)
        )

    def uncleared(plan_slots: Wrong, ids_MK: Tensor, first_expert: int, local: int) -> SlotPlan:
        plan: SlotPlan = plan_slots(ids_MK, first_expert, local)
        if not ids_MK.numel():
            return plan
        counter_L = counters[local]
        expert_S = ids_MK.flatten() - first_expert
        is_local_S = (ids_MK.flatten() >= 0) & (expert_S >= 0) & (expert_S < local)
        behind_S = counter_L[expert_S.clamp(0, local - 1).long()]
        place_S = (plan.positions_S + behind_S).clamp(max=len(plan.slots_S) - 1)
        counter_L += plan.ends_L.diff(prepend=plan.ends_L.new_zeros(1))
        return replace(
            plan,
            slots_S=_placed(torch.zeros_like(plan.slots_S), place_S, is_local_S),
            positions_S=place_S.where(is_local_S, 0),
        )

    seams.around(InferenceGroupedMLP, "__init__", construct)
    seams.around(backend, "plan_slots", uncleared)


# --- global and local expert ids --------------------------------------------------------------


@fault(
    "DP06",
    "vllm-project/vllm-gaudi#1796",
    "global expert ids reach experts that count their own from 0: all others are dropped",
    stage="experts",
    stage_by_alltoall="dispatch",
    when=lambda case: on_several_ranks(case) and leaves_rank_0(case),
)
def untranslated_ids(seams: Seams) -> None:
    """Rank 0 is right; every other rank adds nothing."""

    def drop(forward: Wrong, experts: Any, x_MH: Tensor, ids_MK: Tensor, *rest: Tensor) -> None:
        local = len(experts._backend.weights.w2_LHI)
        forward(experts, x_MH, ids_MK.masked_fill(ids_MK >= local, -1), *rest)

    def drop_rows(rows: Wrong, experts: Any, x_SH: Tensor, id_S: Tensor) -> Tensor:
        is_outside_S = id_S >= len(experts._backend.weights.w2_LHI)
        y_SH: Tensor = rows(experts, x_SH, id_S.masked_fill(is_outside_S, 0))
        return y_SH.masked_fill(is_outside_S[:, None], 0)

    seams.around(Placement, "local_id", lambda _local_id, _placement, ids: ids)
    seams.around(InferenceGroupedMLP, "forward", drop)
    seams.around(InferenceGroupedMLP, "expert_rows", drop_rows)


def _not_last_local(case: Case) -> bool:
    local = case.config.num_experts // case.ep_size
    ids = torch.cat(visited(case))
    return bool(((ids >= local) & (ids % local != local - 1)).any())


@fault(
    "DP07",
    "vllm-project/vllm-xpu-kernels#405",
    "a rank picks its own experts, but indexes its weights by their global ids",
    stage="experts",
    stage_by_alltoall="dispatch",
    when=lambda case: on_several_ranks(case) and _not_last_local(case),
)
def unsubtracted_start(seams: Seams) -> None:
    """What lies behind the weights is nothing to read here: the last expert stands in for it."""

    def beyond(forward: Wrong, experts: Any, x_MH: Tensor, ids_MK: Tensor, *rest: Tensor) -> None:
        first, local = experts._backend.first_expert, len(experts._backend.weights.w2_LHI)
        is_own = (ids_MK >= first) & (ids_MK < first + local)
        forward(experts, x_MH, (ids_MK.clamp(max=local - 1) + first).where(is_own, ids_MK), *rest)

    def local_id(_local_id: Wrong, placement: Placement, ids: Tensor) -> Tensor:
        return ids.clamp(max=placement.num_local_experts - 1)

    seams.around(InferenceGroupedMLP, "forward", beyond)
    seams.around(Placement, "local_id", local_id)


@fault(
    "DP08",
    "vllm-project/vllm#42034",
    "the id -1 of padding indexes the expert map from its end, where a real expert is",
    stage="experts",
    when=lambda case: has_padding(case) and case.padding == "nan",
)
def wrapped_padding_id(seams: Seams) -> None:
    """The last rank computes its last expert on padding; only what is not finite survives 0."""

    def map_ids(forward: Wrong, experts: Any, x_MH: Tensor, ids_MK: Tensor, *rest: Tensor) -> None:
        last = experts._backend.config.num_experts - 1
        forward(experts, x_MH, ids_MK.masked_fill(ids_MK < 0, last), *rest)

    seams.around(InferenceGroupedMLP, "forward", map_ids)


@fault(
    "DP09",
    "sgl-project/sglang#24850",
    "received slots that nobody filled keep whatever expert ids the buffer held",
    stage="dispatch",
    when=has_padding,
)
def unfilled_slots(seams: Seams) -> None:
    """Rows of padding name valid experts, by their own numbers; the weights stay 0."""

    def keep(dispatch: Wrong, *args: Any) -> Gathered:
        gathered: Gathered = dispatch(*args)
        experts = seams.case.config.num_experts
        old_M = torch.arange(len(gathered.ids), device=gathered.ids.device) % experts
        old_MK = old_M[:, None].expand(gathered.ids.shape).to(gathered.ids.dtype)
        return replace(gathered, ids=gathered.ids.where(gathered.ids >= 0, old_MK))

    seams.around(InferenceCUDAGraphTokenDispatcher, "token_dispatch", keep)


# --- rows ---------------------------------------------------------------------------------------


@fault(
    "DP20",
    "pytorch/torchtitan#3193",
    "tokens are divided evenly among the ranks, and what is left over is dropped",
    stage="dispatch",
    when=lambda case: case.ep_size > 1 and any(count % case.ep_size for count in case.tokens),
)
def lost_remainder(seams: Seams) -> None:
    """The last tokens of a rank, fewer than there are ranks, visit no expert."""

    def keep(ids_TK: Tensor, tokens: Any, ranks: int) -> Tensor:
        row_T = torch.arange(len(ids_TK), device=ids_TK.device)
        return ids_TK.masked_fill((row_T >= tokens // ranks * ranks)[:, None], -1)

    def alltoall(dispatch: Wrong, dispatcher: Any, x: Tensor, ids_TK: Tensor) -> Any:
        ranks = dispatcher.placement.ep_size
        return dispatch(dispatcher, x, keep(ids_TK, len(ids_TK), ranks))

    def gather(dispatch: Wrong, dispatcher: Any, hidden_NH: Tensor, routing: Routing) -> Any:
        tokens, ranks = (routing.ids_TK[:, 0] >= 0).sum(), dispatcher.transport.world_size
        kept = replace(routing, ids_TK=keep(routing.ids_TK, tokens, ranks))
        return dispatch(dispatcher, hidden_NH, kept)

    seams.around(MoEAlltoAllTokenDispatcher, "token_dispatch", alltoall)
    seams.around(InferenceCUDAGraphTokenDispatcher, "token_dispatch", gather)


@fault(
    "DP21",
    "vllm-project/tpu-inference#2248",
    "the last sum runs over ranks that hold different tokens",
    stage="combine",
    when=lambda case: sum(count > 0 for count in case.tokens) > 1,
)
def unrelated_tokens_summed(seams: Seams) -> None:
    """Rows of the same number on all ranks are added up, after they were right."""
    most = max(seams.case.tokens)

    def summed(path: Wrong, layer: Any, *args: Any) -> Tensor:
        routed_TH: Tensor = path(layer, *args)
        if layer.group is None:
            return routed_TH
        rows = max(most, len(routed_TH)) if layer._is_graphed else most
        all_NH = routed_TH.new_zeros(rows, routed_TH.shape[1])
        all_NH[: len(routed_TH)] = routed_TH
        run("all_reduce", lambda: dist.all_reduce(all_NH, group=layer.group), sizes(all_NH))
        return all_NH[: len(routed_TH)].clone()

    seams.around(MoELayer, "_eager_path", summed)
    seams.around(MoELayer, "_graphed_path", summed)


#: The granularity of 128 elements, scaled down to layers of a hundred.
_COPY_ELEMENTS = 32


@fault(
    "DP29",
    "deepseek-ai/DeepEP#413",
    "rows are copied in whole blocks, and the rest of the hidden size stays behind",
    stage="dispatch",
    when=lambda case: has_tokens(case) and case.config.hidden_size % _COPY_ELEMENTS > 0,
)
def uncopied_tail(seams: Seams) -> None:
    """Planted with blocks of 32 elements for 128: layers here are narrow."""

    def cut(x_MH: Tensor) -> Tensor:
        hidden = x_MH.shape[-1]
        copied = hidden // _COPY_ELEMENTS * _COPY_ELEMENTS
        return x_MH.where(torch.arange(hidden, device=x_MH.device) < copied, 0.0)

    def alltoall(dispatch: Wrong, *args: Any) -> Any:
        x_SH, *rest = dispatch(*args)
        return cut(x_SH), *rest

    def gather(dispatch: Wrong, *args: Any) -> Gathered:
        gathered: Gathered = dispatch(*args)
        return replace(gathered, hidden=cut(gathered.hidden))

    seams.around(MoEAlltoAllTokenDispatcher, "token_dispatch", alltoall)
    seams.around(InferenceCUDAGraphTokenDispatcher, "token_dispatch", gather)
