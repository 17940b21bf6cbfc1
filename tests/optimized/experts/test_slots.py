"""The slot plan against a plain sort, and the bound on the number of tiles.

Legend: M rows, K experts per row, S slots, L local experts.
"""

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from twinmoe.optimized.experts.slots import most_tiles, plan_slots


@st.composite
def routing_maps(draw: st.DrawFn) -> tuple[list[list[int]], int, int]:
    """Draw a map with padding and foreign experts, the first local expert, and their number."""
    num_experts, experts_per_row = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    ids = st.lists(
        st.integers(-1, num_experts - 1), min_size=experts_per_row, max_size=experts_per_row
    )
    rows = draw(st.lists(ids, min_size=1, max_size=40))
    first = draw(st.integers(0, num_experts - 1))
    return rows, first, draw(st.integers(1, num_experts - first))


@given(routing_maps())
@example(([[0]] * 300, 0, 1))
@example(([[-1, -1]], 0, 3))
def test_plan_is_a_stable_sort_of_the_local_slots(case):
    """Slots, their positions, the running counts and the tiles all tell the same story."""
    rows, first, num_local = case
    ids_MK = torch.tensor(rows, dtype=torch.int32)
    plan = plan_slots(ids_MK, first, num_local)
    ids = ids_MK.flatten().tolist()
    owned = range(first, first + num_local)
    expected = sorted((s for s in range(len(ids)) if ids[s] in owned), key=lambda s: (ids[s], s))
    assert plan.slots_S.tolist() == expected + [0] * (len(ids) - len(expected))
    assert plan.positions_S[expected].tolist() == list(range(len(expected)))
    counts = [ids.count(expert) for expert in owned]
    assert plan.ends_L.tolist() == torch.tensor(counts).cumsum(0).tolist()
    tiles = [
        (expert, sum(counts[:expert]) + start)
        for expert in range(num_local)
        for start in range(0, counts[expert], plan.block_m)
    ]
    filled = [expert for expert in plan.tile_expert_X.tolist() if expert < num_local]
    assert list(zip(filled, plan.tile_first_X.tolist(), strict=False)) == tiles


@given(st.lists(st.integers(0, 70), min_size=1, max_size=12), st.sampled_from((1, 16, 64)))
@example([17] * 4, 16)
def test_no_routing_fills_more_tiles_than_the_grid_has(counts, tile_rows):
    """Whatever the counts per expert, the fixed grid covers their tiles."""
    needed = sum(-(-count // tile_rows) for count in counts)
    assert needed <= most_tiles(sum(counts), len(counts), tile_rows)
