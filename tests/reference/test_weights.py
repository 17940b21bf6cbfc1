"""Weights: seeded init, shards and copies."""

from dataclasses import replace

import pytest
import torch

from tests.reference.inputs import EVERYTHING, PLAIN, assert_same_weights, tokens
from twinmoe.reference.config import DTYPES, ConfigError, MoEConfig
from twinmoe.reference.layer import MoELayer
from twinmoe.reference.placement import Placement
from twinmoe.reference.published import PUBLISHED, scaled
from twinmoe.reference.weights import MoEWeights

CONFIG = MoEConfig(**EVERYTHING)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("settings", [EVERYTHING, PLAIN], ids=["everything", "plain"])
def test_random_weights_fit_their_config(settings, dtype):
    """Every tensor that the config calls for exists, in its dtype; the others are None."""
    config = MoEConfig(**settings, dtype=dtype)
    weights = MoEWeights.random(config, 0)
    weights.check(config, range(config.num_experts))
    assert weights.w13_LFH.shape == (config.num_experts, config.w13_rows, config.hidden_size)
    assert (weights.shared_w13_FH is None) == (not config.has_shared_expert)


def test_a_rank_draws_its_own_experts_alone():
    """A shard of the whole equals what the rank draws for itself, bit for bit."""
    whole = MoEWeights.random(CONFIG, 7)
    placement = Placement(CONFIG.num_experts, 4)
    for rank in range(4):
        own = MoEWeights.random(CONFIG, 7, experts=placement.experts_of(rank))
        assert_same_weights(own, whole.shard(placement, rank))


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    """Same seed, same weights; another seed, other weights; torch's global state is untouched."""
    before = torch.get_rng_state()
    one, same, other = (MoEWeights.random(CONFIG, seed) for seed in (3, 3, 4))
    assert_same_weights(one, same)
    assert not torch.equal(one.w2_LHI, other.w2_LHI)
    assert torch.equal(before, torch.get_rng_state())


def test_experts_gate_and_up_are_distinguishable():
    """Magnitudes differ from expert to expert and from gate to up, so that mix-ups show."""
    config = scaled(PUBLISHED["mixtral-8x7b"], 16)
    weights = MoEWeights.random(config, 0)
    size_E = weights.w2_LHI.float().square().mean(dim=(1, 2)).sqrt()
    assert (size_E.diff() > 0).all()
    gate, up = weights.w13_LFH.float().chunk(2, dim=1)
    assert up.std() / gate.std() == pytest.approx(2, rel=0.05)


def test_the_correction_bias_takes_both_signs_and_is_never_zero():
    """A neutral bias would hide that it is used in the wrong place."""
    bias_E = MoEWeights.random(CONFIG, 0).correction_bias_E
    assert bias_E is not None
    assert bias_E.dtype == torch.float32
    assert (bias_E > 0).sum() == (bias_E < 0).sum() == CONFIG.num_experts // 2


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_outputs_are_of_order_one(name, norm_topk_prob):
    """Outputs neither vanish in an absolute tolerance nor overflow fp16."""
    config = replace(
        scaled(PUBLISHED[name], 64), norm_topk_prob=norm_topk_prob, dtype=torch.float32
    )
    out_TH = MoELayer(config, MoEWeights.random(config, 0))(tokens(config, 32, seed=1))
    assert 0.1 < out_TH.square().mean().sqrt() < 10


def test_copy_keeps_the_storage():
    """copy_ changes values in place, so that a captured graph sees them."""
    target, source = MoEWeights.random(CONFIG, 1), MoEWeights.random(CONFIG, 2)
    addresses = [tensor.data_ptr() for tensor in target.tensors().values()]
    target.copy_(source)
    assert_same_weights(target, source)
    assert [tensor.data_ptr() for tensor in target.tensors().values()] == addresses


def test_misfits_are_refused():
    """Weights of other experts or another config are neither copied, sharded, saved nor used."""
    weights = MoEWeights.random(CONFIG, 1)
    placement = Placement(CONFIG.num_experts, 2)
    half = weights.shard(placement, 0)
    with pytest.raises(ConfigError, match="cannot replace"):
        weights.copy_(half)
    with pytest.raises(ConfigError, match=r"rank \(1\) owns range\(8, 16\)"):
        half.shard(placement, 1)
    with pytest.raises(ConfigError, match=r"weights hold range\(0, 8\)"):
        half.save("unused.safetensors", CONFIG)
    with pytest.raises(ConfigError, match="shared_gate_1H is not used by this config"):
        MoELayer(replace(CONFIG, shared_expert_gate=False), weights)
    with pytest.raises(ConfigError, match=r"experts \(range\(8, 24\)\)"):
        MoEWeights.random(CONFIG, 1, experts=range(8, 24))
