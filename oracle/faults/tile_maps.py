"""Faults of a map from tiles to experts that outlives its batch: state that depends on routing.

Legend: M rows, H hidden_size, K experts per row, S slots, L local experts, X row tiles.
"""

from typing import Any

from torch import Tensor

from twinmoe.optimized.experts.fused import TritonBackend
from twinmoe.optimized.experts.slots import SlotPlan, rows_per_tile
from twinmoe.optimized.launch import run
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults.fault import fault
from twinmoe.oracle.faults.lives import moments
from twinmoe.oracle.faults.seams import Seams, Wrong
from twinmoe.oracle.faults.triggers import lives_through, runs_triton
from twinmoe.oracle.faults.visits import visits

#: Local expert and first position of row tiles.
Tiles = list[tuple[int, int]]


def _tiles(counts_L: list[int], block_m: int) -> Tiles:
    """The tiles that a plan fills, in order."""
    starts_L = _starts(counts_L)
    return [
        (expert, first)
        for expert, count in enumerate(counts_L)
        for first in range(starts_L[expert], starts_L[expert] + count, block_m)
    ]


def _starts(counts_L: list[int]) -> list[int]:
    return [sum(counts_L[:expert]) for expert in range(len(counts_L))]


def _runs_old_tiles(case: Case) -> bool:
    """On some rank a batch fills fewer tiles than one before, and a left one hits its rows."""
    # Visits are known of the first weights alone, and a new layer has a new map.
    if not runs_triton(case) or lives_through(case, "nwl"):
        return False
    return any(_hit(case, rank) for rank in range(case.ep_size))


def _hit(case: Case, rank: int) -> bool:
    left: dict[int, Tiles] = {}
    for moment in moments(case):
        counts_L = visits(case, moment.step.number).view(case.ep_size, -1)[rank].tolist()
        planned = case.ep_size * moment.bucket * case.config.num_experts_per_tok
        slots = planned if moment.in_graph else sum(counts_L)
        if slots == 0:
            continue
        tiles = _tiles(counts_L, rows_per_tile(slots, len(counts_L)))
        old, starts_L = left.get(slots, [])[len(tiles) :], _starts(counts_L)
        if any(first < starts_L[expert] for expert, first in old):
            return True
        left[slots] = tiles + old
    return False


@fault(
    "",
    "",
    "the tail of a tile map is not cleared, so tiles of busier batches run again",
    stage="experts",
    when=_runs_old_tiles,
)
def uncleared_tile_map(seams: Seams) -> None:
    """One map for all batches of a size; what a batch leaves empty is as the last one left it."""
    kept: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def rows(
        sorted_rows: Wrong, backend: Any, x_MH: Tensor, weights_MK: Any, plan: SlotPlan
    ) -> Tensor:
        own = plan.tile_expert_X, plan.tile_first_X
        key = id(backend), len(plan.slots_S), len(plan.tile_expert_X)

        def leave_tail() -> None:
            old_expert_X, old_first_X = kept.setdefault(key, (own[0].clone(), own[1].clone()))
            is_empty_X = own[0] >= len(plan.ends_L)
            own[1].copy_(old_first_X.where(is_empty_X, own[1]))
            own[0].copy_(old_expert_X.where(is_empty_X, own[0]))
            old_expert_X.copy_(own[0])
            old_first_X.copy_(own[1])

        run("leave_tail", leave_tail)
        y_SH: Tensor = sorted_rows(backend, x_MH, weights_MK, plan)
        return y_SH

    seams.around(TritonBackend, "sorted_rows", rows)
