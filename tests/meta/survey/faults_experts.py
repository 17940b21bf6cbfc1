"""Faults of expert computation, from public reports of 2025 and 2026.

Legend: M rows, K experts per row, S slots, H hidden_size, I intermediate size, L local experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.meta.survey.planting import planted
from twinmoe.optimized.experts import InferenceGroupedMLP, backend
from twinmoe.optimized.experts.slots import SlotPlan
from twinmoe.oracle.faults.seams import Seams, Wrong
from twinmoe.oracle.faults.triggers import (
    gathers,
    has_tokens,
    in_graph,
    is_gated,
    runs_twice,
)
from twinmoe.reference.config import MoEConfig

# --- layouts ----------------------------------------------------------------------------------


def _weights(seams: Seams, change: Callable[[MoEConfig, Any], Any]) -> None:
    """Let the experts be built on what ``change`` makes of (config, weights)."""

    def construct(build: Wrong, experts: object, config: Any, weights: Any, *args: Any) -> None:
        build(experts, config, change(config, weights), *args)

    seams.around(InferenceGroupedMLP, "__init__", construct)


@planted(
    "linkedin/Liger-Kernel#1377",
    "experts",
    when=lambda case: is_gated(case) and case.config.num_experts > case.ep_size,
)
def experts_side_by_side(seams: Seams) -> None:
    """Gate is a view of [gate | up], and addressed as if gates lay side by side."""

    def change(config: MoEConfig, weights: Any) -> Any:
        if not config.gated:
            return weights
        w13, size = weights.w13_LFH, config.moe_intermediate_size
        gate = w13.as_strided(
            (len(w13), size, w13.shape[2]), (size * w13.shape[2], w13.shape[2], 1)
        )
        return replace(weights, w13_LFH=torch.cat([gate, w13[:, size:]], dim=1))

    _weights(seams, change)


def _transposed_where_square(seams: Seams, name: str) -> None:
    """Let matrices that are square be read as if they lay the other way round."""

    def change(_config: MoEConfig, weights: Any) -> Any:
        matrices = getattr(weights, name)
        if matrices.shape[1] != matrices.shape[2]:
            return weights
        return replace(weights, **{name: matrices.transpose(1, 2).contiguous()})

    _weights(seams, change)


@planted(
    "huggingface/transformers#47031",
    "experts",
    when=lambda c: has_tokens(c) and c.config.hidden_size == c.config.moe_intermediate_size,
)
def square_down_transposed(seams: Seams) -> None:
    """A layout guessed from shapes takes a square down projection for transposed."""
    _transposed_where_square(seams, "w2_LHI")


@planted(
    "unslothai/unsloth-zoo#849",
    "experts",
    when=lambda c: has_tokens(c) and c.config.hidden_size == c.config.w13_rows,
)
def square_gate_up_transposed(seams: Seams) -> None:
    """A layout guessed from shapes takes square gate and up rows for transposed."""
    _transposed_where_square(seams, "w13_LFH")


# --- which rows an expert computes --------------------------------------------------------------


def _plans(seams: Seams, change: Callable[[SlotPlan], SlotPlan]) -> None:
    seams.around(backend, "plan_slots", lambda original, *args: change(original(*args)))


@planted("sgl-project/sgl-kernel-npu#221", "experts", when=has_tokens)
def counts_for_ends(seams: Seams) -> None:
    """Counts of the experts are taken for the ends of their segments."""

    def change(plan: SlotPlan) -> SlotPlan:
        counts_L = plan.ends_L.diff(prepend=plan.ends_L.new_zeros(1))
        return replace(plan, ends_L=torch.minimum(counts_L.cummax(0).values, plan.ends_L))

    _plans(seams, change)


@planted("torch-spyre/torch-spyre#2084", "experts", when=runs_twice)
def offsets_of_the_first_call(seams: Seams) -> None:
    """What is compiled for a number of slots keeps the plan of its first call."""
    compiled: dict[object, SlotPlan] = {}

    def plan_slots(original: Wrong, ids_MK: Tensor, *args: Any) -> SlotPlan:
        plan: SlotPlan = original(ids_MK, *args)
        kept = compiled.setdefault((tuple(ids_MK.shape), args), plan)
        return plan if kept is plan else _copied(kept)

    def _copied(plan: SlotPlan) -> SlotPlan:
        return replace(plan, slots_S=plan.slots_S.clone(), ends_L=plan.ends_L.clone())

    seams.around(backend, "plan_slots", plan_slots)


@planted("NVIDIA/TensorRT-LLM#7495", "experts", when=runs_twice)
def first_count_baked_in(seams: Seams) -> None:
    """The number of rows is a constant of the kernel: those beyond the first call's are masked."""
    first: list[int] = []

    def forward(
        original: Wrong, experts: Any, x: Tensor, ids: Tensor, w: Tensor, out: Tensor
    ) -> None:
        first.append(len(ids))
        row_M = torch.arange(len(ids), device=ids.device)
        original(experts, x, ids.where((row_M < first[0])[:, None], -1), w, out)

    def rows(original: Wrong, experts: Any, x_SH: Tensor, local_S: Tensor) -> Tensor:
        y_SH: Tensor = original(experts, x_SH, local_S)
        first.append(len(x_SH))
        row_S = torch.arange(len(x_SH), device=x_SH.device)
        return y_SH.where((row_S < first[0])[:, None], 0.0)

    seams.around(InferenceGroupedMLP, "forward", forward)
    seams.around(InferenceGroupedMLP, "expert_rows", rows)


