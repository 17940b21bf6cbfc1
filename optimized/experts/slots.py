"""Which slot goes to which local expert: the plan that the GEMM backends follow.

A slot is one (row, k) pair of the routing map.  Slots of this rank's experts are
sorted by expert, in slot order within an expert; everything else is left out.  The
sorted positions are cut into row tiles that never straddle two experts.  All of it
stays on the device, in tensors whose sizes depend on shapes alone.

Shapes: M rows, K experts per row, S = M * K slots, L local experts, X row tiles.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from twinmoe.optimized.launch import launch
from twinmoe.optimized.triton_runtime import INTERPRETED, tl, triton

#: Where slots of other ranks' experts and of padding rows sort to: behind every expert.
_ELSEWHERE = tl.constexpr(2**30)

#: Sections of the plan's buffer start at multiples of this many int32, 16 bytes.
_ALIGNMENT = 4


@dataclass(frozen=True)
class SlotPlan:
    """Sorted slots of the local experts; all tensors int32.

    slots_S: the slot at each sorted position; 0 behind the last one.
    positions_S: the sorted position of each slot; 0 for slots that have none.
    ends_L: one past the last position of each expert (the running count).
    tile_expert_X: the local expert of each row tile; at least L in tiles left empty.
    tile_first_X: the first position of each row tile.
    block_m: rows of a tile.
    experts_per_row: K, by which a slot finds its row.
    """

    slots_S: Tensor
    positions_S: Tensor
    ends_L: Tensor
    tile_expert_X: Tensor
    tile_first_X: Tensor
    block_m: int
    experts_per_row: int


def plan_slots(ids_MK: Tensor, first_expert: int, num_local_experts: int) -> SlotPlan:
    """Sort the slots of experts first_expert .. first_expert + num_local_experts - 1."""
    num_slots = ids_MK.numel()
    block_m = rows_per_tile(num_slots, num_local_experts)
    num_tiles = most_tiles(num_slots, num_local_experts, block_m)
    sizes = (num_slots, num_slots, num_local_experts, num_tiles, num_tiles)
    sections = _sections(sizes, ids_MK.device)
    slots_S, positions_S, ends_L, tile_expert_X, tile_first_X = sections
    if num_slots:
        block_l = min(triton.next_power_of_2(num_local_experts), 64) if INTERPRETED else 1
        launch(
            sort_slots,
            (triton.cdiv(num_local_experts, block_l) + (not INTERPRETED),),
            ids_MK,
            *sections,
            num_slots,
            num_tiles,
            first_expert,
            L=num_local_experts,
            TILE_ROWS=block_m,
            BLOCK_S=min(triton.next_power_of_2(num_slots), 4096 if INTERPRETED else 1024),
            BLOCK_L=block_l,
            BLOCK_E=triton.next_power_of_2(num_local_experts),
            BLOCK_X=min(triton.next_power_of_2(num_tiles), 4096 if INTERPRETED else 64),
        )
    return SlotPlan(
        slots_S, positions_S, ends_L, tile_expert_X, tile_first_X, block_m, ids_MK.shape[1]
    )


def rows_per_tile(num_slots: int, num_local_experts: int) -> int:
    """Fit a tile to the slots that an expert gets on average; never to the routing itself.

    Rows of a tile that no slot fills are computed for nothing, on every machine.
    """
    slots_per_expert = triton.cdiv(num_slots, num_local_experts)
    return int(min(max(triton.next_power_of_2(slots_per_expert), 16), 64))


def most_tiles(num_slots: int, num_local_experts: int, tile_rows: int) -> int:
    """Tiles that the worst routing of ``num_slots`` slots fills."""
    busy_experts = min(num_slots, num_local_experts)
    return busy_experts + (num_slots - busy_experts) // tile_rows


def _sections(sizes: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """Cut one int32 buffer into aligned tensors of these sizes; zeroed where no kernel will be."""
    padded = [triton.cdiv(size, _ALIGNMENT) * _ALIGNMENT for size in sizes]
    make = torch.empty if sizes[0] else torch.zeros
    buffer = make(sum(padded), dtype=torch.int32, device=device)
    parts = buffer.split(padded)
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]


@triton.jit
def sort_slots(
    ids_ptr,
    slots_ptr,
    positions_ptr,
    ends_ptr,
    tile_expert_ptr,
    tile_first_ptr,
    num_slots,
    num_tiles,
    first_expert,
    L: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """Place the slots of BLOCK_L experts; the last program writes whatever is not a place."""
    own_L = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    if tl.program_id(0) * BLOCK_L < L:
        before_L = tl.zeros((BLOCK_L,), tl.int32)
        count_L = tl.zeros((BLOCK_L,), tl.int32)
        for base in range(0, num_slots, BLOCK_S):
            expert_S = _local_expert(ids_ptr, base, num_slots, first_expert, L, BLOCK_S)
            before_L += tl.sum((expert_S[:, None] < own_L[None, :]).to(tl.int32), 0)
            count_L += tl.sum((expert_S[:, None] == own_L[None, :]).to(tl.int32), 0)
        tl.store(ends_ptr + own_L, before_L + count_L, mask=own_L < L)

        next_L = before_L
        for base in range(0, num_slots, BLOCK_S):
            expert_S = _local_expert(ids_ptr, base, num_slots, first_expert, L, BLOCK_S)
            mine_SL = (expert_S[:, None] == own_L[None, :]).to(tl.int32)
            rank_SL = tl.cumsum(mine_SL, 0) - 1
            position_S = tl.sum(mine_SL * (next_L[None, :] + rank_SL), 1)
            placed_S = tl.sum(mine_SL, 1) > 0
            slot_S = base + tl.arange(0, BLOCK_S)
            tl.store(positions_ptr + slot_S, position_S, mask=placed_S)
            tl.store(slots_ptr + position_S, slot_S, mask=placed_S)
            next_L += tl.sum(mine_SL, 0)

    if tl.program_id(0) == tl.num_programs(0) - 1:
        count_E = tl.zeros((BLOCK_E,), tl.int32)
        for base in range(0, num_slots, BLOCK_S):
            expert_S = _local_expert(ids_ptr, base, num_slots, first_expert, L, BLOCK_S)
            count_E += tl.histogram(expert_S, BLOCK_E, mask=expert_S < L)
            slot_S = base + tl.arange(0, BLOCK_S)
            is_elsewhere = (expert_S >= L) & (slot_S < num_slots)
            tl.store(positions_ptr + slot_S, 0, mask=is_elsewhere)
        num_placed = tl.sum(count_E)
        for base in range(0, num_slots, BLOCK_S):
            position_S = base + tl.arange(0, BLOCK_S)
            is_behind = (position_S >= num_placed) & (position_S < num_slots)
            tl.store(slots_ptr + position_S, 0, mask=is_behind)
        _store_tiles(
            tile_expert_ptr,
            tile_first_ptr,
            tl.cumsum(count_E, 0) - count_E,
            count_E,
            num_tiles,
            TILE_ROWS,
            BLOCK_E,
            BLOCK_X,
        )


@triton.jit
def _local_expert(ids_ptr, base, num_slots, first_expert, L: tl.constexpr, BLOCK_S: tl.constexpr):
    slot_S = base + tl.arange(0, BLOCK_S)
    id_S = tl.load(ids_ptr + slot_S, mask=slot_S < num_slots, other=-1).to(tl.int32)
    expert_S = id_S - first_expert
    return tl.where((id_S >= 0) & (expert_S >= 0) & (expert_S < L), expert_S, _ELSEWHERE)


@triton.jit
def _store_tiles(
    tile_expert_ptr,
    tile_first_ptr,
    start_E,
    count_E,
    num_tiles,
    TILE_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    tiles_E = (count_E + (TILE_ROWS - 1)) // TILE_ROWS
    tile_end_E = tl.cumsum(tiles_E, 0)
    # An expert's tile x starts at position x * TILE_ROWS, shifted by this much.
    shift_E = start_E - (tile_end_E - tiles_E) * TILE_ROWS
    expert_E = tl.arange(0, BLOCK_E)
    for base in range(0, num_tiles, BLOCK_X):
        tile_X = base + tl.arange(0, BLOCK_X)
        expert_X = tl.sum((tile_X[:, None] >= tile_end_E[None, :]).to(tl.int32), 1)
        is_mine_XE = expert_X[:, None] == expert_E[None, :]
        shift_X = tl.sum(tl.where(is_mine_XE, shift_E[None, :], 0), 1)
        tl.store(tile_expert_ptr + tile_X, expert_X, mask=tile_X < num_tiles)
        tl.store(tile_first_ptr + tile_X, tile_X * TILE_ROWS + shift_X, mask=tile_X < num_tiles)
