"""Faults of activations, formats and the shared expert, from public reports of 2025 and 2026.

Legend: S slots, I intermediate size, F rows of w13.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.meta.survey.planting import planted
from twinmoe.optimized.experts import grouped_mm
from twinmoe.optimized.shared_expert import InferenceSharedExpert
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults.misread import misread
from twinmoe.oracle.faults.seams import Seams, Wrong
from twinmoe.oracle.faults.triggers import has_shared, has_tokens, is_gated, runs_triton
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.experts import ACTIVATIONS

# --- activations and formats --------------------------------------------------------------------


def _activations(seams: Seams, change: Callable[[MoEConfig, Tensor], Tensor]) -> None:
    """Let the grouped_mm backend's activation be ``change``, of (config, gate and up rows)."""

    def activate(original: Wrong, config: MoEConfig, gate_up_SF: Tensor, num_rows: Any) -> Tensor:
        right_SI: Tensor = original(config, gate_up_SF, num_rows)
        is_row_S = torch.arange(len(right_SI), device=right_SI.device) < num_rows
        return change(config, gate_up_SF).where(is_row_S[:, None], right_SI)

    seams.around(grouped_mm, "activate", activate)


def _grouped(case: Case) -> bool:
    return is_gated(case) and not runs_triton(case)


def _limited(case: Case) -> bool:
    silu = case.config.hidden_act == "silu"
    return _grouped(case) and silu and case.config.swiglu_limit is not None


@planted("PrimeIntellect-ai/prime-rl#2365", "experts", when=_limited)
def gate_clamped_below(seams: Seams) -> None:
    """The gate is clamped on both sides, as up is."""

    def change(config: MoEConfig, gate_up_SF: Tensor) -> Tensor:
        gate, up = gate_up_SF.float().clamp(-config.swiglu_limit, config.swiglu_limit).chunk(2, 1)
        return (F.silu(gate) * up).to(gate_up_SF.dtype)

    _activations(seams, change)


@planted("sgl-project/sglang-jax#1358", "experts", when=_limited)
def clamped_afterwards(seams: Seams) -> None:
    """The limit is applied to silu(gate), not to the gate."""

    def change(config: MoEConfig, gate_up_SF: Tensor) -> Tensor:
        limit, (gate, up) = config.swiglu_limit, gate_up_SF.float().chunk(2, 1)
        return (F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)).to(gate_up_SF.dtype)

    _activations(seams, change)


def _gate_and_up(config: MoEConfig, gate_up_SF: Tensor) -> tuple[Tensor, Tensor]:
    """Activated gate and up, in fp32."""
    gate, up = gate_up_SF.float().chunk(2, 1)
    if config.swiglu_limit is not None:
        gate = gate.clamp(max=config.swiglu_limit)
        up = up.clamp(-config.swiglu_limit, config.swiglu_limit)
    return ACTIVATIONS[config.hidden_act](gate), up


def _grouped_in(case: Case, *dtypes: torch.dtype) -> bool:
    return has_tokens(case) and not runs_triton(case) and case.config.dtype in dtypes


@planted(
    "huggingface/kernels-community#76",
    "experts",
    when=lambda case: case.config.gated and _grouped_in(case, torch.bfloat16, torch.float16),
)
def narrow_silu(seams: Seams) -> None:
    """The activated gate is rounded to the model's dtype before it meets up."""

    def change(config: MoEConfig, gate_up_SF: Tensor) -> Tensor:
        activated, up = _gate_and_up(config, gate_up_SF)
        return activated.to(gate_up_SF.dtype) * up.to(gate_up_SF.dtype)

    _activations(seams, change)


@planted("vllm-project/vllm#33972", "experts", when=lambda c: _grouped_in(c, torch.bfloat16))
def projected_in_half(seams: Seams) -> None:
    """Gate and up of a bf16 layer pass through fp16."""

    def activate(original: Wrong, config: MoEConfig, gate_up_SF: Tensor, num_rows: Any) -> Tensor:
        h_SI: Tensor = original(config, gate_up_SF.half().to(gate_up_SF.dtype), num_rows)
        return h_SI

    seams.around(grouped_mm, "activate", activate)


@planted(
    "vllm-project/vllm#13232",
    "experts",
    when=lambda case: case.config.gated and _grouped_in(case, torch.bfloat16),
)
def activated_in_half(seams: Seams) -> None:
    """The activations of a bf16 layer are stored in fp16 first."""

    def change(config: MoEConfig, gate_up_SF: Tensor) -> Tensor:
        activated, up = _gate_and_up(config, gate_up_SF)
        return (activated * up).half().to(gate_up_SF.dtype)

    _activations(seams, change)


@planted("ROCm/hip-ep#672", "experts", when=lambda c: _grouped_in(c, torch.bfloat16))
def down_in_half(seams: Seams) -> None:
    """Expert outputs of a bf16 layer pass through fp16 before the router's weight scales them."""

    def rows(original: Wrong, *args: Any) -> Tensor:
        y_SH: Tensor = original(*args)
        return y_SH.half().to(y_SH.dtype)

    seams.around(grouped_mm.GroupedMMBackend, "sorted_rows", rows)


# --- the shared expert ----------------------------------------------------------------------------


@planted(
    "NVIDIA-NeMo/Automodel#2173",
    "output",
    when=lambda case: has_shared(case) and case.config.swiglu_limit is not None,
)
def shared_unclamped(seams: Seams) -> None:
    """The limit of SwiGLU reaches the routed experts alone."""
    misread(seams, (InferenceSharedExpert,), lambda config: replace(config, swiglu_limit=None))


@planted(
    "NousResearch/torchtitan#36",
    "output",
    when=lambda case: has_shared(case) and case.config.shared_expert_gate,
)
def shared_gate_dropped(seams: Seams) -> None:
    """The shared expert's gate is loaded, and never used."""

    def construct(build: Wrong, part: Any, config: MoEConfig, weights: Any) -> None:
        build(part, config, weights)
        part.gate_1H = None

    seams.around(InferenceSharedExpert, "__init__", construct)
