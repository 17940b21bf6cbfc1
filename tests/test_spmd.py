"""The multi-process helper of the tests is itself tested: a hang must be a failure in seconds."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.spmd import run_spmd


def _sum_of_ranks(rank, group, offset):
    value = torch.tensor([rank + offset])
    dist.all_reduce(value, group=group)
    return rank, value


def _raise_on(rank, group, culprit):
    if rank == culprit:
        raise RuntimeError(f"rank {rank} had enough")
    dist.barrier(group=group)


def _exit_on(rank, group, culprit):
    if rank == culprit:
        os._exit(3)
    dist.barrier(group=group)


def _skip_collective_on(rank, group, culprit):
    if rank == culprit:
        time.sleep(60)
    dist.barrier(group=group)


def test_results_come_back_in_rank_order(tmp_path):
    """Every rank sees the whole group, and its result stands at its own index."""
    results = run_spmd(_sum_of_ranks, 3, tmp_path, 10)
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert all(int(value) == 33 for _, value in results)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (_raise_on, "(?s)rank 1 of 2 raised.*rank 1 had enough"),
        (_exit_on, "rank 1 died without an answer"),
        (_skip_collective_on, "did not answer within 2 s"),
    ],
)
def test_a_lost_rank_fails_the_test_in_seconds(tmp_path, fn, message):
    """Raising, dying or skipping a collective on one rank is a failure, never a hang."""
    started = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match=message):
        run_spmd(fn, 2, tmp_path, 1, timeout=2)
    assert time.monotonic() - started < 20
