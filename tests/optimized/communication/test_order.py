"""Write-after-read safety and the barrier under it: delays, repeats, replays, old epochs."""

import time

import pytest
import torch

from tests.optimized.communication.workers import choose, message_of
from tests.spmd import run_spmd
from twinmoe.optimized import launch
from twinmoe.optimized.communication import Tier
from twinmoe.optimized.communication.order import Collective, CollectiveOrder

_DELAY = 0.15


def _gather_twice(rank, group, protected):
    transport = choose(group, Tier.P2P)
    if not protected:
        transport._pool.order.repeats = lambda collective: False
    (first,) = transport.all_gather([torch.full((2, 8), float(rank))])
    if rank == 0:
        time.sleep(_DELAY)  # the peers are in their second all-gather by now
    seen = first.clone()
    transport.all_gather([torch.full((2, 8), 10.0 + rank)])
    return seen[:, 0].tolist()


def test_a_second_all_gather_waits_for_readers_of_the_first(tmp_path):
    """A delayed rank still reads the rows of the first call."""
    assert run_spmd(_gather_twice, 3, tmp_path, True) == [[0.0, 0.0, 1.0, 1.0, 2.0, 2.0]] * 3


def test_it_is_the_leading_barrier_that_protects_them(tmp_path):
    """Without it the delayed rank sees the second call's rows: the test above can fail."""
    assert run_spmd(_gather_twice, 3, tmp_path, False)[0] == [0.0, 0.0, 11.0, 11.0, 12.0, 12.0]


def _reduce_twice(rank, group):
    transport = choose(group, Tier.P2P)
    sums = []
    for step in range(3):
        buffer = transport.partial_buffer(group.size(), 4, torch.float32)
        buffer.fill_(10.0**step * (rank + 1))
        if rank == step:
            time.sleep(_DELAY)
        sums.append(transport.reduce_scatter(buffer)[0, 0].item())
    return sums, transport.report().launches["barrier"]


def test_partial_results_are_not_overwritten_under_a_reader(tmp_path):
    """The second buffer is handed out only when all ranks have read the first."""
    assert run_spmd(_reduce_twice, 3, tmp_path) == [([6.0, 60.0, 600.0], 2)] * 3


def test_reducing_twice_without_asking_for_the_buffer_is_refused():
    """The transport cannot know whether the rows were written while peers read them."""
    transport = choose(None, Tier.P2P)
    buffer = transport.partial_buffer(2, 4, torch.float32)
    transport.reduce_scatter(buffer)
    assert "two reduce-scatters in a row" in message_of(lambda: transport.reduce_scatter(buffer))
    transport.reduce_scatter(transport.partial_buffer(2, 4, torch.float32))


@pytest.mark.parametrize("collective", [Collective.ALL_GATHER, Collective.REDUCE_SCATTER])
def test_only_a_direct_repeat_needs_protection(collective):
    """The other collective, or a barrier, in between is protection enough; the unknown is not."""
    order = CollectiveOrder()
    assert not order.repeats(collective)
    for between in Collective:
        order.record(collective)
        assert order.repeats(collective)
        order.record(between)
        assert order.repeats(collective) == (between in (collective, Collective.UNKNOWN))


def _replay(rank, group, tier):
    transport = choose(group, tier)
    rows = torch.zeros(2, 8)
    tape = []

    def keep(name, operation, _on):
        tape.append((name, operation))
        launch.execute(name, operation)

    launch.record_to(keep)
    (gathered,) = transport.all_gather([rows])
    buffer = transport.partial_buffer(2 * group.size(), 8, torch.float32)
    launch.run("experts", lambda: buffer.copy_(gathered * (rank + 1)))
    own = transport.reduce_scatter(buffer)
    launch.record_to(None)
    outputs = []
    for step in (1.0, 2.0, 3.0):
        rows.fill_(step * (rank + 1))
        for name, operation in tape:
            launch.execute(name, operation)
        outputs.append(own[0, 0].item())
    return outputs, transport.report().tier is tier


@pytest.mark.parametrize("tier", [Tier.NVLS, Tier.P2P])
def test_recorded_collectives_replay_with_new_inputs(tier, tmp_path):
    """A replay re-executes on the same addresses; epochs go on where they were."""
    for rank, (outputs, same_tier) in enumerate(run_spmd(_replay, 2, tmp_path, tier)):
        assert outputs == [3.0 * (rank + 1) * step for step in (1, 2, 3)]
        assert same_tier


def _wrap_epochs(rank, group):
    transport = choose(group, Tier.P2P, num_ctas=2)
    transport._pool.memory.signal_pad.fill_(2**31 - 3)
    torch.distributed.barrier(group=group)
    seen = []
    for step in range(4):
        if rank == 0:
            time.sleep(0.02)
        (rows,) = transport.all_gather([torch.full((1, 4), step + 10.0 * rank)])
        seen.append(rows[:, 0].tolist())
        buffer = transport.partial_buffer(group.size(), 4, torch.float32)
        transport.reduce_scatter(buffer.zero_())
    return seen, int(transport._pool.memory.signal_pad.min())


def test_epochs_may_wrap_around(tmp_path):
    """The barrier compares differences, so 2^31 - 1 is followed by -2^31."""
    for seen, epoch in run_spmd(_wrap_epochs, 3, tmp_path, timeout=30):
        assert seen == [[step, step + 10.0, step + 20.0] for step in range(4)]
        assert epoch < 0
