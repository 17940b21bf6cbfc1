"""A world of workers: results in rank order, and failures that name the rank."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from twinmoe.oracle import descendants
from twinmoe.oracle.failures import WorkerDied, WorkerError, WorkerFailure, WorkerHang, WorkerLost
from twinmoe.oracle.worker import RankContext
from twinmoe.oracle.world import World


def _sum_of_ranks(context: RankContext) -> tuple[int, int, float]:
    total = torch.tensor([float(context.rank)])
    if context.group is not None:
        dist.all_reduce(total, group=context.group)
    return context.rank, context.world_size, total.item()


def _echo(_context: RankContext, value: Any) -> Any:
    return value


def _environment(_context: RankContext, name: str) -> str | None:
    return os.environ.get(name)


def _raise_on(context: RankContext, rank: int) -> None:
    dist.barrier(context.group)
    if context.rank == rank:
        raise ValueError("boom")
    dist.barrier(context.group)


def _raise_everywhere(_context: RankContext) -> None:
    raise ValueError("boom")


def _exit_on(context: RankContext, rank: int) -> None:
    dist.barrier(context.group)
    if context.rank == rank:
        os._exit(3)
    dist.all_reduce(torch.ones(1), group=context.group)


def _killed_on(context: RankContext, rank: int) -> None:
    if context.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier(context.group)


def _sleep(_context: RankContext, seconds: float) -> None:
    time.sleep(seconds)


def _gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


def _wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    patience = time.monotonic() + seconds
    while not condition() and time.monotonic() < patience:
        time.sleep(0.05)
    return condition()


@pytest.fixture(scope="module")
def pair() -> Iterator[World]:
    """Share one world of two ranks among the tests that leave it alone."""
    with World(2) as world:
        yield world


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_results_come_in_rank_order(size: int) -> None:
    """Every rank runs the task in one group of the world's size, and answers in its place."""
    with World(size) as world:
        total = float(sum(range(size)))
        assert world.run(_sum_of_ranks) == [(rank, size, total) for rank in range(size)]


def test_workers_persist_between_tasks() -> None:
    """The same processes serve all tasks, and they are started by the first one only."""
    with World(2) as world:
        assert world.pids == []
        world.run(_sum_of_ranks)
        pids = world.pids
        world.run(_sum_of_ranks)
        assert world.pids == pids
        assert (world.respawns, len(world.spawn_seconds)) == (0, 1)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([[1.5, float("nan")], [float("inf"), -0.0]], dtype=torch.bfloat16),
        torch.arange(6, dtype=torch.float64).reshape(2, 3).t(),
        torch.ones(2, dtype=torch.float8_e4m3fn),
        torch.zeros(0, 7, dtype=torch.float16),
        torch.tensor(3),
        torch.tensor([True, False]),
    ],
    ids=["bf16", "transposed", "fp8", "empty", "scalar", "bool"],
)
def test_tensors_travel_bit_for_bit(tensor: torch.Tensor, pair: World) -> None:
    """A tensor keeps its dtype, its shape and every bit, in nested arguments and results."""
    for answer in pair.run(_echo, {"nested": [tensor]}):
        echoed = answer["nested"][0]
        assert (echoed.dtype, echoed.shape) == (tensor.dtype, tensor.shape)
        bits = tensor.contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(echoed.reshape(-1).view(torch.uint8), bits)


def test_tensors_leak_no_file_descriptors(pair: World) -> None:
    """Sending tensors back and forth leaves the driver's open files as they were."""
    pair.run(_echo, torch.ones(3))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        pair.run(_echo, [torch.ones(300)] * 3)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_workers_take_the_environment_of_their_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that the driver set after the first world's start reaches the next world."""
    monkeypatch.setenv("TWINMOE_TEST_VARIABLE", "set")
    with World(1) as world:
        assert world.run(_environment, "TWINMOE_TEST_VARIABLE") == ["set"]
    monkeypatch.delenv("TWINMOE_TEST_VARIABLE")
    with World(1) as world:
        assert world.run(_environment, "TWINMOE_TEST_VARIABLE") == [None]


def test_two_worlds_live_side_by_side(pair: World) -> None:
    """Worlds share no name and no port, and their tasks may alternate."""
    with World(3) as other:
        for _ in range(2):
            assert [answer[2] for answer in pair.run(_sum_of_ranks)] == [1.0] * 2
            assert [answer[2] for answer in other.run(_sum_of_ranks)] == [3.0] * 3


def test_an_exception_names_its_rank() -> None:
    """One rank's exception is reported with its traceback, and the world works again."""
    with World(4) as world:
        with pytest.raises(WorkerError, match="rank 1 raised ValueError: boom") as caught:
            world.run(_raise_on, 1)
        assert caught.value.ranks == (1,)
        assert "in _raise_on" in caught.value.traceback
        assert "ranks 0, 2 and 3: waiting in barrier (operation 2)" in str(caught.value)
        assert world.pids == []
        assert len(world.run(_sum_of_ranks)) == 4
        assert world.respawns == 1


