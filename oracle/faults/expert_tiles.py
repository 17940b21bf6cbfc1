"""Faults of tiles and of index ranges: what a kernel does only at certain sizes.

Legend: S slots at sorted positions, H hidden_size, I intermediate size, F rows of w13,
L local experts, D columns of a tile's overhang.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from twinmoe.optimized.experts import InferenceGroupedMLP, fused, grouped_mm
from twinmoe.optimized.experts.fused import TritonBackend
from twinmoe.optimized.experts.fused_kernels import expert_down, expert_gate_up
from twinmoe.optimized.experts.grouped_mm import GroupedMMBackend
from twinmoe.optimized.experts.slots import rows_per_tile
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults.fault import fault
from twinmoe.oracle.faults.seams import Seams, Wrong
from twinmoe.oracle.faults.triggers import bucket_of, has_tokens, in_graph, runs_triton
from twinmoe.oracle.faults.visits import visits

#: Where an index wraps: 2**31 in the field, scaled down to these sizes.
INDEX_RANGE = 2**12

#: Most row tiles of a grid: 65535 in the field.
TILE_LIMIT = 2

#: Columns that a tile is wide.
TILE_COLUMNS = 16


def _slots_LR(case: Case) -> Tensor:
    """Slots of each local expert (row) on each rank (column)."""
    return visits(case).view(case.ep_size, -1).T


def _planned(case: Case) -> Tensor:
    """Slots [R] that each rank's plan has room for."""
    if in_graph(case):
        slots = case.ep_size * bucket_of(case) * case.config.num_experts_per_tok
        return torch.full((case.ep_size,), slots)
    return _slots_LR(case).sum(0)


def _tile_rows(case: Case) -> Tensor:
    """Rows [R] of each rank's row tiles."""
    local = case.config.num_experts // case.ep_size
    return torch.tensor([rows_per_tile(int(slots), local) for slots in _planned(case)])


# --- index ranges -----------------------------------------------------------------------------


@fault(
    "EX06",
    "sgl-project/sglang#4727",
    "the offset of an output row wraps round in a narrow integer",
    stage="experts",
    when=lambda case: (
        has_tokens(case)
        and bool((_slots_LR(case).sum(0) * case.config.hidden_size > INDEX_RANGE).any())
    ),
)
def wrapped_row_offset(seams: Seams) -> None:
    """Rows beyond the range are read from low memory; 2**31 elements are here 2**12."""

    def wrap(rows: Wrong, *args: Any) -> Tensor:
        y_SH: Tensor = rows(*args)
        index = torch.arange(y_SH.numel(), device=y_SH.device) % INDEX_RANGE
        return y_SH.flatten()[index].view_as(y_SH)

    for backend in (GroupedMMBackend, TritonBackend):
        seams.around(backend, "sorted_rows", wrap)


def _far_expert(case: Case) -> bool:
    """Some slot visits an expert whose first matrix lies beyond the range."""
    if not has_tokens(case):
        return False
    slots_LR = _slots_LR(case)
    size = case.config.w13_rows * case.config.hidden_size
    return bool((slots_LR[torch.arange(len(slots_LR)) * size >= INDEX_RANGE] > 0).any())


@fault(
    "EX08",
    "linkedin/Liger-Kernel#1296",
    "the offset of an expert's weights wraps round in a narrow integer",
    stage="experts",
    when=_far_expert,
)
def wrapped_expert_offset(seams: Seams) -> None:
    """High experts read low memory; 2**31 elements are here 2**12."""

    def construct(build: Wrong, experts: object, config: Any, weights: Any, *args: Any) -> None:
        w13_LFH = weights.w13_LFH
        inside = torch.arange(w13_LFH[0].numel())
        start_L = torch.arange(len(w13_LFH)) * len(inside) % INDEX_RANGE
        wrapped = w13_LFH.flatten()[(start_L[:, None] + inside).to(w13_LFH.device)]
        build(experts, config, replace(weights, w13_LFH=wrapped.view_as(w13_LFH)), *args)

    seams.around(InferenceGroupedMLP, "__init__", construct)


# --- tiles ------------------------------------------------------------------------------------


def _has_overhang(case: Case) -> bool:
    """Tiles overhang the intermediate size, and some rank computes two slots or more."""
    overhang = case.config.moe_intermediate_size % TILE_COLUMNS
    return runs_triton(case) and overhang > 0 and bool((_slots_LR(case).sum(0) > 1).any())


