"""The graph runner over several ranks: one bucket for all, one graph per tier.

Legend: T tokens, H hidden_size.
"""

import pytest
import torch

from tests.optimized.exact import (
    error_of,
    exact_config,
    exact_tokens,
    optimized,
    reference,
    same_bits,
)
from tests.spmd import run_spmd
from twinmoe.optimized import launch
from twinmoe.optimized.communication.eligibility import Tier
from twinmoe.optimized.graph import GraphRunner

#: Tokens of each rank, step by step, and the bucket of the largest.  The first N entries of a
#: step are used by a world of N; its largest count is always among the first two.
STEPS = (
    ((7, 8, 1, 0), 8),
    ((3, 0, 2, 1), 4),
    ((0, 0, 0, 0), 4),
    ((4, 1, 4, 4), 4),
    ((0, 5, 0, 1), 8),
)


def check_buckets(rank, group):
    """Run every step: the bucket is that of the largest rank, the answer the reference's."""
    config = exact_config(shared_expert_intermediate_size=8)
    runner = GraphRunner(optimized(config, group), (4, 8))
    expected = reference(config, group)
    for step, (counts, bucket) in enumerate(STEPS):
        hidden_TH = exact_tokens(config, counts[rank], seed=10 * step + rank)
        output_TH = runner(hidden_TH)
        assert runner.last_bucket == bucket, step
        assert torch.equal(output_TH, expected(hidden_TH)), step
    # Where the scheduler knows the counts, no rank asks the others.
    before = launch.COUNTS["largest_batch"]
    assert same_bits(runner(hidden_TH, max_tokens=max(counts)), output_TH)
    assert launch.COUNTS["largest_batch"] == before


def check_too_many(rank, group):
    """Give the last rank one token too many: all raise alike, and all go on."""
    config = exact_config()
    runner = GraphRunner(optimized(config, group), (2, 4))
    tokens = 5 if rank == group.size() - 1 else rank
    message = error_of(lambda: runner(exact_tokens(config, tokens)))
    assert message.startswith("ValueError: 5 tokens on a rank exceed the largest bucket (4)")
    hidden_TH = exact_tokens(config, rank)
    assert torch.equal(runner(hidden_TH), reference(config, group)(hidden_TH))


def check_poison(rank, group):
    """Poison all rows of all ranks' static buffers: the gathered padding leaks nowhere."""
    config = exact_config()
    runner = GraphRunner(optimized(config, group), (8,))
    hidden_TH = exact_tokens(config, 3 - rank % 3, seed=rank)
    expected_TH = runner(hidden_TH)
    runner.capture(8).hidden_NH.fill_(torch.nan)
    assert same_bits(runner(hidden_TH), expected_TH)


def check_tiers(rank, group):
    """Flip the kill switch between captures: each tier has a graph, and both stay alive."""
    config = exact_config()
    layer = optimized(config, group)
    runner = GraphRunner(layer, (4,))
    hidden_TH = exact_tokens(config, 4, seed=rank)
    expected_TH = runner(hidden_TH)
    by_peer = runner.capture(4)
    layer.set_kill_switch(True)
    assert same_bits(runner(hidden_TH), expected_TH)
    plain = runner.capture(4)
    assert plain is not by_peer
    # The switch is for new captures: the old graph still holds its kernels and memory.
    for captured, label in ((by_peer, "p2p"), (plain, "gloo")):
        captured.output_NH.zero_()
        before = launch.COUNTS.copy()
        captured.graph.replay()
        launched = launch.COUNTS - before
        assert launched[f"all_gather[{label}]"] == (3 if label == "gloo" else 1)
        assert launched[f"reduce_scatter[{label}]"] == 1
        assert same_bits(captured.output_NH, expected_TH)
    layer.set_kill_switch(False)
    assert runner.capture(4) is by_peer
    assert same_bits(runner(hidden_TH), expected_TH)


def check_launches(rank, group):
    """Count two replays on each tier: two of its collectives, none of any other's."""
    config = exact_config()
    hidden_TH = exact_tokens(config, rank)
    for tier, label in (
        (Tier.NVLS, "nvls (emulated)"),
        (Tier.P2P, "p2p"),
        (Tier.COLLECTIVE, "gloo"),
    ):
        runner = GraphRunner(optimized(config, group, transport=tier), (4,))
        runner.capture(4)
        before = launch.COUNTS.copy()
        for _ in range(2):
            runner(hidden_TH, max_tokens=4)
        launched = launch.COUNTS - before
        # Plain collectives gather ids, weights and rows one by one; our kernel all at once.
        gathers = 6 if tier is Tier.COLLECTIVE else 2
        collectives = {n: count for n, count in launched.items() if "[" in n or n == "barrier"}
        assert collectives == {f"all_gather[{label}]": gathers, f"reduce_scatter[{label}]": 2}


def check_batches(rank, group):
    """Every check of what a batch does, in one world."""
    check_buckets(rank, group)
    check_too_many(rank, group)
    check_poison(rank, group)


def check_graphs(rank, group):
    """Every check of which graph is replayed, in one world."""
    check_tiers(rank, group)
    check_launches(rank, group)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_buckets_and_errors(world_size, tmp_path):
    """Ragged and empty ranks, too many tokens, poisoned padding: all ranks alike."""
    run_spmd(check_batches, world_size, tmp_path)


def test_every_tier_has_its_graph_and_its_launches(tmp_path):
    """The kill switch captures anew and frees nothing; a replay counts its own tier only."""
    run_spmd(check_graphs, 2, tmp_path)