def test_an_exception_of_all_ranks_names_them_all() -> None:
    """The same exception everywhere is one failure of all ranks, told once."""
    with World(2) as world, pytest.raises(WorkerError) as caught:
        world.run(_raise_everywhere)
    assert caught.value.ranks == (0, 1)
    assert str(caught.value).startswith("ranks 0 and 1 raised ValueError: boom\n")


def test_a_result_that_cannot_be_pickled_is_an_error(pair: World) -> None:
    """A task that returns a lambda fails with the reason, not with silence."""
    with pytest.raises(WorkerError, match="result cannot be sent"):
        pair.run(_unpicklable)


def _unpicklable(_context: RankContext) -> object:
    return lambda: None


@pytest.mark.parametrize(
    ("task", "exit_code", "words"),
    [
        (_exit_on, 3, "rank 2 exited with code 3\n"),
        (_killed_on, -signal.SIGKILL, "rank 2 was killed by signal 9 (SIGKILL)\n"),
    ],
)
def test_a_death_names_its_rank(task: Callable[..., None], exit_code: int, words: str) -> None:
    """A dead rank is named within seconds although its peers only saw a closed connection."""
    with World(4) as world:
        world.run(_sum_of_ranks)
        start = time.monotonic()
        with pytest.raises(WorkerDied) as caught:
            world.run(task, 2)
        assert time.monotonic() - start < 10
        assert (caught.value.ranks, caught.value.exit_code) == ((2,), exit_code)
        assert str(caught.value).startswith(words)
        assert len(world.run(_sum_of_ranks)) == 4


def test_failures_leak_no_file_descriptors() -> None:
    """Many failures later the driver holds as many open files as after the first."""
    with World(2) as world:
        counts = []
        for _ in range(4):
            with pytest.raises(WorkerDied):
                world.run(_killed_on, 1)
            counts.append(len(list(Path("/proc/self/fd").iterdir())))
    assert counts[-1] <= counts[0]


def test_a_death_between_tasks_does_not_blame_the_next_task() -> None:
    """A worker that ended while idle is an error of its own, before the next task runs."""
    with World(2) as world:
        world.run(_sum_of_ranks)
        victim = world.pids[1]
        os.kill(victim, signal.SIGKILL)
        # A zombie may still have threads that hold its pipe open; a reaped process has none.
        assert _wait_until(lambda: not Path(f"/proc/{victim}").exists())
        with pytest.raises(WorkerLost, match="rank 1 was killed by signal 9"):
            world.run(_sum_of_ranks)
        assert len(world.run(_sum_of_ranks)) == 2
        assert world.respawns == 1


def test_close_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After close no worker process and no private directory is left."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with World(2) as world:
        world.run(_sum_of_ranks)
        pids = world.pids
        assert len(list(tmp_path.glob("twinmoe-world-*"))) == 1
    assert all(map(_gone, pids))
    assert list(tmp_path.glob("twinmoe-world-*")) == []


def test_an_interrupt_ends_the_workers() -> None:
    """Ctrl-C in the driver during a task kills the workers and passes on."""
    with World(2) as world:
        world.run(_sum_of_ranks)
        pids = world.pids
        with pytest.raises(KeyboardInterrupt):
            _interrupted(world)
        assert all(map(_gone, pids))


def _interrupted(world: World) -> None:
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        world.run(_sleep, 60)
    finally:
        signal.signal(signal.SIGALRM, before)


_DRIVER = """
import sys
from twinmoe.oracle.world import World
from world_tasks import spin, where
if __name__ == "__main__":
    world = World(2)
    print(*world.run(where), sep="\\n", flush=True)
    world.run(spin)
"""
_TASKS = """
import os, time
def where(context):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(600)
        os._exit(0)
    os.wait()
    return os.getpid()
def spin(context):
    while True: pass
"""


def test_a_killed_driver_leaves_no_orphans(tmp_path: Path) -> None:
    """Workers end with their driver, even while they spin, with their daemons and directory."""
    (tmp_path / "driver.py").write_text(_DRIVER)
    (tmp_path / "world_tasks.py").write_text(_TASKS)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TMPDIR": str(tmp_path),
    }
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "driver.py")],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as driver:
        assert driver.stdout is not None
        try:
            pids = [int(driver.stdout.readline()) for _ in range(2)]
            assert not any(map(_gone, pids))
            daemons = [pid for worker in pids for pid in descendants.below(worker)]
            assert len(daemons) == 2
        finally:
            driver.kill()
    assert _wait_until(lambda: all(map(_gone, pids + daemons)))
    assert list(tmp_path.glob("twinmoe-world-*")) == []


def test_impossible_worlds_are_refused() -> None:
    """A world without ranks or without patience is refused with the value."""
    with pytest.raises(ValueError, match=r"size \(0\)"):
        World(0)
    with pytest.raises(ValueError, match=r"timeout_s \(0\)"):
        World(2, timeout_s=0)
    assert issubclass(WorkerHang, WorkerFailure)
