"""Layers as public code writes them, each with the contract that it keeps.

Written in plain torch, as their authors do; what each stores, and where, is the point.

Legend: T tokens, H hidden_size, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from twinmoe.oracle.contract import RoundingContract, Scales, Ties, Weighs, storage_contract
from twinmoe.oracle.observation import Taps
from twinmoe.oracle.plain_layer import PlainLayer
from twinmoe.oracle.rounding import FORMATS
from twinmoe.oracle.testing import neutral, runs
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights

#: (rows of one expert, its w13 and w2, their router weights [n, 1]) -> its weighted outputs.
Expert = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def contract_of(config: MoEConfig, stored: str = "", **points: Any) -> RoundingContract:
    """Everything stored, ties open, ``stored`` points too, and ``points`` as they are given."""
    model = FORMATS[config.dtype]
    more = dict.fromkeys(stored.split(), model)
    return replace(storage_contract("known", config.dtype), ties=Ties.ANY, **more, **points)


def routed(config: MoEConfig, weights: MoEWeights, x_TH: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax scores in fp32, renormalised and scaled: weights and ids [T, K]."""
    scores = (x_TH.float() @ weights.router_EH.float().T).softmax(dim=-1)
    top, ids = scores.topk(config.num_experts_per_tok)
    return top / top.sum(dim=-1, keepdim=True) * config.routed_scaling_factor, ids


def summed(weights: MoEWeights, x_TH: Tensor, top: Tensor, ids: Tensor, expert: Expert) -> Tensor:
    """Each token's sum over its experts [T, H], in fp32."""
    out = torch.zeros(x_TH.shape)
    for index, (w13, w2) in enumerate(zip(weights.w13_LFH, weights.w2_LHI, strict=True)):
        token, slot = (ids == index).nonzero(as_tuple=True)
        out[token] += expert(x_TH[token], w13, w2, top[token, slot, None]).float()
    return out


def eager(x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """An MLP of torch operations, each of which stores its result."""
    gate, up = (x @ w13.T).chunk(2, dim=-1)
    return (silu(gate) * up) @ w2.T


def fused(x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """An MLP of one kernel, which stores h alone."""
    gate, up = (x.float() @ w13.float().T).chunk(2, dim=-1)
    return (silu(gate) * up).to(x.dtype).float() @ w2.float().T


def _shown(out: Tensor, config: MoEConfig, ids: Tensor) -> tuple[Tensor, Taps]:
    return out.to(config.dtype), Taps(ids_TK=ids)


# --- Megatron-Core: router weights multiply activations ---------------------------------------


def _megatron(config: MoEConfig, weights: MoEWeights, *, fuses: bool) -> PlainLayer:
    def expert(x: Tensor, w13: Tensor, w2: Tensor, probs: Tensor) -> Tensor:
        gate, up = (x @ w13.T).float().chunk(2, dim=-1)
        h = silu(gate) * up
        return ((h if fuses else h.to(x.dtype)) * probs).to(x.dtype) @ w2.T

    def forward(x_TH: Tensor) -> tuple[Tensor, Taps]:
        top, ids = routed(config, weights, x_TH)
        return _shown(summed(weights, x_TH, top, ids, expert), config, ids)

    points: dict[str, Any] = {"weighs": Weighs.ACTIVATION}
    points |= {"activation": None} if fuses else {}
    return PlainLayer(forward, contract_of(config, "weighted_activation", **points))


@runs(lambda config: neutral(config, reads=("routed_scaling_factor",)))
def megatron_fused(config: MoEConfig, weights: MoEWeights, _place: RankContext) -> PlainLayer:
    """SwiGLU and the router weight in one kernel."""
    return _megatron(config, weights, fuses=True)


def megatron(config: MoEConfig, weights: MoEWeights, _place: RankContext) -> PlainLayer:
    """Activation first, then a product that is stored too."""
    return _megatron(config, weights, fuses=False)


# --- Qwen2-MoE in transformers: a shared expert behind a sigmoid, all in 16 bits -----------------


@runs(
    lambda config: replace(
        neutral(config),
        shared_expert_intermediate_size=config.shared_expert_intermediate_size or 24,
        shared_expert_gate=True,
    )
)
def qwen2(config: MoEConfig, weights: MoEWeights, _place: RankContext) -> PlainLayer:
    """Gate logits, their sigmoid and the product are stored."""

    def expert(x: Tensor, w13: Tensor, w2: Tensor, weight: Tensor) -> Tensor:
        return eager(x, w13, w2) * weight

    def forward(x_TH: Tensor) -> tuple[Tensor, Taps]:
        top, ids = routed(config, weights, x_TH)
        out = summed(weights, x_TH, top, ids, expert).to(x_TH.dtype)
        shared = eager(x_TH, weights.shared_w13_FH, weights.shared_w2_HI)  # type: ignore[arg-type]
        return _shown(out + (x_TH @ weights.shared_gate_1H.T).sigmoid() * shared, config, ids)  # type: ignore[union-attr]

    shared = "shared_gate_logits shared_gate_weights shared_terms"
    return PlainLayer(forward, contract_of(config, f"gate reduced {shared}"))


# --- engines' DeepSeek: the routed sum is stored, then scaled, then the shared expert is added ---


@runs(
    lambda config: neutral(
        config, reads=("routed_scaling_factor", "shared_expert_intermediate_size")
    )
)
def scaled_sum(config: MoEConfig, weights: MoEWeights, _place: RankContext) -> PlainLayer:
    """Fused routed experts beside a shared expert of torch operations."""
    unscaled = replace(config, routed_scaling_factor=1.0)

    def expert(x: Tensor, w13: Tensor, w2: Tensor, weight: Tensor) -> Tensor:
        return fused(x, w13, w2) * weight

    def forward(x_TH: Tensor) -> tuple[Tensor, Taps]:
        top, ids = routed(unscaled, weights, x_TH)
        out = summed(weights, x_TH, top, ids, expert).to(x_TH.dtype) * config.routed_scaling_factor
        if weights.shared_w13_FH is not None and weights.shared_w2_HI is not None:
            out = out + eager(x_TH, weights.shared_w13_FH, weights.shared_w2_HI)
        return _shown(out, config, ids)

    points: dict[str, Any] = {"gate_up": None, "expert_output": None, "scales": Scales.SUM}
    return PlainLayer(
        forward, contract_of(config, "reduced scaled shared_activated_gate", **points)
    )


# --- gpt-fast: the whole router in 16 bits -----------------------------------------------------


def gpt_fast(config: MoEConfig, weights: MoEWeights, _place: RankContext) -> PlainLayer:
    """Softmax, top-k and division in the model's dtype."""

    def expert(x: Tensor, w13: Tensor, w2: Tensor, weight: Tensor) -> Tensor:
        return eager(x, w13, w2) * weight.float()

    def forward(x_TH: Tensor) -> tuple[Tensor, Taps]:
        top, ids = (x_TH @ weights.router_EH.T).softmax(dim=-1).topk(config.num_experts_per_tok)
        top = top / top.sum(dim=-1, keepdim=True)
        return _shown(summed(weights, x_TH, top, ids, expert), config, ids)

    router = "logits scores score_sum normalised_weights router_weights"
    return PlainLayer(forward, contract_of(config, f"{router} gate"))


#: Each of them, and what it declares beyond storing everything.
LAYERS = ("megatron_fused", "megatron", "qwen2", "scaled_sum", "gpt_fast")
