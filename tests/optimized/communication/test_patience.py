"""A wait for a rank that is gone ends, on every rank that waits, in an error that names it."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.optimized.communication.workers import choose, message_of
from tests.spmd import run_spmd
from twinmoe.optimized.communication import Tier, patience
from twinmoe.optimized.communication.errors import PeerTimeout
from twinmoe.optimized.cpu_graph import CpuGraph

_SECONDS = 1.0


def _lose_patience(transport, group):
    """Let kernels wait for a second from now on: until here a rank may have been late."""
    transport._pool.memory.signal_pad_ptrs[-1] = int(_SECONDS * 1e9)
    dist.barrier(group=group)


def _outlive_a_peer(rank, group, tier, leaving):
    """One rank goes away after an all-gather; say what the others met, and how long it took."""
    transport = choose(group, tier)
    rows = torch.full((2, 8), float(rank))
    transport.all_gather([rows])
    transport.check_peers()
    _lose_patience(transport, group)
    if rank == leaving:
        return "", 0.0, ""
    begun = time.monotonic()
    partial = transport.partial_buffer(2 * group.size(), 8, torch.float32)
    first = message_of(lambda: transport.reduce_scatter(partial))
    seconds = time.monotonic() - begun
    return first, seconds, message_of(lambda: transport.all_gather([rows]))


@pytest.mark.parametrize("tier", [Tier.P2P, Tier.NVLS])
def test_a_rank_that_left_is_named_by_those_who_wait(tier, tmp_path):
    """Within the bound, by all of them; what they ask for afterwards fails at once."""
    answers = run_spmd(_outlive_a_peer, 3, tmp_path, tier, 1)
    for rank in (0, 2):
        first, seconds, second = answers[rank]
        assert first.startswith(f"PeerTimeout: rank {rank} timed out waiting for rank 1,")
        assert second.startswith("PeerTimeout: ")
        assert _SECONDS <= seconds < 20 * _SECONDS


def _replay_without_a_peer(rank, group):
    transport, graph = choose(group, Tier.P2P), CpuGraph()
    rows = torch.full((2, 8), float(rank))
    with graph.capture():
        for _ in range(3):
            transport.all_gather([rows])
    _lose_patience(transport, group)
    if rank == 1:
        return "", 0.0
    begun = time.monotonic()
    graph.replay()
    return message_of(transport.check_peers), time.monotonic() - begun


def test_a_replay_waits_in_vain_once(tmp_path):
    """Six barriers without the peer cost one wait: the kernels know that they have given up."""
    (told, seconds), _ = run_spmd(_replay_without_a_peer, 2, tmp_path)
    assert told.startswith("PeerTimeout: rank 0 timed out waiting for rank 1,")
    assert seconds < 3 * _SECONDS


def test_patience_that_was_not_needed_says_nothing():
    """A fresh one raises nothing; one whose kernels gave up names the rank."""
    mine = patience.Patience(torch.device("cpu"))
    mine.check(0)
    mine._missing.fill_(3)
    with pytest.raises(PeerTimeout, match="rank 0 timed out waiting for rank 2"):
        mine.check(0)