@fault(
    "EX09",
    "huggingface/kernels-community#1159",
    "a tile that overhangs the summed dimension multiplies the next token into this one",
    stage="experts",
    when=_has_overhang,
)
def unmasked_overhang(seams: Seams) -> None:
    """Only rows are bounded: past a row's end lies the next row, in h as in the weights."""

    def overhang(launch: Wrong, kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
        launch(kernel, grid, *args, **constants)
        if kernel is not expert_down:
            return
        h_SI, ends_L, _, _, w2_LHI, y_SH = args
        columns = -h_SI.shape[1] % TILE_COLUMNS
        position_S = torch.arange(len(h_SI), dtype=ends_L.dtype, device=ends_L.device)
        expert_S = torch.searchsorted(ends_L, position_S, right=True).clamp(max=len(ends_L) - 1)
        next_SD = h_SI.roll(-1, 0)[:, :columns].float()
        next_SD = next_SD.where((position_S + 1 < ends_L[-1])[:, None], 0.0)
        next_LHD = w2_LHI.flatten(0, 1).roll(-1, 0)[:, :columns].view(*w2_LHI.shape[:2], -1)
        y_SH += torch.einsum("sd,shd->sh", next_SD, next_LHD.float()[expert_S])

    seams.around(fused, "launch", overhang)


@fault(
    "EX13",
    "deepseek-ai/DeepGEMM#268",
    "the template for few rows bounds its tiles at half their height",
    stage="experts",
    when=lambda case: (
        runs_triton(case)
        and bool(((_slots_LR(case) > _tile_rows(case) // 2) & (_tile_rows(case) < 64)).any())
    ),
)
def half_tile(seams: Seams) -> None:
    """Below 64 rows the second half of a tile is not computed: its rows stay 0."""

    def halved(launch: Wrong, kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
        if constants["BLOCK_M"] < 64:
            args[-1].zero_()
            constants["BLOCK_M"] //= 2
        launch(kernel, grid, *args, **constants)

    seams.around(fused, "launch", halved)


@fault(
    "EX17",
    "flashinfer-ai/flashinfer#3227, flashinfer-ai/flashinfer#3197",
    "one of the tuned configurations, chosen at certain sizes, sums only half of the depth",
    stage="experts",
    when=lambda case: (
        runs_triton(case) and bool(((_tile_rows(case) == 32) & (_slots_LR(case).sum(0) > 0)).any())
    ),
)
def half_depth(seams: Seams) -> None:
    """With tiles of 32 rows, and no others, the first GEMM ends in the middle of H."""

    def shortened(
        launch: Wrong, kernel: Any, grid: Any, x: Tensor, *args: Any, **constants: Any
    ) -> None:
        if kernel is expert_gate_up and constants["BLOCK_M"] == 32:
            is_second_half = torch.arange(x.shape[1], device=x.device) >= x.shape[1] // 2
            x = x.masked_fill(is_second_half, 0.0)
        launch(kernel, grid, x, *args, **constants)

    seams.around(fused, "launch", shortened)


def _tiles(case: Case) -> int:
    """Row tiles of the rank that fills most."""
    rows_R = _tile_rows(case)
    return int(((_slots_LR(case) + rows_R - 1) // rows_R).sum(0).max())


@fault(
    "EX20",
    "vllm-project/vllm#43599",
    "a grid holds so many row tiles and no more: the rows behind them are not computed",
    stage="experts",
    when=lambda case: runs_triton(case) and _tiles(case) > TILE_LIMIT,
)
def grid_limit(seams: Seams) -> None:
    """The last tiles' rows stay 0; 65535 tiles are here 2."""

    def capped(launch: Wrong, kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
        args[-1].zero_()
        launch(kernel, (min(grid[0], TILE_LIMIT), *grid[1:]), *args, **constants)

    seams.around(fused, "launch", capped)


# --- workspaces -------------------------------------------------------------------------------


def _overlap(h_SI: Tensor, ends_L: Tensor, hidden: int) -> Tensor:
    """What h holds when elements from S * H on are written over its first ones."""
    room = len(h_SI) * hidden
    if room >= h_SI.numel():
        return h_SI
    flat = h_SI.flatten()
    surplus = min(room, flat.numel() - room)
    written = torch.arange(surplus, device=flat.device) + room < ends_L[-1] * h_SI.shape[1]
    first = flat[room : room + surplus].where(written, flat[:surplus])
    return torch.cat([first, flat[surplus:]]).view_as(h_SI)


def _overflows(case: Case) -> bool:
    """Some rank writes more of h than a buffer of the output's size holds."""
    if not has_tokens(case):
        return False
    config = case.config
    written_R = _slots_LR(case).sum(0) * config.moe_intermediate_size
    return bool((written_R > _planned(case) * config.hidden_size).any())


@fault(
    "EX22",
    "vllm-project/vllm#31528",
    "two workspaces have exchanged sizes, so the end of h is written over its beginning",
    stage="experts",
    when=_overflows,
)
def exchanged_workspaces(seams: Seams) -> None:
    """H [S, I] lives in the room of y [S, H], which is too small where I > H."""

    def in_launch(launch: Wrong, kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
        if kernel is expert_down:
            h_SI, ends_L, *rest = args
            args = (_overlap(h_SI, ends_L, rest[-1].shape[1]), ends_L, *rest)
        launch(kernel, grid, *args, **constants)

    def in_activate(activate: Wrong, config: Any, gate_up_SF: Tensor, num_rows: Tensor) -> Tensor:
        return _overlap(activate(config, gate_up_SF, num_rows), num_rows, config.hidden_size)

    seams.around(fused, "launch", in_launch)
    seams.around(grouped_mm, "activate", in_activate)
