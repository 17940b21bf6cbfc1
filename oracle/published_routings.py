"""What published models choose of how many experts, on layers of tiny widths.

A kernel is right for some (experts, experts per token, groups) and wrong for others, whatever the
widths: so each model's routing is tried at widths that cost little.  Models are left out whose
mathematics MoEConfig does not express, such as Phi-3.5-MoE's sparse mixer.

Source: the models' public configs, written down from memory and not compared with the files.
"""

from typing import Any

from twinmoe.reference.config import MoEConfig

#: Hidden, intermediate and shared sizes: the narrowest that every backend takes.
NARROWEST = 16


def _softmax(experts: int, k: int, **settings: Any) -> MoEConfig:
    return MoEConfig(
        hidden_size=NARROWEST,
        moe_intermediate_size=NARROWEST,
        num_experts=experts,
        num_experts_per_tok=k,
        **settings,
    )


def _biased_sigmoid(experts: int, k: int, factor: float, **settings: Any) -> MoEConfig:
    settings |= {"scoring_func": "sigmoid", "use_correction_bias": True}
    return _softmax(experts, k, routed_scaling_factor=factor, **settings)


_SHARED = {"shared_expert_intermediate_size": NARROWEST}
_GATED = {**_SHARED, "shared_expert_gate": True}
_LLAMA_4 = {**_SHARED, "scoring_func": "sigmoid", "router_weight_on_input": True}
_SQUARED = {"hidden_act": "relu2", "gated": False}

#: By model; those that only repeat another's are left out.
ROUTINGS_OF_MODELS: dict[str, MoEConfig] = {
    "Mixtral": _softmax(8, 2),
    "DBRX": _softmax(16, 4),
    "MiniMax-Text-01": _softmax(32, 2),
    "Granite-3.0-1B-A400M": _softmax(32, 8),
    "Granite-3.0-3B-A800M": _softmax(40, 8),
    "OLMoE": _softmax(64, 8, norm_topk_prob=False),
    "Hunyuan-A13B": _softmax(64, 8, **_SHARED),
    "Qwen1.5-MoE": _softmax(60, 4, norm_topk_prob=False, **_GATED),
    "Qwen2-MoE": _softmax(64, 8, norm_topk_prob=False, **_GATED),
    "Qwen3-MoE": _softmax(128, 8),
    "Qwen3-Next": _softmax(512, 10, **_GATED),
    "DeepSeek-V2-Lite": _softmax(64, 6, norm_topk_prob=False, **_SHARED),
    "DeepSeek-V2": _softmax(
        160, 6, n_group=8, topk_group=3, group_score="max",
        norm_topk_prob=False, routed_scaling_factor=16.0, **_SHARED,
    ),
    "DeepSeek-V3": _biased_sigmoid(256, 8, 2.5, n_group=8, topk_group=4, **_SHARED),
    "Kimi-K2": _biased_sigmoid(384, 8, 2.827, **_SHARED),
    "GLM-4.5": _biased_sigmoid(160, 8, 2.5, **_SHARED),
    "GLM-4.5-Air": _biased_sigmoid(128, 8, 1.0, **_SHARED),
    "MiniMax-M2": _biased_sigmoid(256, 8, 1.0),
    "Nemotron-3-Nano": _biased_sigmoid(128, 6, 2.5, **_SHARED, **_SQUARED),
    "Llama-4-Scout": _softmax(16, 1, norm_topk_prob=False, **_LLAMA_4),
    "Llama-4-Maverick": _softmax(128, 1, norm_topk_prob=False, **_LLAMA_4),
    # What gpt-oss chooses of how many; its biases are left out.
    "gpt-oss-20b": _softmax(32, 4),
    "gpt-oss-120b": _softmax(128, 4),
}  # fmt: skip

#: What Kimi-K3 chooses of how many, its latent experts left out; too many to be drawn often.
KIMI_K3 = _biased_sigmoid(896, 16, 1.0)
