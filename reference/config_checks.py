"""What a MoEConfig refuses, each with the value, the reason and the remedy."""

import sys
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from twinmoe.reference.config import MoEConfig

#: Storage dtypes a layer may use, by the short name used in records and reports.
DTYPES: dict[str, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

#: dtypes a router may score in.
ROUTER_DTYPES = ("fp32", "fp64")
SCORING_FUNCS = ("softmax", "sigmoid", "sqrtsoftplus")
GROUP_SCORES = ("top2_sum", "max")
HIDDEN_ACTS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2")


class ConfigError(ValueError):
    """A setting that cannot be honoured: says the value, why not, and what to use instead."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the short name of a storage dtype; raises ConfigError for any other dtype."""
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise ConfigError(f"dtype ({dtype}) is not supported: use one of {', '.join(DTYPES)}")


#: Sizes beyond it are a typing error, and their products no longer fit an index.
MAX_SIZE = 2**40

#: What a setting of each type may be, and how to say so.
_WANTED = {
    "int": "an integer",
    "bool": "True or False",
    "str": "a name",
    "float": "a finite number",
    "float | None": "a finite number or None",
}


def check_types(config: "MoEConfig") -> None:
    """Refuse what only looks like a setting: text for a switch, a switch for a count."""
    for field in fields(config):
        kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
        value = getattr(config, field.name)
        if not _is_of(kind, value):
            remedy = "write one" if field.default is MISSING else f"use {field.default}"
            raise ConfigError(
                f"{field.name} ({value!s:.80}) is no {kind}: {field.name} must be "
                f"{_WANTED[kind]}, and nothing is guessed from another type; {remedy}"
            )


def _is_of(kind: str, value: object) -> bool:
    match kind:
        case "int":
            return _is_int(value)
        case "bool":
            return isinstance(value, bool)
        case "str":
            return isinstance(value, str)
        case "float" | "float | None":
            return (value is None and "None" in kind) or _is_finite(value)
        case _:  # dtypes have words of their own
            return True


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max


def check_sizes(config: "MoEConfig") -> None:
    """Refuse sizes that are not counts."""
    check_positive("hidden_size", config.hidden_size, "a token has at least one feature")
    check_positive("moe_intermediate_size", config.moe_intermediate_size, "an expert has features")
    check_positive("num_experts", config.num_experts, "a layer has at least one expert")
    check_positive("num_experts_per_tok", config.num_experts_per_tok, "a token visits an expert")
    check_positive("n_group", config.n_group, "ungrouped experts are one group")
    check_positive("topk_group", config.topk_group, "at least one group is kept")
    size = config.shared_expert_intermediate_size
    if not _is_int(size) or size < 0:
        raise ConfigError(
            f"shared_expert_intermediate_size ({size}) must be an integer >= 0: it is a number "
            "of features; use 0 for no shared expert"
        )
    _check_held("shared_expert_intermediate_size", size)


def check_names(config: "MoEConfig") -> None:
    """Refuse functions and dtypes that the twins do not implement."""
    _one_of("scoring_func", config.scoring_func, SCORING_FUNCS)
    _one_of("group_score", config.group_score, GROUP_SCORES)
    _one_of("hidden_act", config.hidden_act, HIDDEN_ACTS)
    dtype_name(config.dtype)
    if config.router_dtype not in [DTYPES[name] for name in ROUTER_DTYPES]:
        raise ConfigError(
            f"router_dtype ({config.router_dtype}) is too coarse to rank experts: use one of "
            f"{', '.join(ROUTER_DTYPES)}"
        )


def check_routing(config: "MoEConfig") -> None:
    """Refuse routings in which a token cannot reach k distinct experts."""
    experts, k = config.num_experts, config.num_experts_per_tok
    n_group, topk_group = config.n_group, config.topk_group
    if k > experts:
        raise ConfigError(
            f"num_experts_per_tok ({k}) must not exceed num_experts ({experts}): a token "
            f"visits distinct experts; use at most {experts}"
        )
    if experts % n_group:
        raise ConfigError(
            f"num_experts ({experts}) must be divisible by n_group ({n_group}): each group "
            f"holds the same number of experts; use an n_group that divides {experts}"
        )
    if topk_group > n_group:
        raise ConfigError(
            f"topk_group ({topk_group}) must not exceed n_group ({n_group}): only existing "
            f"groups can be kept; use at most {n_group}"
        )
    reachable = topk_group * (experts // n_group)
    if k > reachable:
        raise ConfigError(
            f"num_experts_per_tok ({k}) must not exceed the {reachable} experts that the group "
            f"limit leaves (topk_group {topk_group} x {experts // n_group} experts per group): "
            "the rest may not be chosen; raise topk_group or lower num_experts_per_tok"
        )


def check_experts(config: "MoEConfig") -> None:
    """Refuse expert options that contradict each other."""
    if config.swiglu_limit is not None:
        if not config.gated:
            raise ConfigError(
                f"swiglu_limit ({config.swiglu_limit}) needs gated=True: it clamps the gate and "
                "the up projection; use None for a plain expert"
            )
        if config.swiglu_limit <= 0:
            raise ConfigError(
                f"swiglu_limit ({config.swiglu_limit}) must be finite and > 0: it bounds "
                "magnitudes; use None for no limit"
            )
    if config.shared_expert_gate and not config.has_shared_expert:
        raise ConfigError(
            "shared_expert_gate (True) needs a shared expert: there is nothing to gate; set "
            "shared_expert_intermediate_size > 0 or shared_expert_gate=False"
        )


def check_dropless(config: "MoEConfig") -> None:
    """Refuse what a dropless layer with whole experts does not do."""
    _only_default(
        "expert_tensor_parallel_size",
        config.expert_tensor_parallel_size,
        1,
        "every expert lies whole on one rank",
    )
    _only_default(
        "moe_expert_capacity_factor",
        config.moe_expert_capacity_factor,
        None,
        "no token is ever dropped, so experts have no capacity",
    )
    _only_default(
        "moe_pad_expert_input_to_capacity",
        config.moe_pad_expert_input_to_capacity,
        False,
        "routing maps are not padded to a capacity",
    )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_positive(name: str, value: int, why: str) -> None:
    """Raise ConfigError unless ``value`` is an integer of at least 1."""
    if not (_is_int(value) and value > 0):
        raise ConfigError(f"{name} ({value}) must be an integer >= 1: {why}; use 1 or more")
    _check_held(name, value)


def _check_held(name: str, value: int) -> None:
    if value > MAX_SIZE:
        raise ConfigError(
            f"{name} ({value!s:.40}) must be at most {MAX_SIZE:_}: no tensor here has so many "
            "rows; use less"
        )


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(
            f"{name} ({value!s:.80}) is unknown: only functions that both twins implement are "
            f"accepted; use one of {', '.join(allowed)}"
        )


def _only_default(name: str, value: object, default: object, why: str) -> None:
    if value != default:
        raise ConfigError(f"{name} ({value!s:.80}) is not supported: {why}; use {default}")


def dtype_by_name(setting: str, name: object) -> torch.dtype:
    """Undo ``dtype_name``; raises ConfigError naming the ``setting`` that held the name."""
    if not isinstance(name, str) or name not in DTYPES:
        raise ConfigError(
            f"{setting} ({name!s:.80}) is not a dtype name: records hold short names; use one of "
            f"{', '.join(DTYPES)}"
        )
    return DTYPES[str(name)]