#: Rows of a chunk, scaled down from tens of thousands.
_CHUNK = 64


@planted(
    "vllm-project/vllm#20392",
    "experts",
    when=lambda case: in_graph(case) and sum(case.tokens) > _CHUNK // 2,
)
def counts_of_the_whole_batch(seams: Seams) -> None:
    """Chunks of rows are computed by the counts of the whole batch: later ones by the first's."""

    def forward(
        original: Wrong, experts: Any, x: Tensor, ids: Tensor, w: Tensor, out: Tensor
    ) -> None:
        chunked = ids.clone()
        for start in range(_CHUNK, len(ids), _CHUNK):
            part = ids[start : start + _CHUNK]
            chunked[start : start + _CHUNK] = ids[: len(part)]
        original(experts, x, chunked, w, out)

    seams.around(InferenceGroupedMLP, "forward", forward)


@planted("NVIDIA/Megatron-LM#5231", "experts", when=gathers)
def count_of_the_first_token(seams: Seams) -> None:
    """Every row is believed to have as many experts on this rank as the first one."""

    def forward(original: Wrong, experts: Any, x: Tensor, ids: Tensor, *rest: Tensor) -> None:
        own = ids - experts._backend.first_expert
        is_own = (ids >= 0) & (own >= 0) & (own < len(experts._backend.weights.w2_LHI))
        is_early = is_own.int().cumsum(1) <= is_own[:1].sum()
        original(experts, x, ids.where(~is_own | is_early, -1).contiguous(), *rest)

    seams.around(InferenceGroupedMLP, "forward", forward)


@planted("marin-community/marin#4016", "experts", when=in_graph)
def capacity_factor(seams: Seams) -> None:
    """Experts have room for a quarter more than their even share, at least 8 slots."""

    def forward(original: Wrong, experts: Any, x: Tensor, ids: Tensor, *rest: Tensor) -> None:
        total = seams.case.config.num_experts
        room = max(8, -(-ids.numel() * 5 // (4 * total)))
        hot = (ids.flatten()[:, None] == torch.arange(total, device=ids.device)).int()
        place = ((hot.cumsum(0) - 1) * hot).sum(1).view_as(ids)
        original(experts, x, ids.where(place < room, -1).contiguous(), *rest)

    seams.around(InferenceGroupedMLP, "forward", forward)


@planted("vllm-project/vllm-xpu-kernels#102", "experts", when=in_graph)
def narrow_weights(seams: Seams) -> None:
    """Router weights reach the experts in the model's dtype."""

    def forward(
        original: Wrong, experts: Any, x: Tensor, ids: Tensor, w: Tensor, out: Tensor
    ) -> None:
        original(experts, x, ids, w.to(x.dtype).float(), out)

    seams.around(InferenceGroupedMLP, "forward", forward)
