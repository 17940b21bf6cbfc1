"""What a failure says: who is to blame, and what every rank last did."""

import os
import re
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from twinmoe.optimized import launch
from twinmoe.oracle.breadcrumbs import Footprint, Phase, Recorder, Trail
from twinmoe.oracle.failures import (
    Raised,
    WorkerDied,
    WorkerError,
    WorkerHang,
    is_secondary,
    mismatched,
    name_ranks,
    suspects,
    tell,
)
from twinmoe.oracle.worker import RankContext
from twinmoe.oracle.world import World
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.layer import MoELayer
from twinmoe.reference.placement import Placement
from twinmoe.reference.weights import MoEWeights


def _footprint(*operations: str, phase: Phase = Phase.PAST) -> Footprint:
    counts = {name: operations.count(name) for name in operations}
    return Footprint(len(operations), phase, operations[-1] if operations else "", counts)


def test_a_rank_that_started_fewer_of_the_awaited_operation_is_the_suspect() -> None:
    """The second gather is awaited by most; the rank that started one only is missing."""
    prints = {rank: _footprint("gather", "scatter", "gather") for rank in range(3)}
    prints[3] = _footprint("gather", "scatter")
    assert suspects(prints, finished=[3]) == [3]


def test_a_rank_in_another_operation_is_the_suspect() -> None:
    """Where most ranks stand in a gather, the one in a scatter is to blame."""
    prints = {rank: _footprint("gather") for rank in range(3)} | {3: _footprint("scatter")}
    assert suspects(prints, finished=[]) == [3]


def test_in_a_draw_both_sides_are_suspects() -> None:
    """Of two ranks in different operations, nothing tells which one went astray."""
    prints = {0: _footprint("gather", "scatter"), 1: _footprint("gather", "gather")}
    assert suspects(prints, finished=[]) == [0, 1]


def test_a_skipped_local_kernel_is_no_ground_for_suspicion() -> None:
    """A rank without tokens launches fewer kernels, and still waits like the others."""
    prints = {
        0: _footprint("experts", "gather"),
        1: _footprint("gather"),
        2: _footprint("experts"),
    }
    assert suspects(prints, finished=[]) == [2]


def test_without_a_missing_rank_all_unfinished_ones_are_suspects() -> None:
    """When everyone reached the last operation, whoever did not return is named."""
    prints = {rank: _footprint("gather") for rank in range(3)}
    assert suspects(prints, finished=[0, 2]) == [1]
    assert suspects({0: _footprint(), 1: _footprint()}, finished=[0]) == [1]


def test_a_story_groups_ranks_that_did_the_same() -> None:
    """Each phase has its words; places are told for ranks that are still at work."""
    prints = {
        0: _footprint("gather", phase=Phase.INSIDE),
        1: _footprint("gather", phase=Phase.INSIDE),
        2: _footprint("gather", phase=Phase.STARTED),
        3: _footprint("gather", "scatter"),
        4: _footprint(),
    }
    assert tell(prints, [3], {2: "layer.py:7 in forward", 3: "nowhere"}) == (
        "ranks 0 and 1: waiting in gather (operation 1); "
        "rank 2: last started gather (operation 1), at layer.py:7 in forward; "
        "rank 3: finished after 2 operations (last: scatter); "
        "rank 4: no operation yet"
    )


def test_collectives_that_do_not_belong_together_are_told() -> None:
    """At the same number of operations, another collective than most ranks' is the suspect."""
    prints = {
        rank: Footprint(7, Phase.STARTED, name, {name: 1}, on=on)
        for rank, (name, on) in enumerate(
            [("scatter", "[4] float32")] * 3 + [("gather", "[8] float32")]
        )
    }
    assert mismatched(prints) == (
        "ranks 0 to 2 issued scatter([4] float32), rank 3 issued gather([8] float32)"
    )
    assert suspects(prints, finished=[0, 1, 2]) == [3]
    told = str(WorkerHang(suspects(prints, [0, 1, 2]), 2.0, prints, "the rest"))
    assert told.startswith("rank 3 kept ranks 0 to 2 waiting for 2.0 s\n  ranks 0 to 2 issued")
    assert not mismatched({0: prints[0], 1: prints[1]})


@pytest.mark.parametrize(
    ("ranks", "words"),
    [([3], "rank 3"), ([0, 1], "ranks 0 and 1"), ([2, 3, 4], "ranks 2 to 4")],
)
def test_ranks_are_named_shortly(ranks: list[int], words: str) -> None:
    """A run of ranks is a range."""
    assert name_ranks(ranks) == words


