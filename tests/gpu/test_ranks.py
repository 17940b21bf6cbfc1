"""Graphs on one to four GPUs: endurance, repeatability, shared pools, and the kill switch."""

from collections.abc import Iterator

import pytest
import torch

from tests.gpu.conftest import sizes
from tests.gpu.layers import (
    BUCKET,
    CONFIG,
    alternate_layers,
    batch,
    endure,
    flip_kill_switch,
    gather_over_tiers,
    wait_in_vain,
)
from twinmoe.optimized.communication.eligibility import Tier
from twinmoe.optimized.experts import backend_report
from twinmoe.oracle import Truth, judge
from twinmoe.oracle.contracts import graphed_contract
from twinmoe.oracle.worker import RankContext
from twinmoe.oracle.world import World
from twinmoe.reference.weights import MoEWeights

BACKENDS = ["grouped_mm", "triton", "flashinfer"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each expert backend; those that do not run here say why."""
    name: str = request.param
    reason = backend_report(CONFIG, torch.device("cuda", 0))[name]
    if reason is not None:
        pytest.skip(reason)
    return name


@pytest.fixture(scope="module", params=sizes())
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """As many GPUs as the parameter says, in one group."""
    with World(request.param, "cuda", timeout_s=120) as world:
        yield world


@pytest.mark.parametrize("tier", [Tier.P2P, Tier.COLLECTIVE])
def test_a_thousand_replays_allocate_nothing_and_wait_for_nothing(
    world: World, tier: Tier, backend: str
) -> None:
    """Counts change, ranks are delayed: no allocation, no sync, and over p2p the same bits."""
    for seen in world.run(endure, tier, backend):
        assert seen.allocations == 0
        assert seen.device_allocations == 0
        assert seen.all_finite
        if tier is Tier.P2P:
            assert seen.repeats_bitwise
            assert seen.equals_eager


def test_the_kill_switch_falls_back_and_back_again(world: World, backend: str) -> None:
    """p2p, then the collective library, then p2p: claims, launches, bits and bounds agree."""
    if world.size == 1:
        pytest.skip("a group of one has no collective library to fall back to")
    by_rank = world.run(flip_kill_switch, backend)
    weights = MoEWeights.random(CONFIG, 0)
    posts = [RankContext(rank, world.size, None, torch.device("cpu")) for rank in range(world.size)]
    truth = Truth(CONFIG, weights, [batch(post, CONFIG, 5 + post.rank, 3) for post in posts])
    for step, tier in enumerate(("p2p", "nccl", "p2p")):
        seen = [observations[step] for observations in by_rank]
        for observation in seen:
            assert f": {tier}, " in observation.path
            moved = {name for name in observation.launches if "[" in name}
            assert moved == {f"all_gather[{tier}]", f"reduce_scatter[{tier}]"}
        contract = graphed_contract(CONFIG, backend, tier, torch.float32, "cuda")
        verdict = judge(seen, truth, contract)
        assert verdict.equivalent, str(verdict)
    for before, _, after in by_rank:
        assert torch.equal(before.output_TH, after.output_TH)


def test_layers_of_different_shapes_share_a_pool(world: World) -> None:
    """Replays in turns on one buffer give each layer the bits that it gives alone."""
    assert BUCKET > 7
    assert all(world.run(alternate_layers))


def test_a_gather_is_the_same_bits_on_every_tier(world: World) -> None:
    """NaN payloads, infinities and subnormals included."""
    assert all(world.run(gather_over_tiers))


def test_a_gpu_that_waits_for_an_absent_rank_gives_up(world: World) -> None:
    """Two seconds of the device's clock for two barriers, and the rank's name; nothing hangs."""
    if world.size == 1:
        pytest.skip("a group of one waits for nobody")
    (said, seconds), *_ = world.run(wait_in_vain)
    assert said.startswith("rank 0 timed out waiting for rank 1,")
    assert 2 <= seconds < 3
