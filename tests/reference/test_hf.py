"""The reference against the MoE blocks of Hugging Face transformers, with shared weights."""

import pytest
import torch

from tests.reference.bounds import difference_bound
from tests.reference.hf_blocks import MODELS, hf_block, hf_forward, hf_routing, stacks_experts
from tests.reference.inputs import tokens
from twinmoe.reference.layer import MoELayer

TOKENS = 40


def _compare(model, dtype, **changes):
    block, config, weights = hf_block(model, dtype, seed=0, **changes)
    x_TH = tokens(config, TOKENS, seed=1)
    if model == "deepseek_v3" and dtype == torch.float64 and not stacks_experts(block):
        # Before release 5 that block adds fp64 expert outputs into a buffer of its weights'
        # dtype, fp32, which torch refuses; widening the fp32 weights leaves their values alone.
        block.gate.register_forward_hook(lambda _gate, _x, out: (out[0], out[1].double()))
    theirs_TH = hf_forward(block, x_TH)
    ours_TH = MoELayer(config, weights)(x_TH)
    difference = (ours_TH.double() - theirs_TH.double()).abs()
    assert ours_TH.shape == theirs_TH.shape
    assert ours_TH.square().mean().sqrt() > 0.1
    assert (difference <= difference_bound(config, weights, x_TH)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("model", MODELS)
def test_the_layer_is_the_models_layer(model, dtype):
    """Mixtral's, Qwen3-MoE's and DeepSeek-V3's own blocks give the same, within derived bounds.

    Their routers score in fp32 also in an fp64 layer, and so does ours here.
    """
    _compare(model, dtype)


@pytest.mark.parametrize("changes", [{"norm_topk_prob": False}, {"hidden_act": "gelu"}])
@pytest.mark.parametrize("model", ["qwen3_moe", "deepseek_v3"])
def test_settings_mean_the_same(model, changes):
    """Normalisation and activation mean in our config what they mean in theirs."""
    _compare(model, torch.float32, **changes)


def test_masked_groups_differ_only_below_zero():
    """DeepSeek's block before release 5 masks groups with 0, ours with -inf: where that differs.

    With all biased scores of the kept group negative, a masked expert at 0 beats them there, and
    a token leaves the groups it was limited to (huggingface/transformers#45440).  Ours stays
    inside, and so does release 5's.  The comparisons above keep clear of this: their biases are
    smaller than the scores.
    """
    block, config, weights = hf_block("deepseek_v3", torch.float32, seed=0, topk_group=1)
    bias_E = torch.full((16,), -9.0)
    bias_E[4:8] = -2.0
    weights.correction_bias_E.copy_(bias_E)
    block.gate.e_score_correction_bias.copy_(bias_E)
    x_TH = tokens(config, TOKENS, seed=1)
    ours = MoELayer(config, weights).router(x_TH).ids_TK
    theirs, _ = hf_routing("deepseek_v3", block, x_TH)
    assert ((ours >= 4) & (ours < 8)).all()
    inside = (theirs >= 4) & (theirs < 8)
    assert inside.all() if stacks_experts(block) else not inside.any()
