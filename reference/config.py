"""The hyperparameters of one Mixture-of-Experts layer, checked when they are made."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import torch

from twinmoe.reference.config_checks import (
    DTYPES,
    ConfigError,
    check_dropless,
    check_experts,
    check_names,
    check_positive,
    check_routing,
    check_sizes,
    check_types,
    dtype_by_name,
    dtype_name,
)

__all__ = ["DTYPES", "ConfigError", "MoEConfig", "dtype_name"]


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """One MoE layer, in the words of Hugging Face ``config.json``.

    ====================================  ======================================================
    here (Hugging Face where it exists)   Megatron-Core
    ====================================  ======================================================
    ``hidden_size``                       ``--hidden-size``
    ``moe_intermediate_size``             ``--moe-ffn-hidden-size``
    ``num_experts``                       ``--num-experts``
    ``num_experts_per_tok``               ``--moe-router-topk``
    ``scoring_func``                      ``--moe-router-score-function``
    ``norm_topk_prob``                    ``--moe-router-pre-softmax`` inverted (softmax);
                                          always on for sigmoid with k > 1
    ``routed_scaling_factor``             ``--moe-router-topk-scaling-factor``
    ``n_group``                           ``--moe-router-num-groups``
    ``topk_group``                        ``--moe-router-group-topk``
    ``group_score``                       none: the sum of the topk/group_topk best scores
    ``use_correction_bias``               ``--moe-router-enable-expert-bias``
    ``hidden_act``                        ``activation_func`` (``--squared-relu`` is ``relu2``)
    ``gated``                             ``gated_linear_unit`` (``--swiglu``)
    ``swiglu_limit``                      ``activation_func_clamp_value``
    ``shared_expert_intermediate_size``   ``--moe-shared-expert-intermediate-size``
    ``shared_expert_gate``                ``--moe-shared-expert-gate``
    ``router_weight_on_input``            ``--moe-apply-probs-on-input``
    ``dtype``                             ``--bf16``, ``--fp16``
    ``router_dtype``                      ``--moe-router-dtype``
    ``expert_tensor_parallel_size``       ``--expert-tensor-parallel-size`` (only 1)
    ``moe_expert_capacity_factor``        ``--moe-expert-capacity-factor`` (only None)
    ``moe_pad_expert_input_to_capacity``  ``--moe-pad-expert-input-to-capacity`` (only off)
    ====================================  ======================================================

    ``shared_expert_intermediate_size`` 0 means that there is no shared expert.  The shared
    expert uses the same ``hidden_act``, ``gated`` and ``swiglu_limit`` as the routed ones.
    ``swiglu_limit`` L clamps the gate to at most L and the up projection to [-L, L].

    Raises ConfigError when the settings contradict each other or ask for what a dropless,
    expert-parallel layer does not do.
    """

    hidden_size: int
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    scoring_func: str = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "top2_sum"
    use_correction_bias: bool = False
    hidden_act: str = "silu"
    gated: bool = True
    swiglu_limit: float | None = None
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool = False
    router_weight_on_input: bool = False
    dtype: torch.dtype = torch.bfloat16
    router_dtype: torch.dtype = torch.float32
    expert_tensor_parallel_size: int = 1
    moe_expert_capacity_factor: float | None = None
    moe_pad_expert_input_to_capacity: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        check_sizes(self)
        check_names(self)
        check_routing(self)
        check_experts(self)
        check_dropless(self)

    @property
    def w13_rows(self) -> int:
        """Rows of one expert's first matrix: gate and up when gated, else up alone."""
        return (2 if self.gated else 1) * self.moe_intermediate_size

    @property
    def shared_w13_rows(self) -> int:
        """Rows of the shared expert's first matrix; 0 without a shared expert."""
        return (2 if self.gated else 1) * self.shared_expert_intermediate_size

    @property
    def has_shared_expert(self) -> bool:
        """Whether every token also passes through a shared expert."""
        return self.shared_expert_intermediate_size > 0

    @property
    def accumulate_dtype(self) -> torch.dtype:
        """The dtype of sums and activations: fp64 for an fp64 layer, else fp32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def check_ep_size(self, ep_size: int) -> None:
        """Raise ConfigError unless the experts can be dealt evenly to ``ep_size`` ranks."""
        check_positive("ep_size", ep_size, "a group has at least one rank")
        if self.num_experts % ep_size:
            raise ConfigError(
                f"num_experts ({self.num_experts}) must be divisible by ep_size ({ep_size}): each "
                "rank owns the same number of experts; use an ep_size that divides "
                f"{self.num_experts}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict; dtypes by their short names."""
        record = asdict(self)
        record["dtype"] = dtype_name(self.dtype)
        record["router_dtype"] = dtype_name(self.router_dtype)
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Undo ``to_dict``; raises ConfigError for unknown or missing keys and bad values."""
        if not isinstance(record, Mapping):
            raise ConfigError(
                f"config ({type(record).__name__}) is no mapping of settings: there is nothing to "
                "read; pass what to_dict returns"
            )
        known = {field.name for field in fields(cls)}
        if unknown := sorted(map(str, set(record) - known)):
            raise ConfigError(
                f"unknown setting(s) {', '.join(unknown)!s:.400}: MoEConfig does not know them and "
                "will not ignore them; remove them or correct their spelling"
            )
        required = ("hidden_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok")
        if missing := [name for name in required if name not in record]:
            raise ConfigError(
                f"missing setting(s) {', '.join(missing)}: they have no default; add them"
            )
        values = dict(record)
        for name in ("dtype", "router_dtype"):
            if name in values:
                values[name] = dtype_by_name(name, values[name])
        return cls(**values)

    @classmethod
    def from_hf(cls, config: Any, dtype: torch.dtype | None = None) -> "MoEConfig":
        """Read a Hugging Face config: see ``twinmoe.reference.from_hf``."""
        from twinmoe.reference.from_hf import config_from_hf  # noqa: PLC0415 - it imports us

        return config_from_hf(config, dtype)
