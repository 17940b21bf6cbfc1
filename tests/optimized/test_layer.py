"""The inference layer computes what the reference computes, on every path.

Legend: T tokens, H hidden_size.
"""

import pytest
import torch

from tests.optimized.exact import (
    VARIANTS,
    exact_config,
    exact_tokens,
    exact_weights,
    graphed_forward,
    optimized,
    own_shard,
    random_tokens,
    reference,
)
from tests.reference.bounds import difference_bound
from tests.spmd import run_spmd
from twinmoe.optimized.communication.agreement import group_size
from twinmoe.optimized.communication.eligibility import Tier
from twinmoe.optimized.graph import GraphRunner
from twinmoe.optimized.layer import MoELayer
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights

#: Tokens of each rank: ragged, and none on one.
TOKENS = (5, 0, 3, 1)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BACKENDS = ("grouped_mm", "triton")


def outputs_of(layer, hidden_TH):
    """Return the layer's answers on both paths, by name."""
    return {"eager": layer(hidden_TH), "graphed": graphed_forward(layer, hidden_TH)}


def check_exact_layers(rank, group):
    """Compare every variant on every path bit for bit; tiers, backends and dtypes take turns."""
    for turn, settings in enumerate(VARIANTS.values()):
        tier = list(Tier)[turn % 3]
        backend = BACKENDS[turn // 3]
        config = exact_config(dtype=DTYPES[(turn + group_size(group)) % 3], **settings)
        hidden_TH = exact_tokens(config, TOKENS[rank], seed=rank)
        expected_TH = reference(config, group)(hidden_TH)
        layer = optimized(config, group, transport=tier, experts_backend=backend)
        for path, output_TH in outputs_of(layer, hidden_TH).items():
            assert torch.equal(output_TH, expected_TH), (settings, tier, config.dtype, path)


def check_exact_tiers(rank, group):
    """Compare one layer on every tier, replayed; the backends take turns."""
    config = exact_config(shared_expert_intermediate_size=8)
    hidden_TH = exact_tokens(config, TOKENS[rank], seed=rank)
    expected_TH = reference(config, group)(hidden_TH)
    for turn, tier in enumerate(Tier):
        layer = optimized(config, group, transport=tier, experts_backend=BACKENDS[turn % 2])
        output_TH = GraphRunner(layer, (8,))(hidden_TH, max_tokens=8)
        assert torch.equal(output_TH, expected_TH), tier


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_exact_layers_are_exact(settings):
    """The means of the other tests: the reference gives one answer, not all 0, in all dtypes."""
    outputs = []
    for dtype in (*DTYPES, torch.float64):
        config = exact_config(dtype=dtype, **settings)
        outputs.append(reference(config)(exact_tokens(config, 8)).double())
    assert outputs[0].count_nonzero() > outputs[0].numel() / 3
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_a_single_rank_equals_the_reference():
    """Without a process group: every variant, tier, backend and path, bit for bit."""
    check_exact_layers(0, None)
    check_exact_tiers(0, None)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_equal_the_reference(world_size, tmp_path):
    """Over one, two and four ranks: every variant, tier and backend, eager and graphed."""
    run_spmd(check_exact_layers, world_size, tmp_path)


def test_replays_of_two_ranks_equal_the_reference(tmp_path):
    """From captured graphs, on every tier."""
    run_spmd(check_exact_tiers, 2, tmp_path)


def check_random_layers(rank, group):
    """Compare layers that round, with the bound that their roundings allow."""
    for dtype in (torch.float32, torch.bfloat16):
        config = MoEConfig(
            hidden_size=24,
            moe_intermediate_size=16,
            num_experts=8,
            num_experts_per_tok=2,
            shared_expert_intermediate_size=8,
            dtype=dtype,
        )
        weights = MoEWeights.random(config, seed=3)
        hidden_TH = random_tokens(config, TOKENS[rank], seed=rank)
        expected_TH = reference(config, group, weights)(hidden_TH).double()
        bound_TH = difference_bound(config, weights, hidden_TH)
        for turn, tier in enumerate(Tier):
            backend = BACKENDS[turn % 2]
            layer = optimized(config, group, weights, transport=tier, experts_backend=backend)
            for path, output_TH in outputs_of(layer, hidden_TH).items():
                excess = (output_TH.double() - expected_TH).abs() - bound_TH
                assert not (excess > 0).any(), (dtype, tier, backend, path, excess.max())


def test_random_layers_stay_within_their_roundings(tmp_path):
    """fp32 and bf16, two ranks: as near to the reference as another order of summation is."""
    run_spmd(check_random_layers, 2, tmp_path)


def check_partials_in_the_model_dtype(rank, group):
    """Run an exact layer whose partial sums travel in bf16."""
    config = exact_config(num_experts_per_tok=2)
    hidden_TH = exact_tokens(config, TOKENS[rank], seed=rank)
    expected_TH = reference(config, group)(hidden_TH)
    for tier in Tier:
        layer = optimized(config, group, transport=tier, wire_dtype=config.dtype)
        layer.taps = {}
        assert torch.equal(graphed_forward(layer, hidden_TH), expected_TH), tier
        assert layer.taps["partial"].dtype is config.dtype


def test_partial_sums_may_travel_in_the_model_dtype(tmp_path):
    """Where they are exact in bf16, the answer is the same on every tier."""
    run_spmd(check_partials_in_the_model_dtype, 2, tmp_path)


def test_views_of_any_stride_are_taken():
    """Every second column, a transposed matrix, rows from an odd offset on: all the same."""
    config = exact_config()
    layer = optimized(config)
    hidden_TH = exact_tokens(config, 6)
    wide = torch.zeros(6, 2 * config.hidden_size, dtype=config.dtype)
    wide[:, ::2] = hidden_TH
    shifted = torch.cat([hidden_TH.new_ones(3), hidden_TH.flatten()])[3:].view(6, -1)
    expected_TH = layer(hidden_TH)
    for view in (wide[:, ::2], hidden_TH.t().contiguous().t(), shifted):
        assert torch.equal(layer(view), expected_TH)
        with layer.graphed():
            assert torch.equal(layer(view), expected_TH)
        assert torch.equal(GraphRunner(layer, (8,))(view), expected_TH)


@pytest.mark.parametrize("tier", list(Tier))
def test_no_rows_at_all_give_no_rows(tier):
    """[0, H] in, [0, H] out, on both paths."""
    config = exact_config(shared_expert_intermediate_size=8)
    layer = optimized(config, transport=tier)
    nothing = exact_tokens(config, 0)
    assert layer(nothing).shape == (0, config.hidden_size)
    with layer.graphed():
        assert layer(nothing).shape == (0, config.hidden_size)


def test_rows_without_padding_need_no_count():
    """On the graphed path every row is valid unless a count says otherwise."""
    config = exact_config()
    layer = optimized(config)
    hidden_TH = exact_tokens(config, 8)
    with layer.graphed():
        assert torch.equal(layer(hidden_TH), layer(hidden_TH, torch.tensor(8)))
        assert torch.equal(layer(hidden_TH), reference(config)(hidden_TH))


def test_padding_rows_hold_the_shared_expert_alone():
    """The routed part of a padding row is exactly 0; the shared expert takes what lies there."""
    config = exact_config(shared_expert_intermediate_size=8)
    layer = optimized(config)
    hidden_TH = exact_tokens(config, 5)
    layer.taps = {}
    with layer.graphed():
        layer(hidden_TH, torch.tensor([2]))
    assert layer.taps["routed"][2:].count_nonzero() == 0
    assert (layer.taps["ids"][2:] == -1).all()


def test_taps_name_every_stage():
    """A judge finds the intermediate tensors of both paths by name, and none unless it asks."""
    config = exact_config()
    layer = optimized(config)
    hidden_TH = exact_tokens(config, 3)
    layer(hidden_TH)
    assert layer.taps is None
    layer.taps = {}
    layer(hidden_TH)
    received = {"received_hidden", "received_ids"}
    assert layer.taps.keys() == {"ids", "weights", "expert_output", "routed"} | received
    layer.taps = {}
    graphed_forward(layer, hidden_TH)
    gathered = {"gathered_hidden", "gathered_ids", "gathered_weights"}
    assert layer.taps.keys() == {"ids", "weights", "partial", "routed"} | gathered


def test_no_gradients_are_kept():
    """Inference: weights and tokens that require gradients leave no graph of them behind."""
    config = exact_config(dtype=torch.float32)
    weights = own_shard(exact_weights(config), None)
    for tensor in weights.tensors().values():
        tensor.requires_grad_()
    layer = MoELayer(config, weights)
    hidden_TH = exact_tokens(config, 3).requires_grad_()
    for path, output_TH in outputs_of(layer, hidden_TH).items():
        assert not output_TH.requires_grad, path
