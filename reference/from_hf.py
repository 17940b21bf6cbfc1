"""Reading Hugging Face ``config.json`` files, without importing transformers."""

from collections.abc import Callable, Mapping
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


def config_from_hf(config: Any, dtype: torch.dtype | None = None) -> MoEConfig:
    """Return the MoE layer that a Hugging Face config describes.

    ``config`` is a transformers config object or the dict of a ``config.json`` whose
    ``model_type`` is mixtral, qwen3_moe or deepseek_v3.  ``dtype`` None takes the config's own
    dtype, bf16 when it names none.  Quantisation settings are not read: the result describes the
    unquantised layer.  Raises ConfigError for other model types, missing settings, and settings
    that a MoEConfig refuses.
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
    if model_type not in _READERS:
        raise ConfigError(
            f"model_type ({model_type}) is not one of {', '.join(_READERS)}: the meaning of its "
            "settings is not known here; build a MoEConfig by hand"
        )
    try:
        return MoEConfig(dtype=dtype or _dtype_of(raw), **_READERS[model_type](raw))
    except KeyError as error:
        raise ConfigError(
            f"the {model_type} config has no {error.args[0]}: it is needed and has no default; "
            "pass a complete config.json"
        ) from error


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
    return {
        "hidden_size": raw["hidden_size"],
        "moe_intermediate_size": raw["moe_intermediate_size"],
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
        "shared_expert_intermediate_size": raw["moe_intermediate_size"]
        * (raw.get("n_shared_experts") or 0),
    }


_READERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v3": _deepseek_v3,
}


def _dtype_of(raw: dict[str, Any]) -> torch.dtype:
    stored = raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
    name = str(stored).removeprefix("torch.")
    if name not in _TORCH_DTYPES:
        raise ConfigError(
            f"dtype ({stored}) of the config is not supported: layers are stored in one of "
            f"{', '.join(_TORCH_DTYPES)}; pass dtype= to choose one"
        )
    return _TORCH_DTYPES[name]
