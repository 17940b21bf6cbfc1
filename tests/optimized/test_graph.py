"""The graph runner on one rank: buckets, padding, replays, and what a capture refuses.

Legend: T tokens, N rows of a bucket, H hidden_size.
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
from twinmoe.optimized import launch
from twinmoe.optimized.communication.errors import AllocationDuringCapture, TransportError
from twinmoe.optimized.communication.pool_setup import release_pools
from twinmoe.optimized.cpu_graph import CaptureError, CpuGraph
from twinmoe.optimized.graph import GraphRunner

CONFIG = exact_config(shared_expert_intermediate_size=8)


@pytest.fixture
def runner():
    """A runner with two buckets over an exact layer."""
    return GraphRunner(optimized(CONFIG), (4, 8))


@pytest.mark.parametrize("buckets", [(), (4, 2), (2, 2), (0, 4), (-1,)])
def test_buckets_are_ascending_positive_row_counts(buckets):
    """Anything else is refused, with the value and the rule."""
    message = error_of(lambda: GraphRunner(optimized(CONFIG), buckets))
    assert message.startswith(f"ValueError: buckets {buckets} must be distinct positive")


def test_no_bucket_exceeds_the_buffers():
    """The largest bucket is what the symmetric buffers were sized for, or less."""
    layer = optimized(CONFIG, max_tokens_per_rank=8)
    GraphRunner(layer, (8,))
    message = error_of(lambda: GraphRunner(layer, (1, 9)))
    assert "bucket 9 exceeds max_tokens_per_rank (8)" in message
    assert "raise it in InferenceOptions" in message


@pytest.mark.parametrize(("tokens", "bucket"), [(0, 4), (3, 4), (4, 4), (5, 8), (8, 8)])
def test_a_batch_takes_the_smallest_bucket_that_holds_it(runner, tokens, bucket):
    """One less than a bucket, the bucket, one more; and no token at all."""
    hidden_TH = exact_tokens(CONFIG, tokens)
    assert torch.equal(runner(hidden_TH), reference(CONFIG)(hidden_TH))
    assert runner.last_bucket == bucket


def test_a_batch_that_no_bucket_holds_is_refused(runner):
    """The message has the count, the limit and the ways out."""
    message = error_of(lambda: runner(exact_tokens(CONFIG, 9)))
    assert message.startswith("ValueError: 9 tokens on a rank exceed the largest bucket (8)")
    assert "add a bucket or split the batch" in message


def test_the_stated_maximum_holds_for_the_own_batch_too(runner):
    """A maximum below this rank's count would send the ranks to different buckets."""
    message = error_of(lambda: runner(exact_tokens(CONFIG, 5), max_tokens=4))
    assert message.startswith("ValueError: max_tokens (4) must be the largest count")
    assert "this rank has 5 tokens" in message
    runner(exact_tokens(CONFIG, 2), max_tokens=7)
    assert runner.last_bucket == 8


@pytest.mark.parametrize(
    "hidden",
    [
        torch.ones(3, 1, dtype=CONFIG.dtype),
        torch.ones(3, 16, dtype=torch.float32),
        torch.ones(16, dtype=CONFIG.dtype),
    ],
)
def test_a_batch_is_neither_broadcast_nor_cast_into_the_static_buffer(runner, hidden):
    """What the layer would refuse, the runner refuses."""
    assert "do not fit the layer" in error_of(lambda: runner(hidden))


def test_each_replay_sees_its_own_batch(runner):
    """Counts larger, smaller, none, larger, other tokens each time: nothing of before is left."""
    expected = reference(CONFIG)
    for step, tokens in enumerate((8, 5, 6, 0, 7, 1, 8)):
        hidden_TH = exact_tokens(CONFIG, tokens, seed=step)
        assert torch.equal(runner(hidden_TH, max_tokens=8), expected(hidden_TH)), step
    assert runner.capture(8).replays == 7


def test_the_same_batch_gives_the_same_bits(runner):
    """Also with another batch in between."""
    hidden_TH = exact_tokens(CONFIG, 6)
    first_TH, second_TH = runner(hidden_TH), runner(hidden_TH)
    runner(exact_tokens(CONFIG, 8, seed=1))
    assert same_bits(first_TH, second_TH)
    assert same_bits(first_TH, runner(hidden_TH))