def _lose_a_peer(context: RankContext, heard: Path) -> None:
    dist.barrier(context.group)
    if context.rank == 1:
        os._exit(1)
    try:
        dist.all_reduce(torch.ones(1), group=context.group)
    except RuntimeError as error:
        heard.write_text(str(error))


def test_a_lost_connection_is_a_secondary_error(tmp_path: Path) -> None:
    """What gloo says when a peer has left is told apart from a task's own errors."""
    heard = tmp_path / "heard"
    with World(2) as world, pytest.raises(WorkerDied):
        world.run(_lose_a_peer, heard)
    assert is_secondary(heard.read_text())
    assert not is_secondary("num_experts (7) must be divisible by ep_size (2)")


def _fail_after_a_lost_connection(context: RankContext) -> None:
    if context.rank == 0:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1")
    time.sleep(0.3)
    raise KeyError("the cause")


def test_the_cause_outranks_a_lost_connection() -> None:
    """A task's own error is blamed although another rank's lost connection came first."""
    with World(2) as world, pytest.raises(WorkerError, match="rank 1 raised KeyError"):
        world.run(_fail_after_a_lost_connection)


def _take_a_bad_batch(context: RankContext) -> None:
    config = MoEConfig(hidden_size=8, moe_intermediate_size=8, num_experts=6, num_experts_per_tok=2)
    experts = Placement(6, context.world_size).experts_of(context.rank)
    layer = MoELayer(config, MoEWeights.random(config, 0, experts), context.group)
    width = 7 if context.rank == 1 else 8
    layer(torch.zeros(3, width, dtype=config.dtype))


def test_the_cause_outranks_what_its_peers_were_told_of_it() -> None:
    """One rank's batch does not fit: it is to blame, not those that raise because it cannot."""
    with World(3) as world, pytest.raises(WorkerError, match=r"tokens are \[3, 7\]") as caught:
        world.run(_take_a_bad_batch)
    assert caught.value.ranks == (1,)


def _walk(context: RankContext) -> Footprint:
    trail = Trail()
    Recorder(trail).install()
    size = context.world_size
    launch.run("kernel", lambda: None)
    dist.all_gather_object([None] * size, "value", group=context.group)
    dist.reduce_scatter_tensor(torch.empty(2), torch.ones(2 * size), group=context.group)
    dist.all_to_all_single(torch.empty(size), torch.ones(size), group=context.group)
    dist.all_to_all_single(torch.empty(size), torch.ones(size), group=context.group)
    return Footprint.read(trail)


def test_launches_and_collectives_are_followed_once() -> None:
    """A collective made of others counts once; launches and collectives share one count."""
    with World(2) as world:
        footprint, _ = world.run(_walk)
    assert footprint == Footprint(
        sequence=5,
        phase=Phase.PAST,
        last="all_to_all_single",
        counts={
            "kernel": 1,
            "all_gather_object": 1,
            "reduce_scatter_tensor": 1,
            "all_to_all_single": 2,
        },
        on="rows of [0] float32, [0] float32",
    )


def _walk_far(_context: RankContext, names: int) -> Footprint:
    trail = Trail()
    Recorder(trail).install()
    for index in range(names):
        launch.run(f"{'long' * 30}{index}"[-70:], lambda: None)
    return Footprint.read(trail)


def test_many_and_long_names_stay_inside_their_memory() -> None:
    """Names beyond the table share one entry, and long ones are cut, without losing a count."""
    with World(1) as world:
        (footprint,) = world.run(_walk_far, 100)
    assert footprint.sequence == 100
    assert footprint.counts["(other operations)"] == 100 - 63
    assert max(map(len, footprint.counts)) <= 63


def test_an_error_is_told_with_the_place_that_raised_it() -> None:
    """The innermost frame; nothing where there is none."""
    try:
        int("seven")
    except ValueError:
        here = Raised("ValueError", "no number", traceback.format_exc())
    assert re.fullmatch(r".*test_world_failures\.py:\d+ in test_an_error_is_told\w+", here.place)
    failure = WorkerError([1], here, {}, "rank 0: finished")
    assert str(failure).splitlines()[1] == f"  at {here.place}"
    assert Raised("KeyError", "", "").place == ""
