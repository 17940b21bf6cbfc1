"""Lanes and layouts: pure functions of shapes that every rank must compute alike."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twinmoe.optimized.communication.packing import (
    ALIGNMENT,
    LaunchShape,
    PackedTensor,
    as_words,
    lane_bytes,
    pack,
)
from twinmoe.optimized.communication.pool import GUARD_BYTES, Capacity


@pytest.mark.parametrize(
    ("num_bytes", "width"), [(0, 16), (32, 16), (24, 8), (4, 4), (12, 4), (6, 2), (7, 1)]
)
def test_a_lane_is_as_wide_as_the_slice_allows(num_bytes, width):
    """Slices lie end to end, so only a divisor of their length keeps every rank's lanes aligned."""
    assert lane_bytes(num_bytes) == width


@given(st.lists(st.integers(0, 500), min_size=1, max_size=5), st.integers(1, 9))
def test_packed_tensors_are_aligned_and_disjoint(slice_bytes, world_size):
    """Tensors start on 16 bytes, do not overlap, and the total covers the last of them."""
    packed, total = pack(slice_bytes, world_size)
    end = 0
    for slot, num_bytes in zip(packed, slice_bytes, strict=True):
        assert slot.offset % ALIGNMENT == 0
        assert slot.offset >= end
        assert slot.num_lanes * slot.lane_bytes == num_bytes
        assert slot.words_per_lane * slot.word_dtype.itemsize == slot.lane_bytes
        end = slot.offset + num_bytes * world_size
    assert end <= total


@pytest.mark.parametrize("start", range(5))
def test_words_of_an_offset_view_carry_its_bits(start):
    """A view that starts off a lane boundary is copied; one that starts on it is not."""
    tensor = torch.arange(64, dtype=torch.bfloat16)[start : start + 16]
    words = as_words(tensor, PackedTensor(0, 32))
    assert torch.equal(words.view(torch.bfloat16), tensor)
    assert words.data_ptr() % 16 == 0
    assert (words.data_ptr() == tensor.data_ptr()) == (start == 0)


def test_a_moe_layer_fits_the_capacity_computed_for_it():
    """Ids, weights and rows of all ranks fit the gather region, partial sums the other."""
    capacity = Capacity.for_moe(
        tokens_per_rank=3, hidden_size=5, num_experts_per_tok=1, world_size=3, dtype=torch.bfloat16
    )
    assert capacity == Capacity(48 + 48 + 96, 192)
    regions_end = capacity.reduce_scatter_offset + capacity.reduce_scatter_bytes
    assert capacity.all_gather_offset >= GUARD_BYTES
    assert capacity.reduce_scatter_offset >= (
        capacity.all_gather_offset + capacity.all_gather_bytes + GUARD_BYTES
    )
    assert capacity.total_bytes >= regions_end + GUARD_BYTES
    assert capacity.union(Capacity(10, 500)) == Capacity(192, 500)


@given(st.integers(0, 10**6), st.sampled_from((4, 8, 16)), st.integers(1, 8))
def test_a_launch_is_sized_by_its_lanes_alone(num_lanes, num_warps, lanes_per_thread):
    """No more CTAs than signal pads, whole threads in a block, and all lanes within reach."""
    shape = LaunchShape.choose(num_lanes, 56, num_warps, lanes_per_thread)
    block = shape.block_lanes(num_lanes)
    assert 8 <= shape.num_ctas <= 56
    assert shape.bounds[0] == 32 * shape.num_warps <= block <= shape.bounds[1]
    assert block & (block - 1) == 0 or block == shape.bounds[1]
    if num_lanes <= shape.num_ctas * shape.bounds[0]:
        assert shape.num_ctas * block >= num_lanes