def test_a_result_outlives_the_next_replay(runner):
    """The output is a copy: a later batch does not change an earlier answer."""
    first_TH = runner(exact_tokens(CONFIG, 8))
    kept_TH = first_TH.clone()
    runner(exact_tokens(CONFIG, 8, seed=1))
    assert same_bits(first_TH, kept_TH)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_padding_rows_do_not_leak(runner, poison):
    """Whatever lies behind the valid rows of the static buffer, no expert computes on it."""
    runner.layer.taps = {}
    hidden_TH = exact_tokens(CONFIG, 3)
    expected_TH = runner(hidden_TH, max_tokens=8)
    captured = runner.capture(8)
    captured.hidden_NH.fill_(poison)
    assert same_bits(runner(hidden_TH, max_tokens=8), expected_TH)
    assert captured.hidden_NH[3:].count_nonzero() == 5 * CONFIG.hidden_size
    ids, weights = captured.taps["gathered_ids"], captured.taps["gathered_weights"]
    assert (ids[3:] == -1).all()
    assert weights[3:].count_nonzero() == 0
    assert captured.taps["partial"][3:].count_nonzero() == 0


def test_a_bucket_is_captured_once(runner):
    """The graph and its static tensors stay; the layer's mode too."""
    first = runner.capture(4)
    runner(exact_tokens(CONFIG, 4))
    assert runner.capture(4) is first
    assert runner.capture(8) is not first
    assert runner.layer.path_report().mode == "eager"


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_inference_mode_may_come_and_go(runner, order):
    """A graph captured in inference mode replays outside it, and the other way round."""
    hidden_TH = exact_tokens(CONFIG, 4)
    for mode in order:
        with torch.inference_mode(mode):
            assert torch.equal(runner(hidden_TH), reference(CONFIG)(hidden_TH))


def test_no_gradient_flows_into_the_static_buffers(runner):
    """A batch that requires gradients leaves the next replay as it was."""
    hidden_TH = exact_tokens(CONFIG, 4).requires_grad_()
    assert not runner(hidden_TH).requires_grad
    assert not runner.capture(4).hidden_NH.requires_grad


def test_launches_are_counted_by_replay(runner):
    """Three replays launch each kernel three times as often as one does."""
    hidden_TH = exact_tokens(CONFIG, 4)
    runner(hidden_TH)
    before = launch.COUNTS.copy()
    runner(hidden_TH)
    once = launch.COUNTS - before
    assert {"all_gather[p2p]", "reduce_scatter[p2p]", "router_select"} <= once.keys()
    before = launch.COUNTS.copy()
    for _ in range(3):
        runner(hidden_TH)
    assert launch.COUNTS - before == {name: 3 * count for name, count in once.items()}


def test_a_graph_of_released_memory_is_captured_again(runner):
    """What was captured on symmetric memory that is gone is never replayed."""
    hidden_TH = exact_tokens(CONFIG, 4)
    before_TH, first = runner(hidden_TH), runner.capture(4)
    release_pools(None)
    with pytest.raises(TransportError, match="was released"):
        runner(hidden_TH)
    runner.layer.set_kill_switch(False)
    assert same_bits(runner(hidden_TH), before_TH)
    again = runner.capture(4)
    assert again is not first
    assert runner.layer.transport._pool.captured
    assert runner.capture(4) is again


def test_a_graph_of_collectives_has_no_memory_to_lose(runner):
    """Captured under the kill switch, it outlives the pool."""
    runner.layer.set_kill_switch(True)
    first = runner.capture(4)
    release_pools(None)
    runner.layer.set_kill_switch(True)
    assert runner.capture(4) is first


def test_no_transport_is_chosen_inside_a_capture(runner):
    """Symmetric memory is allocated before a capture, or not at all; afterwards all is well."""
    layer = runner.layer
    transport = layer.transport
    refused = pytest.raises(
        AllocationDuringCapture, match="select the transport before the capture"
    )
    with refused, CpuGraph().capture():
        layer.set_kill_switch(True)
    assert layer.transport is transport
    with pytest.raises(AllocationDuringCapture), CpuGraph().capture():
        optimized(CONFIG)
    hidden_TH = exact_tokens(CONFIG, 4)
    assert torch.equal(runner(hidden_TH), reference(CONFIG)(hidden_TH))


def test_the_eager_path_cannot_be_captured():
    """Its splits are read on the host; the error names the read, and the layer goes on."""
    layer = optimized(CONFIG)
    hidden_TH = exact_tokens(CONFIG, 4)
    with pytest.raises(CaptureError, match="on the host"), CpuGraph().capture():
        layer(hidden_TH)
    assert torch.equal(layer(hidden_TH), reference(CONFIG)(hidden_TH))
