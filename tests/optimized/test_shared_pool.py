"""Several layers on one group: they share its symmetric memory and nothing else."""

import torch

from tests.optimized.exact import (
    error_of,
    exact_config,
    exact_tokens,
    graphed_forward,
    optimized,
    reference,
)
from tests.spmd import run_spmd
from twinmoe.optimized.communication.eligibility import Tier
from twinmoe.optimized.communication.pool_setup import release_pools
from twinmoe.optimized.graph import GraphRunner

SMALL = exact_config()
LARGE = exact_config(hidden_size=40, num_experts=16, num_experts_per_tok=5, dtype=torch.float32)
HUGE = exact_config(hidden_size=64)


def check_growth(rank, group):
    """Build a larger layer after a smaller one has run: both work in the pool that has grown."""
    hidden_TH, wide_TH = exact_tokens(SMALL, 3, seed=rank), exact_tokens(LARGE, 5, seed=rank)
    expected_TH = reference(SMALL, group)(hidden_TH)
    expected_wide_TH = reference(LARGE, group)(wide_TH)
    small = optimized(SMALL, group)
    assert torch.equal(graphed_forward(small, hidden_TH), expected_TH)
    bytes_before = small.transport.report().pool_bytes
    large = optimized(LARGE, group)
    assert small.transport.report().pool_bytes > bytes_before
    assert torch.equal(graphed_forward(small, hidden_TH), expected_TH)
    assert torch.equal(graphed_forward(large, wide_TH), expected_wide_TH)
    assert torch.equal(graphed_forward(small, hidden_TH), expected_TH)


def check_alternation(rank, group):
    """Replay graphs of two layers and two tiers in turns, with plain forwards in between."""
    layers = [
        (SMALL, GraphRunner(optimized(SMALL, group), (2, 8))),
        (LARGE, GraphRunner(optimized(LARGE, group), (4, 8))),
        (LARGE, GraphRunner(optimized(LARGE, group, transport=Tier.NVLS), (8,))),
    ]
    for step, tokens in enumerate((6, 1)):
        for config, runner in layers:
            hidden_TH = exact_tokens(config, tokens, seed=step * 10 + rank)
            expected_TH = reference(config, group)(hidden_TH)
            assert torch.equal(runner(hidden_TH), expected_TH)
            assert torch.equal(graphed_forward(runner.layer, hidden_TH), expected_TH)
    return layers


def check_overflow(rank, group, layers):
    """Ask for more than the pool has, now that graphs hold its addresses: all ranks refuse."""
    message = error_of(lambda: optimized(HUGE, group))
    assert message.startswith("SymmetricBufferOverflow: pool 'ep' needs")
    assert "captured graphs hold its addresses" in message
    assert "before capturing" in message
    # Without symmetric memory there is nothing to overflow.
    hidden_TH = exact_tokens(HUGE, 3, seed=rank)
    plain = optimized(HUGE, group, transport=Tier.COLLECTIVE)
    assert torch.equal(graphed_forward(plain, hidden_TH), reference(HUGE, group)(hidden_TH))
    for config, runner in layers:
        hidden_TH = exact_tokens(config, 7, seed=rank)
        assert torch.equal(runner(hidden_TH), reference(config, group)(hidden_TH))


def check_all(rank, group):
    """Every check of this file, in one world and on one pool."""
    check_growth(rank, group)
    layers = check_alternation(rank, group)
    check_overflow(rank, group, layers)


def test_layers_of_two_ranks_share_a_pool(tmp_path):
    """Grown before captures, alternated under them, refused after them: on all ranks alike."""
    run_spmd(check_all, 2, tmp_path)


def test_a_batch_beyond_the_buffers_is_refused():
    """More rows than max_tokens_per_rank do not fit; the message says what to enlarge."""
    layer = optimized(SMALL, max_tokens_per_rank=4)
    message = error_of(lambda: graphed_forward(layer, exact_tokens(SMALL, 9), rows=9))
    assert message.startswith("SymmetricBufferOverflow: all-gather needs")
    assert "larger capacity" in message
    hidden_TH = exact_tokens(SMALL, 4)
    output_TH = graphed_forward(layer, hidden_TH, rows=4)
    assert torch.equal(output_TH, reference(SMALL)(hidden_TH))


def test_a_released_pool_is_not_used():
    """A layer whose symmetric memory is gone raises; choosing a transport anew revives it."""
    layer = optimized(SMALL)
    hidden_TH = exact_tokens(SMALL, 4)
    release_pools(None)
    assert "was released" in error_of(lambda: graphed_forward(layer, hidden_TH))
    layer.set_kill_switch(False)
    assert torch.equal(graphed_forward(layer, hidden_TH), reference(SMALL)(hidden_TH))
