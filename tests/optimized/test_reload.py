"""Weights overwritten under live graphs: a replay computes with what lies in the storage now."""

from dataclasses import fields
from unittest import mock

import pytest
import torch

from tests.optimized.exact import (
    error_of,
    exact_config,
    exact_tokens,
    exact_weights,
    graphed_forward,
    optimized,
    own_shard,
    random_tokens,
    reference,
    same_bits,
)
from tests.spmd import run_spmd
from twinmoe.optimized.graph import GraphRunner
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights

#: Every weight tensor there is.
CONFIG = MoEConfig(
    hidden_size=24,
    moe_intermediate_size=16,
    num_experts=8,
    num_experts_per_tok=2,
    scoring_func="sigmoid",
    use_correction_bias=True,
    shared_expert_intermediate_size=8,
    shared_expert_gate=True,
)


def check_reload(rank, group, backend):
    """Reload under a live graph; compare both paths with a layer made of the new weights."""
    hidden_TH = random_tokens(CONFIG, 3 + rank, seed=rank)
    old, new = MoEWeights.random(CONFIG, seed=1), MoEWeights.random(CONFIG, seed=2)
    fresh = optimized(CONFIG, group, new, experts_backend=backend)
    # Weights of its own: reloading overwrites the tensors that the layer was given.
    given = MoEWeights.random(CONFIG, seed=1)
    layer = optimized(CONFIG, group, given, experts_backend=backend)
    runner = GraphRunner(layer, (8,))
    before_TH, captured = runner(hidden_TH), runner.capture(8)
    layer.reload(own_shard(new, group))
    assert same_bits(runner(hidden_TH), graphed_forward(fresh, hidden_TH))
    assert same_bits(layer(hidden_TH), fresh(hidden_TH))
    layer.reload(own_shard(old, group))
    assert same_bits(runner(hidden_TH), before_TH)
    assert not same_bits(before_TH, graphed_forward(fresh, hidden_TH))
    assert runner.capture(8) is captured


@pytest.mark.parametrize("backend", ["grouped_mm", "triton"])
def test_a_replay_after_reload_equals_a_fresh_layer(backend):
    """Router, bias, experts, shared expert and gate: all new, bit for bit, on both paths."""
    check_reload(0, None, backend)


def test_ranks_reload_together(tmp_path):
    """The same over two ranks, each with its own shard."""
    run_spmd(check_reload, 2, tmp_path, "grouped_mm")


@pytest.mark.parametrize("backend", ["grouped_mm", "triton"])
@pytest.mark.parametrize("name", ["router_EH", "w13_LFH", "w2_LHI"])
def test_a_replaced_tensor_is_not_seen_by_a_replay(backend, name):
    """As on a GPU: a graph holds addresses, so only copying into the old storage reaches it."""
    config = exact_config()
    layer = optimized(config, experts_backend=backend)
    runner = GraphRunner(layer, (8,))
    hidden_TH = exact_tokens(config, 8)
    before_TH = runner(hidden_TH)
    replacement = getattr(exact_weights(config, seed=9), name)
    object.__setattr__(layer.weights, name, replacement)
    assert same_bits(runner(hidden_TH), before_TH)
    assert not torch.equal(GraphRunner(layer, (8,))(hidden_TH), before_TH)


def test_weights_of_another_layer_are_refused_and_change_nothing():
    """Reloading keeps storage, hence shapes and experts; a refusal leaves the old weights."""
    config = exact_config()
    layer = optimized(config)
    hidden_TH = exact_tokens(config, 4)
    other = exact_weights(exact_config(moe_intermediate_size=16))
    assert "storage, shapes and dtypes stay" in error_of(lambda: layer.reload(other))
    assert torch.equal(layer(hidden_TH), reference(config)(hidden_TH))


def test_the_layer_reloads_every_tensor_that_weights_have():
    """The list of this file is complete: its layer has no weight tensor that is absent."""
    weights = MoEWeights.random(CONFIG, seed=0)
    assert all(getattr(weights, field.name) is not None for field in fields(weights))


def test_a_reload_refreshes_what_experts_derive() -> None:
    """Layouts of their own follow the weights, whichever backend has them."""
    config = exact_config()
    layer = optimized(config)
    with mock.patch.object(layer.experts, "refresh") as refreshed:
        layer.reload(exact_weights(config, seed=5))
    refreshed.assert_called_once_with()
