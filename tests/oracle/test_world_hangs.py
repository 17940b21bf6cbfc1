"""A world that hangs: within seconds, and with the rank that keeps the others waiting."""

import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from twinmoe.optimized import launch
from twinmoe.oracle.failures import WorkerHang
from twinmoe.oracle.worker import RankContext
from twinmoe.oracle.world import World

#: Short enough for a test, long enough that a busy machine is not taken for a hang.
PATIENCE_S = 3.0


def _sum_of_ranks(context: RankContext) -> tuple[int, int, float]:
    total = torch.tensor([float(context.rank)])
    if context.group is not None:
        dist.all_reduce(total, group=context.group)
    return context.rank, context.world_size, total.item()


def _skip_last(context: RankContext, rank: int) -> None:
    dist.all_reduce(torch.ones(1), group=context.group)
    if context.rank != rank:
        gathered = torch.empty(context.world_size)
        dist.all_gather_into_tensor(gathered, torch.ones(1), group=context.group)


def _skip_one_of_many(context: RankContext, rank: int) -> None:
    for step in range(4):
        if context.rank != rank or step != 1:
            dist.all_reduce(torch.ones(1), group=context.group)


def _spin_on(context: RankContext, rank: int) -> None:
    dist.barrier(context.group)
    while context.rank == rank:
        pass
    dist.barrier(context.group)


def _slow(context: RankContext, seconds: float, steps: int) -> int:
    for _ in range(steps):
        time.sleep(seconds / steps)
        launch.run("slow_kernel", lambda: None)
    return context.rank


def _sleep(_context: RankContext, seconds: float) -> None:
    time.sleep(seconds)


def test_a_skipped_last_collective_names_the_rank() -> None:
    """A rank that returned early is the suspect, and the others' collective is named."""
    with World(4, timeout_s=PATIENCE_S) as world:
        with pytest.raises(WorkerHang) as caught:
            world.run(_skip_last, 3)
        assert caught.value.ranks == (3,)
        assert caught.value.last_operations[0] == "all_gather_into_tensor"
        text = str(caught.value)
        assert text.startswith(f"rank 3 kept ranks 0 to 2 waiting for {PATIENCE_S} s\n")
        assert "rank 3: finished after 1 operation (last: all_reduce)" in text
        waiting = "ranks 0 to 2: waiting in all_gather_into_tensor of [4] float32, [1] float32"
        assert f"{waiting} (operation 2), at " in text
        assert len(world.run(_sum_of_ranks)) == 4


def test_a_skipped_middle_collective_names_the_rank() -> None:
    """Among equal collectives the rank that started fewer of them is the suspect."""
    with World(4, timeout_s=PATIENCE_S) as world, pytest.raises(WorkerHang) as caught:
        world.run(_skip_one_of_many, 1)
    assert caught.value.ranks == (1,)
    assert "ranks 0, 2 and 3: waiting in all_reduce of [1] float32 (operation 4)" in str(
        caught.value
    )


@pytest.mark.parametrize("size", [1, 3])
def test_an_endless_loop_names_the_rank_and_the_line(size: int) -> None:
    """A rank that spins in Python is a hang, told with the function in which it spins."""
    with World(size, timeout_s=PATIENCE_S) as world, pytest.raises(WorkerHang) as caught:
        world.run(_spin_on if size > 1 else _sleep, size - 1 if size > 1 else 60)
    assert caught.value.ranks == (size - 1,)
    spot = f"test_world_hangs.py:\\d+ in {'_spin_on' if size > 1 else '_sleep'}"
    caught.match(spot)


def test_slow_progress_is_no_hang() -> None:
    """A task may take longer than the timeout as long as operations keep starting."""
    with World(2, timeout_s=PATIENCE_S) as world:
        assert world.run(_slow, 2 * PATIENCE_S, 10) == [0, 1]
        with pytest.raises(WorkerHang):
            world.run(_slow, 2 * PATIENCE_S, 1)


@pytest.mark.skipif(
    os.environ.get("TWINMOE_PROFILE") != "nightly", reason="it starves the machine: nightly alone"
)
def test_a_starved_machine_is_no_hang() -> None:
    """Fifteen times more processes than cores want to run: what takes long there is no hang."""
    spin = [sys.executable, "-S", "-c", "while True: pass"]
    rivals = [subprocess.Popen(spin) for _ in range(15 * len(os.sched_getaffinity(0)))]
    try:
        with World(2, timeout_s=PATIENCE_S) as world:
            assert world.run(_compute, PATIENCE_S / 2) == [0, 1]
            with pytest.raises(WorkerHang):
                world.run(_spin_on, 1)
    finally:
        for rival in rivals:
            rival.kill()
            rival.wait()


def _compute(context: RankContext, seconds: float) -> int:
    """Work that takes so long on a core of its own, and starts no operation."""
    start = time.process_time()
    while time.process_time() - start < seconds:
        pass
    return context.rank


def test_imports_have_the_patience_of_a_start() -> None:
    """What workers do when they start may take longer than a task may stand still."""
    with World(1, timeout_s=0.3, opening=(_sleep, (1.5,))) as world:
        assert world.run(_sum_of_ranks) == [(0, 1, 0.0)]
        with pytest.raises(WorkerHang):
            world.run(_sleep, 30.0)
