"""Layers and batches of the GPU tests, and what is run on every rank of a world.

Legend: N rows of the bucket, H hidden_size.
"""

import time
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from twinmoe.optimized import launch
from twinmoe.optimized.communication.eligibility import Tier
from twinmoe.optimized.communication.errors import PeerTimeout
from twinmoe.optimized.communication.pool_setup import pools_of, release_pools
from twinmoe.optimized.graph import GraphRunner
from twinmoe.optimized.layer import MoELayer
from twinmoe.optimized.options import InferenceOptions
from twinmoe.oracle.observation import RankObservation
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.placement import Placement
from twinmoe.reference.weights import MoEWeights

BUCKET = 16
REPLAYS = 1000

CONFIG = MoEConfig(
    hidden_size=512,
    moe_intermediate_size=256,
    num_experts=16,
    num_experts_per_tok=4,
    routed_scaling_factor=2.5,
    shared_expert_intermediate_size=128,
    dtype=torch.bfloat16,
)
#: Another shape on the same pool, smaller in every way.
NARROW = replace(
    CONFIG, hidden_size=256, moe_intermediate_size=192, shared_expert_intermediate_size=0
)


def layer_of(
    context: RankContext,
    config: MoEConfig = CONFIG,
    tier: Tier | None = Tier.P2P,
    backend: str = "triton",
    seed: int = 0,
) -> MoELayer:
    """One rank's layer on its GPU."""
    owned = Placement(config.num_experts, context.world_size).experts_of(context.rank)
    weights = MoEWeights.random(config, seed, owned, context.device)
    options = InferenceOptions(transport=tier, experts_backend=backend, max_tokens_per_rank=BUCKET)
    return MoELayer(config, weights, context.group, options)


def batch(context: RankContext, config: MoEConfig, tokens: int, seed: int) -> Tensor:
    """Hidden states of this rank, on its GPU."""
    generator = torch.Generator().manual_seed(1000 * seed + context.rank)
    hidden = torch.randn(tokens, config.hidden_size, generator=generator)
    return hidden.to(config.dtype).to(context.device)


@dataclass(frozen=True)
class Endurance:
    """What a rank saw in many replays, twice over."""

    repeats_bitwise: bool
    equals_eager: bool
    allocations: int
    device_allocations: int
    all_finite: bool


