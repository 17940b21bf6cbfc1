"""Seeded weights that make mix-ups visible.

Legend: H hidden_size, I intermediate size, F rows of w13, E experts, L experts present.
"""

import hashlib
import math
from collections.abc import Sequence

import torch

from twinmoe.reference import draws
from twinmoe.reference.config import MoEConfig

#: Standard deviations of router logits, gate (or the only projection of a plain expert) and up,
#: for inputs of unit variance.  Gate and up differ so that exchanged rows show in the result;
#: logits spread enough to rank experts.
LOGIT_SCALE = 1.5
GATE_SCALE = 1.0
UP_SCALE = 2.0


def random_tensors(config: MoEConfig, seed: int, experts: range) -> dict[str, torch.Tensor]:
    """Draw the weights of ``experts`` and of the replicated parts, on the CPU.

    Every expert has a stream of its own, keyed by (seed, tensor, expert id): an expert's
    weights do not depend on which other experts are drawn with it.  Outputs are O(1) for inputs
    of unit variance, and each expert has its own magnitude, so that exchanged experts or ranks
    show even in a norm.
    """
    H, I = config.hidden_size, config.moe_intermediate_size  # noqa: E741
    fan_in = 1 / math.sqrt(H)

    def normal(shape: Sequence[int], scale: float, *key: object) -> torch.Tensor:
        return draws.normal(shape, config.dtype, seed, *key, scale=scale)

    def w13(size: int, *key: object) -> torch.Tensor:
        gate = normal((size, H), GATE_SCALE * fan_in, "gate", *key)
        if not config.gated:
            return gate
        return torch.cat([gate, normal((size, H), UP_SCALE * fan_in, "up", *key)])

    def w2(expert: int) -> torch.Tensor:
        magnitude = 0.75 + 0.5 * (expert + 0.5) / config.num_experts
        return normal((H, I), magnitude * _output_gain(config) / math.sqrt(I), "w2", expert)

    tensors = {
        "router_EH": normal((config.num_experts, H), LOGIT_SCALE * fan_in, "router"),
        "w13_LFH": torch.stack([w13(I, expert) for expert in experts]),
        "w2_LHI": torch.stack([w2(expert) for expert in experts]),
    }
    if config.use_correction_bias:
        tensors["correction_bias_E"] = _correction_bias(config, seed)
    if config.has_shared_expert:
        size = config.shared_expert_intermediate_size
        tensors["shared_w13_FH"] = w13(size, "shared")
        tensors["shared_w2_HI"] = normal((H, size), 1 / math.sqrt(size), "w2", "shared")
    if config.shared_expert_gate:
        tensors["shared_gate_1H"] = normal((1, H), fan_in, "shared_gate")
    return tensors


def _output_gain(config: MoEConfig) -> float:
    # The combine adds k independent terms: weights that sum to one shrink it by sqrt(k), weights
    # of about one each grow it by sqrt(k).
    root_k = math.sqrt(config.num_experts_per_tok)
    sums_to_one = config.norm_topk_prob or config.scoring_func == "softmax"
    return root_k if sums_to_one else 1 / root_k


def _correction_bias(config: MoEConfig, seed: int) -> torch.Tensor:
    # Never zero, both signs, and as large as the gaps between neighbouring scores: large enough to
    # change selections, too small to decide them alone.
    generator = _generator(seed, "bias")
    typical = 1 / config.num_experts if config.scoring_func == "softmax" else 0.2
    magnitude_E = typical * (0.1 + 0.9 * torch.rand(config.num_experts, generator=generator))
    place_E = torch.randperm(config.num_experts, generator=generator)
    return torch.where(place_E % 2 == 0, magnitude_E, -magnitude_E)


def _generator(seed: int, *key: object) -> torch.Generator:
    text = "/".join(str(part) for part in (seed, *key))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
