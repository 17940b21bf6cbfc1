"""Hugging Face configs and published geometries as MoEConfigs."""

import json
from dataclasses import replace

import pytest
import torch

from twinmoe.reference.config import ConfigError, MoEConfig
from twinmoe.reference.published import PUBLISHED, published, scaled

DEEPSEEK = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
QWEN3 = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}


#: As transformers 5 writes it.
QWEN3_OF_TRANSFORMERS_5 = {key: value for key, value in QWEN3.items() if key != "num_experts"} | {
    "num_local_experts": 128
}


@pytest.mark.parametrize(
    ("record", "name"),
    [
        (MIXTRAL, "mixtral-8x7b"),
        (QWEN3, "qwen3-30b-a3b"),
        (QWEN3_OF_TRANSFORMERS_5, "qwen3-30b-a3b"),
        (DEEPSEEK, "deepseek-v3"),
    ],
)
def test_a_published_config_json_is_its_published_geometry(record, name):
    """Reading a model's config.json gives the geometry that is recorded under its name."""
    assert MoEConfig.from_hf(json.loads(json.dumps(record))) == published(name)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_transformers_config_objects_are_read(name):
    """The config classes of transformers are read like their JSON, dtype included."""
    transformers = pytest.importorskip("transformers", reason="reads transformers' own configs")
    config = transformers.AutoConfig.for_model(name, hidden_size=64)
    config.dtype = torch.float16
    ours = MoEConfig.from_hf(config)
    assert ours.hidden_size == 64
    assert ours.dtype == torch.float16
    assert ours == MoEConfig.from_hf(config.to_dict())


def test_the_dtype_can_be_chosen():
    """An explicit dtype wins; a config that names none is bf16."""
    assert MoEConfig.from_hf(MIXTRAL, dtype=torch.float32).dtype == torch.float32
    unnamed = {key: value for key, value in MIXTRAL.items() if key != "torch_dtype"}
    assert MoEConfig.from_hf(unnamed).dtype == torch.bfloat16


def test_several_shared_experts_are_one_wider_expert():
    """n_shared_experts multiplies the width; none of them means no shared expert."""
    two = MoEConfig.from_hf(DEEPSEEK | {"n_shared_experts": 2})
    assert two.shared_expert_intermediate_size == 4096
    assert not MoEConfig.from_hf(DEEPSEEK | {"n_shared_experts": None}).has_shared_expert


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "llama"}, r"model_type \(llama\)"),
        ({}, r"model_type \(None\)"),
        ({"model_type": "mixtral"}, "has no hidden_size"),
        (MIXTRAL | {"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        (MIXTRAL | {"hidden_act": "swish"}, "swish"),
        ({"model_type": ["mixtral"]}, "model_type"),
        (DEEPSEEK | {"n_shared_experts": "1"}, r"n_shared_experts \(1\) must be an integer"),
        (7, "neither a dict nor a transformers config"),
    ],
)
def test_what_cannot_be_read_is_refused(config, words):
    """Unknown models, gaps and unsupported settings are named, never guessed."""
    with pytest.raises(ConfigError, match=words):
        MoEConfig.from_hf(config)


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (DEEPSEEK, {"topk_method": "greedy"}),
        (DEEPSEEK, {"swiglu_limit": 7.0}),
        (DEEPSEEK, {"num_experts": 128}),
        (QWEN3, {"scoring_func": "sigmoid"}),
        (QWEN3, {"n_group": 4}),
        (QWEN3, {"routed_scaling_factor": 2.5}),
        (QWEN3, {"n_shared_experts": 1}),
        (QWEN3_OF_TRANSFORMERS_5, {"num_experts": 64}),
        (MIXTRAL, {"norm_topk_prob": False}),
        (MIXTRAL, {"shared_expert_intermediate_size": 64}),
        (MIXTRAL, {"moe_router_bias": True}),
    ],
)
def test_a_setting_that_may_change_the_layer_is_never_dropped(base, changes):
    """Whatever speaks of experts, routing or activations is read, neutral, or refused by name."""
    (key, value), *_ = changes.items()
    with pytest.raises(ConfigError, match=rf"{key} \({value}\)"):
        MoEConfig.from_hf(base | changes)


def test_neutral_and_unrelated_settings_change_nothing():
    """What a model computes anyway, training, generation, and which layers have experts."""
    plain = {"scoring_func": "softmax", "n_group": 1, "topk_method": None, "swiglu_limit": None}
    other = {"output_router_logits": True, "mlp_only_layers": [1], "decoder_sparse_step": 2}
    assert MoEConfig.from_hf(QWEN3 | plain | other) == MoEConfig.from_hf(QWEN3)
    more = {"topk_method": "noaux_tc", "first_k_dense_replace": 3, "moe_layer_freq": 1, "top_k": 50}
    assert MoEConfig.from_hf(DEEPSEEK | more) == MoEConfig.from_hf(DEEPSEEK)
    assert MoEConfig.from_hf(MIXTRAL | {"norm_topk_prob": True}) == MoEConfig.from_hf(MIXTRAL)


def test_scaling_shrinks_sizes_and_keeps_the_routing():
    """Scaled sizes are multiples of 16, at least 16; experts, k and groups are untouched."""
    for config in PUBLISHED.values():
        assert scaled(config, 1) == config
        small = scaled(config, 60)
        sizes = {"hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size"}
        assert all(getattr(small, size) % 16 == 0 for size in sizes)
        assert min(small.hidden_size, small.moe_intermediate_size) >= 16
        assert small.has_shared_expert == config.has_shared_expert
        assert replace(small, **{size: getattr(config, size) for size in sizes}) == config
        assert scaled(config, 10**6).hidden_size == 16


def test_unknown_geometries_and_scales_are_refused():
    """The message lists the known names, or says what a scale is."""
    with pytest.raises(ConfigError, match=r"gpt-5.*mixtral-8x7b"):
        published("gpt-5")
    with pytest.raises(ConfigError, match=r"scale \(0\)"):
        scaled(published("mixtral-8x7b"), 0)
