"""The fused all-gather copies bits: on every tier, every shape, every rank."""

import pytest
import torch

from tests.optimized.communication.workers import (
    choose,
    gather_all,
    message_of,
    random_bytes,
    same_bits,
)
from tests.spmd import run_spmd
from twinmoe.optimized.communication import Tier

#: [N, K, H]: empty, odd, lanes of 2 to 16 bytes, one tensor of three without elements.
SHAPES = [(0, 1, 8), (1, 1, 7), (3, 6, 33), (7, 8, 64), (2, 0, 512)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_gathers_exactly_what_a_concatenation_gives(world_size, tmp_path):
    """Ids, weights and rows arrive bit for bit, NaN payloads included, in rank order."""
    assert run_spmd(gather_all, world_size, tmp_path, SHAPES) == [[]] * world_size


def test_several_ctas_share_the_work(tmp_path):
    """Blocks are dealt to CTAs in a grid-stride loop; a CTA without a block still meets peers."""
    assert run_spmd(gather_all, 2, tmp_path, [(40, 1, 125), (1, 1, 4)], 3, 64) == [[]] * 2


def _gather_dtypes(rank, group):
    transport = choose(group, Tier.P2P)
    wrong = []
    for dtype in (torch.int64, torch.float64, torch.float16, torch.uint8, torch.float8_e4m3fn):
        (result,) = transport.all_gather([random_bytes(rank, (3, 5), dtype)])
        expected = torch.cat([random_bytes(r, (3, 5), dtype) for r in range(group.size())])
        if not same_bits(result, expected):
            wrong.append(dtype)
    (flags,) = transport.all_gather([torch.tensor([True, False, rank == 1])])
    return wrong, flags.tolist()


def test_any_dtype_travels_as_bytes(tmp_path):
    """The gather knows widths, not types."""
    for wrong, flags in run_spmd(_gather_dtypes, 2, tmp_path):
        assert wrong == []
        assert flags == [True, False, False, True, False, True]


def _gather_offset_views(rank, group):
    wrong = []
    for tier in Tier:
        transport = choose(group, tier)
        # Every rank's view starts elsewhere: pointers differ, lanes and addresses may not.
        storages = [random_bytes(r, (200,), torch.bfloat16) for r in range(group.size())]
        views = [s[r + 1 : r + 1 + 64].view(2, 32) for r, s in enumerate(storages)]
        (result,) = transport.all_gather([views[rank]])
        if not same_bits(result, torch.cat(views)):
            wrong.append(tier)
    return wrong


def test_a_view_at_an_odd_offset_is_gathered_right(tmp_path):
    """A source that is not aligned to its lanes, by another offset on each rank, loses nothing."""
    assert run_spmd(_gather_offset_views, 2, tmp_path) == [[], []]


@pytest.mark.parametrize("tier", list(Tier))
def test_inputs_that_cannot_be_moved_as_bytes_are_refused(tier):
    """Strided tensors, scalars and mixed row counts raise, and say what to do."""
    transport = choose(None, tier)
    strided = message_of(lambda: transport.all_gather([torch.zeros(4, 6).t()]))
    assert strided.startswith("ValueError")
    assert "has strides [1, 6]" in strided
    assert ".contiguous()" in strided
    assert "share" in message_of(lambda: transport.all_gather([torch.zeros(2), torch.zeros(3)]))
    assert "share" in message_of(lambda: transport.all_gather([torch.tensor(1.0)]))
    meta = torch.zeros(2, device="meta")
    assert "is on meta" in message_of(lambda: transport.all_gather([meta]))


def test_gathering_a_gathered_view_is_refused():
    """Its bytes lie where peers are about to write."""
    transport = choose(None, Tier.P2P)
    (view,) = transport.all_gather([torch.zeros(4)])
    assert "pass a clone" in message_of(lambda: transport.all_gather([view[1:]]))


def test_a_single_rank_needs_no_group():
    """Every tier works without torch.distributed, and returns what went in."""
    rows = torch.randn(3, 5)
    for tier in Tier:
        (result,) = choose(None, tier).all_gather([rows])
        assert torch.equal(result, rows)
