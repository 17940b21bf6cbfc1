"""Swapping between the eager and the graphed path: never another answer, never a stuck state."""

import pytest
import torch

from tests.optimized.exact import (
    error_of,
    exact_config,
    exact_tokens,
    graphed_forward,
    optimized,
    random_tokens,
    reference,
    same_bits,
)
from tests.spmd import run_spmd
from twinmoe.optimized.communication.eligibility import Tier
from twinmoe.optimized.graph import GraphRunner
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights


def mode(layer):
    """Which path the next forward takes."""
    return layer.path_report().mode


def test_set_and_unset_are_idempotent():
    """Twice set is set, once unset is unset."""
    layer = optimized(exact_config())
    assert mode(layer) == "eager"
    for _ in range(2):
        layer.set_inference_cuda_graphed_iteration()
        assert mode(layer) == "graphed"
    for _ in range(2):
        layer.unset_inference_cuda_graphed_iteration()
        assert mode(layer) == "eager"


@pytest.mark.parametrize("start", ["eager", "graphed"])
def test_graphed_nests_and_restores(start):
    """Whatever was before is back afterwards, also when the body raises."""
    layer = optimized(exact_config())
    if start == "graphed":
        layer.set_inference_cuda_graphed_iteration()

    def fail_inside():
        with layer.graphed():
            raise KeyError("body")

    with layer.graphed():
        with layer.graphed():
            assert mode(layer) == "graphed"
        assert mode(layer) == "graphed"
        assert error_of(fail_inside) == "KeyError: 'body'"
        assert mode(layer) == "graphed"
    assert mode(layer) == start
    error_of(fail_inside)
    assert mode(layer) == start


def test_a_failed_forward_leaves_the_mode_and_the_layer_usable():
    """A refused batch inside ``graphed`` changes nothing for the next one."""
    config = exact_config()
    layer = optimized(config)
    hidden_TH = exact_tokens(config, 4)
    expected_TH = layer(hidden_TH)
    assert "do not fit" in error_of(lambda: graphed_forward(layer, hidden_TH[:, :4]))
    assert mode(layer) == "eager"
    assert same_bits(layer(hidden_TH), expected_TH)
    assert same_bits(graphed_forward(layer, hidden_TH), expected_TH)


def test_the_path_report_says_what_runs_and_why():
    """Mode, transport, backend and reason, as one line and by field."""
    layer = optimized(exact_config(), experts_backend="triton")
    assert str(layer.path_report()) == "eager: alltoall, triton experts, torch router"
    with layer.graphed():
        report = layer.path_report()
    assert str(report) == "graphed: p2p, triton experts, fused router"
    assert "nvls refused: rank 0: multicast_unavailable" in report.why
    assert report.why == f"{layer.transport_report()}; triton: asked for by name"
    assert layer.path_report().why == "not in a graph; triton: asked for by name"


def test_autocast_changes_nothing():
    """Casts of the layer are meant; those that autocast would add are not made, in either twin."""
    config = MoEConfig(
        hidden_size=64, moe_intermediate_size=32, num_experts=16, num_experts_per_tok=4,
        use_correction_bias=True, shared_expert_intermediate_size=32,
    )  # fmt: skip
    weights, hidden_TH = MoEWeights.random(config, 0), random_tokens(config, 64)
    layer, twin = (
        optimized(config, weights=weights, max_tokens_per_rank=64),
        reference(config, weights=weights),
    )
    calls = (layer, twin, lambda x: graphed_forward(layer, x, rows=64))
    before = [call(hidden_TH) for call in calls]
    with torch.autocast("cpu", torch.bfloat16):
        after = [call(hidden_TH) for call in calls]
    assert all(map(same_bits, before, after))


def check_toggling(rank, group):
    """Toggle a layer that rounds; each path repeats its own bits, on every tier."""
    config = MoEConfig(
        hidden_size=24, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2
    )
    weights = MoEWeights.random(config, seed=1)
    hidden_TH = random_tokens(config, (3, 0, 5, 1)[rank], seed=rank)
    for tier in (Tier.P2P, Tier.NVLS):
        layer = optimized(config, group, weights, transport=tier)
        runner = GraphRunner(layer, (8,))
        seen = []
        for _ in range(2):
            layer.unset_inference_cuda_graphed_iteration()
            eager_TH = layer(hidden_TH)
            layer.set_inference_cuda_graphed_iteration()
            graphed_TH = graphed_forward(layer, hidden_TH)
            layer.unset_inference_cuda_graphed_iteration()
            seen.append((eager_TH, graphed_TH, runner(hidden_TH, max_tokens=8)))
        for first, second in zip(*seen, strict=True):
            assert same_bits(first, second), tier
        assert same_bits(seen[0][1], seen[0][2]), tier


def test_toggling_repeats_the_same_bits_on_a_single_rank():
    """Eager, graphed, eager, graphed at expert-parallel size 1; a replay equals its capture."""
    check_toggling(0, None)


def test_toggling_repeats_the_same_bits_on_every_rank(tmp_path):
    """Eager, graphed, eager, graphed: A, B, A, B; a replay equals its capture."""
    run_spmd(check_toggling, 2, tmp_path)
