"""Layers whose every value is exact in every dtype, so that all paths must agree bit for bit.

Tokens and expert weights are small integers, activations are relu.  The router's rows are
integers times 128 and its scores sigmoids, of which only 0, 1/2 and 1 then occur; combine
weights are such scores, unnormalised.  Nothing rounds, whatever the order of summation.

Legend: T tokens, H hidden_size.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from twinmoe.optimized.communication.agreement import group_rank, group_size
from twinmoe.optimized.layer import MoELayer
from twinmoe.optimized.options import InferenceOptions
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.layer import MoELayer as ReferenceLayer
from twinmoe.reference.placement import Placement
from twinmoe.reference.weights import MoEWeights

#: Where the fp32 sigmoid of any other multiple is exactly 0 or 1.
SATURATED = 128

#: One layer per thing that the two paths do differently, or in another place.
VARIANTS: dict[str, dict[str, Any]] = {
    "gated": {},
    "plain": {"gated": False, "num_experts_per_tok": 2},
    "shared": {"shared_expert_intermediate_size": 8, "routed_scaling_factor": 2.0},
    "shared and gated": {"shared_expert_intermediate_size": 8, "shared_expert_gate": True},
    "weight on input": {"router_weight_on_input": True, "routed_scaling_factor": 2.0},
    "groups and bias": {"n_group": 4, "topk_group": 2, "use_correction_bias": True},
}


def exact_config(**settings: Any) -> MoEConfig:
    """Return a small exact layer that both expert backends can run."""
    defaults: dict[str, Any] = {
        "hidden_size": 16,
        "moe_intermediate_size": 8,
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "scoring_func": "sigmoid",
        "norm_topk_prob": False,
        "hidden_act": "relu",
    }
    return MoEConfig(**(defaults | settings))


def exact_weights(config: MoEConfig, seed: int = 0) -> MoEWeights:
    """Draw all experts' weights from {-1, 0, 1}, mostly 0; the bias from multiples of 1/4."""
    weights = MoEWeights.random(config, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in weights.tensors().items():
        drawn = torch.randint(-1, 2, tensor.shape, generator=generator)
        if name == "correction_bias_E":
            tensor.copy_(drawn / 4)
            continue
        drawn *= torch.rand(tensor.shape, generator=generator) < 0.5
        tensor.copy_(drawn * (SATURATED if name in ("router_EH", "shared_gate_1H") else 1))
    return weights


def exact_tokens(config: MoEConfig, count: int, seed: int = 0) -> Tensor:
    """Draw tokens [T, H] from {-1, 0, 1}."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (count, config.hidden_size), generator=generator).to(config.dtype)


def random_tokens(config: MoEConfig, count: int, seed: int = 0) -> Tensor:
    """Draw standard normal tokens [T, H]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, config.hidden_size, generator=generator).to(config.dtype)


def own_shard(weights: MoEWeights, group: dist.ProcessGroup | None) -> MoEWeights:
    """Return this rank's part of ``weights``."""
    placement = Placement(len(weights.experts), group_size(group))
    return weights.shard(placement, group_rank(group))


def optimized(
    config: MoEConfig,
    group: dist.ProcessGroup | None = None,
    weights: MoEWeights | None = None,
    **options: Any,
) -> MoELayer:
    """Build this rank's inference layer, by default with exact weights and room for 16 rows."""
    shard = own_shard(weights or exact_weights(config), group)
    settings = {"max_tokens_per_rank": 16} | options
    return MoELayer(config, shard, group, InferenceOptions(**settings))


def reference(
    config: MoEConfig, group: dist.ProcessGroup | None = None, weights: MoEWeights | None = None
) -> ReferenceLayer:
    """Build this rank's reference layer with the same weights."""
    return ReferenceLayer(config, own_shard(weights or exact_weights(config), group), group)


def padded(hidden_TH: Tensor, rows: int, filler: float = torch.nan) -> tuple[Tensor, Tensor]:
    """Return the tokens among ``rows`` rows of which the others are padding, and their number."""
    hidden_NH = hidden_TH.new_full((rows, hidden_TH.shape[1]), filler)
    hidden_NH[: len(hidden_TH)] = hidden_TH
    return hidden_NH, torch.tensor([len(hidden_TH)], dtype=torch.int32)


def graphed_forward(layer: MoELayer, hidden_TH: Tensor, rows: int = 8) -> Tensor:
    """Run the graphed path without a graph, on a batch padded to ``rows`` with NaN."""
    with layer.graphed():
        output_NH: Tensor = layer(*padded(hidden_TH, rows))
    return output_NH[: len(hidden_TH)]


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, signs of zero and NaN payloads included."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    as_bytes = [t.contiguous().flatten().view(torch.uint8) for t in (left, right)]
    return torch.equal(*as_bytes)


def error_of(action: Any) -> str:
    """What ``action`` raises, as "Type: text"; "" if it does not raise."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
