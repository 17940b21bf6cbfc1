"""The one layout of record: which tensors a layer has, in which shape and dtype.

Legend: H hidden_size, I moe_intermediate_size (of the shared expert in its own tensors),
F rows of w13 (2I gated, [gate | up]; I plain), E experts, L experts present.
"""

from dataclasses import dataclass

import torch

from twinmoe.reference.config import MoEConfig


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype that one weight tensor must have."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.dtype}"


#: Tensors with one slice per expert; the others are the same on every rank.
PER_EXPERT = ("w13_LFH", "w2_LHI")


def expected_tensors(config: MoEConfig, num_experts_present: int) -> dict[str, TensorSpec]:
    """Return every tensor that ``config`` calls for, by its name in MoEWeights."""
    H, E, L = config.hidden_size, config.num_experts, num_experts_present
    shapes: dict[str, tuple[int, ...]] = {
        "router_EH": (E, H),
        "w13_LFH": (L, config.w13_rows, H),
        "w2_LHI": (L, H, config.moe_intermediate_size),
    }
    if config.has_shared_expert:
        shapes["shared_w13_FH"] = (config.shared_w13_rows, H)
        shapes["shared_w2_HI"] = (H, config.shared_expert_intermediate_size)
    if config.shared_expert_gate:
        shapes["shared_gate_1H"] = (1, H)
    specs = {name: TensorSpec(shape, config.dtype) for name, shape in shapes.items()}
    if config.use_correction_bias:
        specs["correction_bias_E"] = TensorSpec((E,), torch.float32)
    return specs


def mismatches(
    tensors: dict[str, TensorSpec], config: MoEConfig, num_experts_present: int
) -> list[str]:
    """Say in one clause each what keeps ``tensors`` from being the weights of ``config``."""
    expected = expected_tensors(config, num_experts_present)
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is not used by this config" for name in tensors if name not in expected]
    problems += [
        f"{name} is {tensors[name]} instead of {spec}"
        for name, spec in expected.items()
        if name in tensors and tensors[name] != spec
    ]
    return problems
