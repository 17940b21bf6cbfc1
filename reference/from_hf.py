"""Reading Hugging Face ``config.json`` files, without importing transformers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from twinmoe.reference.config import ConfigError, MoEConfig

#: Hugging Face writes dtypes with torch's names.
_TORCH_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

#: A setting with one of these words in its name may change what a MoE layer computes.
_WORDS = frozenset(
    (
        *("moe", "expert", "experts", "router", "routed", "routing", "route", "topk", "top"),
        *("gate", "gated", "gating", "scoring", "score", "scores", "group", "groups", "shared"),
        *("swiglu", "act", "activation", "mlp", "ffn", "capacity", "clamp", "limit", "correction"),
    )
)

#: Settings that have such a word and change nothing here: they belong to training or to text
#: generation, say how experts are run, or which of the model's layers are MoE layers at all
#: (this reads one MoE layer; HuggingFaceCheckpoint.layers lists them).
_IRRELEVANT = frozenset(
    (
        *("output_router_logits", "router_aux_loss_coef", "router_z_loss_coef"),
        *("router_jitter_noise", "expert_dropout", "top_k", "top_p", "num_beam_groups"),
        *("experts_implementation", "mlp_only_layers", "moe_layer_freq"),
    )
)


@dataclass(frozen=True)
class _Model:
    """How one model type is read.

    ``settings`` are a MoEConfig's, of a config.  ``reads`` names the keys that it looks at;
    ``neutral`` the values under which a key changes nothing.
    """

    settings: Callable[[dict[str, Any]], dict[str, Any]]
    reads: frozenset[str]
    neutral: Mapping[str, tuple[object, ...]]


def config_from_hf(config: Any, dtype: torch.dtype | None = None) -> MoEConfig:
    """Return the MoE layer that a Hugging Face config describes.

    ``config`` is a transformers config object or the dict of a ``config.json`` whose
    ``model_type`` is mixtral, qwen3_moe or deepseek_v3.  ``dtype`` None takes the config's own
    dtype, bf16 when it names none.  Quantisation settings are not read: the result describes the
    unquantised layer.  Which layers of the model have experts is not read either.  Raises
    ConfigError for other model types, missing settings, settings that a MoEConfig refuses, and
    any other setting whose name speaks of experts, routing or activations unless its value is
    the neutral one.
    """
    if isinstance(config, Mapping):
        raw = dict(config)
    elif hasattr(config, "to_dict"):
        raw = config.to_dict()
    else:
        raise ConfigError(
            f"config ({type(config).__name__}) is neither a dict nor a transformers config: there "
            "is nothing to read settings from; pass the parsed config.json"
        )
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in _MODELS:
        raise ConfigError(
            f"model_type ({model_type!s:.80}) is not one of {', '.join(_MODELS)}: the meaning of "
            "its settings is not known here; build a MoEConfig by hand"
        )
    model = _MODELS[model_type]
    try:
        settings = model.settings(raw)
    except KeyError as error:
        raise ConfigError(
            f"the {model_type} config has no {error.args[0]}: it is needed and has no default; "
            "pass a complete config.json"
        ) from error
    made = MoEConfig(dtype=dtype or _dtype_of(raw), **settings)
    for key, value in raw.items():
        _require_neutral(model_type, model, str(key), value, made)
    return made


def _require_neutral(
    model_type: str, model: _Model, key: str, value: object, made: MoEConfig
) -> None:
    """Refuse a setting that may change the layer and was not read."""
    words = frozenset(key.lower().split("_"))
    if key in model.reads or key.lstrip("_") in _IRRELEVANT or not words & _WORDS:
        return
    if key in ("num_experts", "num_local_experts", "n_routed_experts"):
        neutral: tuple[object, ...] = (made.num_experts,)
    else:
        neutral = model.neutral.get(key, (False, [], {}))
    if not any(value == one and type(value) is type(one) for one in (None, *neutral)):
        usual = " or ".join(str(one) for one in neutral[:1]) or "None"
        raise ConfigError(
            f"{key:.80} ({value!s:.80}) of the {model_type} config is not what this model computes "
            "here: it may change the layer, and nothing is ignored that may; remove it if it "
            f"changes nothing, use {usual}, or build a MoEConfig by hand"
        )


def _mixtral(raw: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": raw["hidden_size"],
        "moe_intermediate_size": raw["intermediate_size"],
        "num_experts": raw["num_local_experts"],
        "num_experts_per_tok": raw["num_experts_per_tok"],
        "hidden_act": raw["hidden_act"],
    }


def _qwen3_moe(raw: dict[str, Any]) -> dict[str, Any]:
    # transformers 5 writes the count of experts under Mixtral's name, 4 under a name of its own.
    experts = "num_local_experts" if "num_local_experts" in raw else "num_experts"
    return {
        "hidden_size": raw["hidden_size"],
        "moe_intermediate_size": raw["moe_intermediate_size"],
        "num_experts": raw[experts],
        "num_experts_per_tok": raw["num_experts_per_tok"],
        "norm_topk_prob": raw["norm_topk_prob"],
        "hidden_act": raw["hidden_act"],
    }


def _deepseek_v3(raw: dict[str, Any]) -> dict[str, Any]:
    shared = raw.get("n_shared_experts")
    if shared is not None and type(shared) is not int:
        raise ConfigError(
            f"n_shared_experts ({shared!s:.80}) must be an integer >= 0: it counts experts; "
            "use 0 or null for none"
        )
    size = raw["moe_intermediate_size"]
    return {
        "hidden_size": raw["hidden_size"],
        "moe_intermediate_size": size,
        "num_experts": raw["n_routed_experts"],
        "num_experts_per_tok": raw["num_experts_per_tok"],
        "scoring_func": raw.get("scoring_func", "sigmoid"),
        "norm_topk_prob": raw["norm_topk_prob"],
        "routed_scaling_factor": raw["routed_scaling_factor"],
        "n_group": raw["n_group"],
        "topk_group": raw["topk_group"],
        "group_score": "top2_sum",
        "use_correction_bias": True,
        "hidden_act": raw["hidden_act"],
        # transformers builds all shared experts as a single, wider one.
        "shared_expert_intermediate_size": size * shared if shared else 0,
    }


_EVERYWHERE = frozenset(("hidden_act", "num_experts_per_tok", "moe_intermediate_size"))

#: What a router is without DeepSeek's additions.
_PLAIN: dict[str, tuple[object, ...]] = {
    "scoring_func": ("softmax",),
    "topk_method": ("greedy",),
    "n_group": (1,),
    "topk_group": (1,),
    "routed_scaling_factor": (1.0, 1),
    "n_shared_experts": (0,),
    "num_shared_experts": (0,),
    "shared_expert_intermediate_size": (0,),
}

_MODELS: dict[str, _Model] = {
    "mixtral": _Model(
        _mixtral,
        frozenset(("hidden_act", "num_experts_per_tok", "num_local_experts")),
        {**_PLAIN, "norm_topk_prob": (True,)},
    ),
    "qwen3_moe": _Model(_qwen3_moe, _EVERYWHERE | {"norm_topk_prob"}, _PLAIN),
    "deepseek_v3": _Model(
        _deepseek_v3,
        _EVERYWHERE
        | {"n_routed_experts", "n_shared_experts", "scoring_func", "norm_topk_prob"}
        | {"routed_scaling_factor", "n_group", "topk_group"},
        {"topk_method": ("noaux_tc",)},
    ),
}


def _dtype_of(raw: dict[str, Any]) -> torch.dtype:
    stored = raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
    name = str(stored).removeprefix("torch.")
    if name not in _TORCH_DTYPES:
        raise ConfigError(
            f"dtype ({stored!s:.80}) of the config is not supported: layers are stored in one of "
            f"{', '.join(_TORCH_DTYPES)}; pass dtype= to choose one"
        )
    return _TORCH_DTYPES[name]