def endure(context: RankContext, tier: Tier, backend: str) -> Endurance:
    """Replay one graph REPLAYS times with changing counts, undisturbed and then with delays.

    Counts include zero, on one rank or on all.  Nothing may be allocated, and waiting for
    the device is an error, from the first replay to the last.
    """
    release_pools(context.group)
    layer = layer_of(context, tier=tier, backend=backend)
    runner = GraphRunner(layer, (BUCKET,))
    captured = runner.capture(BUCKET)
    batches = [batch(context, CONFIG, BUCKET, seed) for seed in range(8)]
    generator = torch.Generator().manual_seed(context.rank)
    counts = torch.randint(0, BUCKET + 1, (REPLAYS,), generator=generator)
    counts[::50] = 0
    counts = counts.tolist()
    delays = torch.randint(0, 4, (REPLAYS,), generator=generator).eq(0).tolist()
    shape = (REPLAYS, BUCKET, CONFIG.hidden_size)
    first, second = (torch.zeros(shape, dtype=CONFIG.dtype, device=context.device) for _ in "ab")

    def replay_all(history: Tensor, delayed: bool) -> None:
        for step in range(REPLAYS):
            captured.hidden_NH.copy_(batches[step % 8])
            captured.num_valid.fill_(counts[step])
            if delayed and delays[step]:
                torch.cuda._sleep(200_000)
            captured.graph.replay()
            history[step].copy_(captured.output_NH)

    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        replay_all(first, delayed=False)
        replay_all(second, delayed=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    after = torch.cuda.memory_stats()
    torch.cuda.synchronize()
    return Endurance(
        repeats_bitwise=torch.equal(first, second),
        equals_eager=_equals_eager(layer, first, batches, counts),
        allocations=_grown("allocation.all.allocated", before, after),
        device_allocations=_grown("num_device_alloc", before, after),
        all_finite=bool(first.isfinite().all()),
    )


def _grown(name: str, before: dict[str, int], after: dict[str, int]) -> int:
    return after.get(name, 0) - before.get(name, 0)


def _equals_eager(
    layer: MoELayer, history: Tensor, batches: list[Tensor], counts: list[int]
) -> bool:
    """Is every 50th replay bitwise what the same path gives outside a graph?"""
    same = True
    for step in range(7, REPLAYS, 50):
        num_valid = torch.tensor([counts[step]], dtype=torch.int32, device=history.device)
        with layer.graphed():
            output_NH = layer(batches[step % 8], num_valid)
        same = same and torch.equal(output_NH, history[step])
    return same


def flip_kill_switch(context: RankContext, backend: str) -> list[RankObservation]:
    """One batch before, during and after the kill switch: path and launches with each."""
    release_pools(context.group)
    layer = layer_of(context, tier=None, backend=backend)
    runner = GraphRunner(layer, (BUCKET,))
    hidden_TH = batch(context, CONFIG, 5 + context.rank, seed=3)
    observations = []
    for disabled in (False, True, False):
        layer.set_kill_switch(disabled)
        before = launch.COUNTS.copy()
        output_TH = runner(hidden_TH, max_tokens=BUCKET)
        launches = launch.COUNTS - before
        with layer.graphed():
            path = str(layer.path_report())
        observations.append(RankObservation(output_TH.cpu(), path=path, launches=launches))
    return observations


def alternate_layers(context: RankContext) -> bool:
    """Two layers of different shapes on one pool, replayed in turns: as if each were alone."""
    alone = []
    for config in (CONFIG, NARROW):
        release_pools(context.group)
        runner = GraphRunner(layer_of(context, config), (BUCKET,))
        alone.append([runner(batch(context, config, 7, seed), BUCKET) for seed in range(6)])
    release_pools(context.group)
    layers = [layer_of(context, config) for config in (CONFIG, NARROW)]
    runners = [GraphRunner(layer, (BUCKET,)) for layer in layers]
    same = True
    for seed in range(6):
        for which, config in enumerate((CONFIG, NARROW)):
            output_TH = runners[which](batch(context, config, 7, seed), BUCKET)
            same = same and torch.equal(output_TH, alone[which][seed])
    return same


def gather_over_tiers(context: RankContext) -> bool:
    """Every bit pattern of 16 bits, gathered by our kernels and by the collective library."""
    release_pools(context.group)
    bits = torch.arange(-(2**15), 2**15, device=context.device).to(torch.int16) + context.rank
    rows_NH = bits.view(torch.bfloat16).view(128, 512)
    received = []
    for tier in (Tier.P2P, Tier.COLLECTIVE):
        options = InferenceOptions(transport=tier, max_tokens_per_rank=128)
        owned = Placement(CONFIG.num_experts, context.world_size).experts_of(context.rank)
        weights = MoEWeights.random(CONFIG, 0, owned, context.device)
        layer = MoELayer(CONFIG, weights, context.group, options)
        odd = torch.full((128, 3), context.rank, dtype=torch.int32, device=context.device)
        gathered = layer.transport.all_gather([odd, rows_NH])
        received.append([tensor.clone().view(torch.int16) for tensor in gathered])
    return all(torch.equal(ours, theirs) for ours, theirs in zip(*received, strict=True))


def wait_in_vain(context: RankContext) -> tuple[str, float]:
    """Let rank 0 gather and no peer with it; what it then says, and how long its GPU waited."""
    release_pools(context.group)
    layer = layer_of(context)
    rows_NH = batch(context, CONFIG, BUCKET, 0)
    layer.transport.all_gather([rows_NH])  # compiles
    torch.cuda.synchronize()
    dist.barrier(group=context.group)
    said, begun = "", time.monotonic()
    if context.rank == 0:
        pool = next(iter(pools_of(context.group)))
        pool.memory.signal_pad_ptrs[-1] = 2 * 10**9
        layer.transport.mistrust()
        layer.transport.all_gather([rows_NH])
        torch.cuda.synchronize()
        try:
            layer.check_peers()
        except PeerTimeout as error:
            said = str(error)
    seconds = time.monotonic() - begun
    dist.barrier(group=context.group)
    release_pools(context.group)
    return said, seconds
