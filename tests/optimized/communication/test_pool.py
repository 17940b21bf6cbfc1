"""Pools: shared, disjoint, guarded, grown together or not at all, and gone without a trace."""

import gc
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.optimized.communication.workers import choose, message_of, partials, token_inputs
from tests.spmd import run_spmd
from twinmoe.optimized import launch
from twinmoe.optimized.communication import Capacity, Tier, pool_setup, release_pools
from twinmoe.optimized.communication.cpu_symmetric_memory import CpuSymmetricAllocation


def _segments():
    return sorted(str(path) for path in Path("/dev/shm").glob(f"twinmoe-{os.getpid()}-*"))


def _fill_pool_to_the_brim(rank, group, tier):
    n, k, h, world = 3, 1, 33, group.size()
    capacity = Capacity.for_moe(
        tokens_per_rank=n,
        hidden_size=h,
        num_experts_per_tok=k,
        world_size=world,
        dtype=torch.bfloat16,
    )
    transport = choose(group, tier, capacity=capacity)
    buffer = transport._pool.memory.buffer
    buffer.fill_(0xA5)
    dist.barrier(group=group)
    transport.all_gather(token_inputs(rank, n, k, h))
    partial = transport.partial_buffer(n * world, h, torch.float32)
    transport.reduce_scatter(partial.copy_(partials(0, rank, n * world, h, torch.float32)))
    dist.barrier(group=group)
    used = torch.zeros(len(buffer), dtype=torch.bool)
    start = capacity.all_gather_offset
    for num_bytes in (4 * n * k * world, 4 * n * k * world, 2 * n * h * world):
        used[start : start + num_bytes] = True
        start += -(-num_bytes // 16) * 16
    start = capacity.reduce_scatter_offset
    used[start : start + 4 * n * h * world] = True
    return bool((buffer[~used] == 0xA5).all())


@pytest.mark.parametrize("tier", [Tier.NVLS, Tier.P2P])
def test_collectives_write_their_slices_and_nothing_else(tier, tmp_path):
    """Guards, padding between tensors and the space between regions keep their bytes."""
    assert run_spmd(_fill_pool_to_the_brim, 3, tmp_path, tier) == [True] * 3


def _two_pools(rank, group):
    transports = [choose(group, Tier.P2P, pool=name) for name in ("tp", "ep")]
    (tp,) = transports[0].all_gather([torch.full((2, 8), 1.0 + rank)])
    kept = tp.clone()
    (ep,) = transports[1].all_gather([torch.full((2, 8), 5.0 + rank)])
    return torch.equal(tp, kept), ep[:, 0].tolist()


def test_kinds_of_parallelism_do_not_share_memory(tmp_path):
    """Gathering for one leaves the other's rows alone."""
    assert run_spmd(_two_pools, 2, tmp_path) == [(True, [5.0, 5.0, 6.0, 6.0])] * 2


def _two_layers(rank, group):
    small = choose(group, Tier.P2P, capacity=Capacity(512, 256))
    before = small.report().pool_bytes
    stale = small.partial_buffer(2, 8, torch.float32)
    large = choose(group, Tier.P2P, capacity=Capacity(256, 4096))
    sums = []
    for transport, width in ((small, 8), (large, 64), (small, 8)):
        (rows,) = transport.all_gather([torch.full((1, width), rank + 1.0)])
        buffer = transport.partial_buffer(2, width, torch.float32)
        sums.append(transport.reduce_scatter(buffer.copy_(rows))[0, 0].item())
    transport = choose(group, Tier.P2P, capacity=Capacity(16, 16))
    return (
        sums,
        before < small.report().pool_bytes == large.report().pool_bytes,
        transport._pool.memory is large._pool.memory,
        message_of(lambda: small.reduce_scatter(stale)),
    )


def test_layers_of_different_shapes_share_one_pool_that_grows(tmp_path):
    """It serves both needs, both layers work, and views from before the growth are refused."""
    for rank, (sums, grown, reused, stale) in enumerate(run_spmd(_two_layers, 2, tmp_path)):
        assert sums == [2.0 * (rank + 1)] * 3
        assert grown
        assert reused
        assert "does not lie in pool 'ep'" in stale


def test_what_does_not_fit_is_refused_with_the_numbers():
    """Needed and available bytes, and the remedy."""
    transport = choose(None, Tier.P2P, pool="overflow", capacity=Capacity(64, 64))
    gather = message_of(lambda: transport.all_gather([torch.zeros(5, 4)]))
    assert gather.startswith("SymmetricBufferOverflow: all-gather needs 80 bytes")
    assert "has 64" in gather
    assert "larger capacity" in gather
    reduce = message_of(lambda: transport.partial_buffer(5, 4, torch.float32))
    assert reduce.startswith("SymmetricBufferOverflow: reduce-scatter needs 80 bytes")
    release_pools(None)


def _grow_after_capture(rank, group):
    transport = choose(group, Tier.P2P, capacity=Capacity(256, 256))
    launch.record_to(launch.execute)
    during = message_of(lambda: choose(group, Tier.P2P))
    if rank == 0:
        transport.all_gather([torch.zeros(1, 4)])
    launch.record_to(None)
    if rank == 1:
        transport.all_gather([torch.zeros(1, 4)])
    after = message_of(lambda: choose(group, Tier.P2P, capacity=Capacity(512, 256)))
    same = message_of(lambda: choose(group, Tier.P2P, capacity=Capacity(128, 256)))
    release_pools(group)
    renewed = message_of(lambda: choose(group, Tier.P2P, capacity=Capacity(512, 256)))
    return during, after, same, renewed


def test_a_pool_does_not_move_under_a_captured_graph(tmp_path):
    """Even a graph on one rank only forbids the growth to all; what fits, or is released, may."""
    for during, after, same, renewed in run_spmd(_grow_after_capture, 2, tmp_path, timeout=20):
        assert during.startswith("AllocationDuringCapture")
        assert after.startswith("SymmetricBufferOverflow")
        assert "captured graphs hold its addresses" in after
        assert same == renewed == ""


def _release_on_one_rank(rank, group):
    choose(group, Tier.P2P, capacity=Capacity(4096, 256))
    if rank == 1:
        release_pools(group)
    transport = choose(group, Tier.P2P, capacity=Capacity(64, 64))
    buffer = transport.partial_buffer(2, 8, torch.float32)
    return transport.reduce_scatter(buffer.fill_(rank + 1.0))[0, 0].item()


def test_ranks_agree_on_offsets_though_one_released_its_pool(tmp_path):
    """Regions lie where the size says, so a rank that starts afresh takes its peers' size."""
    assert run_spmd(_release_on_one_rank, 2, tmp_path, timeout=20) == [3.0, 3.0]


def test_a_released_pool_is_not_used_again():
    """Its transports raise; selecting again makes a new pool."""
    transport = choose(None, Tier.P2P, pool="released")
    release_pools(None)
    assert "was released" in message_of(lambda: transport.all_gather([torch.zeros(1, 4)]))
    assert message_of(lambda: choose(None, Tier.P2P, pool="released")) == ""
    release_pools(None)


def _pools_die_with_their_group(rank, group):
    before = len(pool_setup._pools)
    groups = [dist.new_group(range(group.size())) for _ in range(2)]
    transports = [choose(g, Tier.P2P) for g in groups]
    alive = len(pool_setup._pools) - before
    distinct = transports[0]._pool is not transports[1]._pool
    for subgroup in groups:
        dist.destroy_process_group(subgroup)
    del groups, subgroup, transports
    gc.collect()
    return alive, distinct, len(pool_setup._pools) - before


def test_each_group_has_its_own_pools_and_takes_them_along(tmp_path):
    """Two groups of the same ranks share nothing, and a dead group's pools are gone."""
    assert run_spmd(_pools_die_with_their_group, 2, tmp_path) == [(2, True, 0)] * 2


def _lose_one_file(rank, group):
    if rank == 1:
        CpuSymmetricAllocation._map = _refuse_to_map
    transport = choose(group)
    left = exchange_segments(group)
    return transport.tier, left


def _refuse_to_map(self, path):
    raise OSError("no more mappings")


def exchange_segments(group):
    """Names of all ranks' segments that are still in /dev/shm, once everybody got here."""
    dist.barrier(group=group)
    return _segments()


def test_a_rendezvous_that_fails_half_way_leaves_no_name_behind(tmp_path):
    """The other ranks had mapped the files already; all fall, and all names are gone."""
    assert run_spmd(_lose_one_file, 3, tmp_path, timeout=20) == [(Tier.COLLECTIVE, [])] * 3


def _die_with_a_pool(rank, group, folder):
    transport = choose(group, Tier.P2P)
    transport.all_gather([torch.zeros(1, 4)])
    (Path(folder) / str(rank)).write_text(" ".join(_segments()))
    dist.barrier(group=group)
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_processes_leave_no_shared_memory(tmp_path):
    """The segment has no name once all ranks have mapped it, so the kernel frees it with them."""
    with pytest.raises(pytest.fail.Exception, match="died without an answer"):
        run_spmd(_die_with_a_pool, 2, tmp_path, str(tmp_path))
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["", ""]
