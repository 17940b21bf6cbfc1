"""The one door for kernels and collectives: counted, observed, recorded, repeated."""

import pytest
import torch
import torch.distributed as dist

from tests.spmd import run_spmd
from twinmoe.optimized import launch
from twinmoe.optimized.cpu_graph import CpuGraph
from twinmoe.optimized.triton_runtime import tl, triton


@triton.jit
def add_to_all(x_ptr, amount_ptr, count, BLOCK: tl.constexpr):
    """x[i] += amount, for i < count."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < count)
    tl.store(x_ptr + i, x + tl.load(amount_ptr), mask=i < count)


def add_kernel(x, amount):
    """Launch the kernel of this file over all of ``x``."""
    launch.launch(add_to_all, (triton.cdiv(len(x), 4),), x, amount, len(x), BLOCK=4)


@pytest.fixture
def heard():
    """The names that an observer was told, in order."""
    names = []

    def hear(name, _on):
        names.append(name)

    launch.observers.append(hear)
    yield names
    launch.observers.remove(hear)


def test_a_kernel_is_counted_under_its_own_name(heard):
    """Once per launch, and observers hear of it."""
    x, before = torch.zeros(6), launch.COUNTS["add_to_all"]
    add_kernel(x, torch.tensor([2.0]))
    assert x.tolist() == [2] * 6
    assert launch.COUNTS["add_to_all"] == before + 1
    assert heard == ["add_to_all"]


def test_observers_hear_of_an_operation_before_it_starts(heard):
    """A watchdog learns what hung: the name is out even if the operation never returns."""
    before = launch.COUNTS["doomed"]

    def fail():
        assert heard == ["doomed"]
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        launch.run("doomed", fail)
    assert launch.COUNTS["doomed"] == before + 1


def test_launches_are_recorded_once_and_repeated(heard):
    """Captured, a kernel runs once; each replay runs, counts and announces it once more."""
    x, amount, graph = torch.zeros(6), torch.tensor([1.0]), CpuGraph()
    before = launch.COUNTS["add_to_all"]
    with graph.capture():
        y = x + 10
        add_kernel(y, amount)
        total = y.sum()
    assert (y[0].item(), total.item(), launch.COUNTS["add_to_all"]) == (11, 66, before + 1)
    x.fill_(1)
    amount.fill_(5)
    for replay in range(1, 4):
        graph.replay()
        # Not 21, 26: the tape holds the addition before it as well.
        assert (y[0].item(), total.item()) == (16, 96)
        assert launch.COUNTS["add_to_all"] == before + 1 + replay
    assert heard == ["add_to_all"] * 4


def test_tensor_operations_inside_a_launch_are_not_recorded_twice():
    """An operation is one step of the tape, whatever it is made of."""
    x, graph = torch.zeros(1), CpuGraph()
    with graph.capture():
        launch.run("three steps", lambda: x.add_(1).add_(1).add_(1))
    graph.replay()
    assert x.item() == 6


def test_a_failed_launch_ends_the_capture_it_was_in():
    """The error comes out; what is run afterwards is recorded by nobody."""
    with pytest.raises(KeyError), CpuGraph().capture():
        launch.run("failing", lambda: {}["absent"])
    assert not launch.capturing()
    x = torch.zeros(1)
    launch.run("counted", lambda: x.add_(1))
    assert x.item() == 1


def test_capturing_is_true_inside_a_capture_only():
    """It is what a refusal to allocate goes by."""
    assert not launch.capturing()
    with CpuGraph().capture():
        assert launch.capturing()
    assert not launch.capturing()


def check_collective(rank, group):
    """Capture an all-reduce and replay it with other numbers."""
    x, graph = torch.tensor([float(rank)]), CpuGraph()
    ranks = group.size()
    before = launch.COUNTS["sum"]
    with graph.capture():
        y = x + 1
        launch.run("sum", lambda: dist.all_reduce(y, group=group))
        twice = y * 2
    assert twice.item() == ranks * (ranks + 1)
    for step in (10, 20):
        x.fill_(step + rank)
        graph.replay()
        assert twice.item() == ranks * (ranks + 1) + 2 * ranks * step
    assert launch.COUNTS["sum"] == before + 3


def test_collectives_are_repeated_by_a_replay(tmp_path):
    """On all ranks together, on the tensors of the capture, and counted."""
    run_spmd(check_collective, 2, tmp_path)
