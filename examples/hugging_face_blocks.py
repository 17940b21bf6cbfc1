"""MoE blocks of Hugging Face transformers before the judge: releases 4.57, and 5 from 5.17 on.

    twinmoe check --subject examples/hugging_face_blocks.py:mixtral
    twinmoe check --subject examples/hugging_face_blocks.py:qwen2_moe
    twinmoe check --subject examples/hugging_face_blocks.py:qwen3_moe
    twinmoe check --subject examples/hugging_face_blocks.py:deepseek_v3

Copy the part of your model: what its block reads of a config (``runs``), how it gets its
weights, and where its eager code rounds (the contract).

Legend: T tokens, H hidden_size, E experts, L local experts, K experts per token, F rows of w13
(gate, then up), I intermediate size.
"""

from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DeepseekV3Config, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from twinmoe.oracle import RoundingContract, Taps, storage_contract
from twinmoe.oracle.contract import Ties
from twinmoe.oracle.plain_layer import PlainLayer
from twinmoe.oracle.rounding import FORMATS
from twinmoe.oracle.testing import neutral, runs
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights

#: Release 5 wrote these blocks anew: other layouts of weights, and other roundings.
RELEASE_5 = not transformers.__version__.startswith("4.")

#: Of the implementations of experts that release 5 has, the loop over experts, on any device.  It
#: is the only one of 4.57, which ignores the setting.  ``grouped_mm``, which release 5 prefers for
#: a whole model, rounds elsewhere, since it sums a token's terms in fp32, and wants aligned widths.
EAGER = {"experts_implementation": "eager"}


def eager_contract(name: str, config: MoEConfig, *points: str) -> RoundingContract:
    """Declare where the eager code of a block rounds to the model's dtype.

    In all of them torch.topk leaves ties open, and act(gate) is a tensor of its own;
    ``points`` are the others.
    """
    narrow = FORMATS[config.dtype]
    stored = storage_contract(name, config.dtype)
    return replace(stored, ties=Ties.ANY, gate=narrow, **dict.fromkeys(points, narrow))


# --- Mixtral, Qwen3-MoE and Qwen2-MoE ---------------------------------------------------------

#: The router is a linear layer of the model's dtype; weight * output is cast to that dtype, and
#: ``index_add_`` sums in it.
SOFTMAX_POINTS = ("logits", "terms", "combine")


def mixtral(config: MoEConfig, weights: MoEWeights, place: RankContext) -> PlainLayer:
    """MixtralSparseMoeBlock; it reads none of the settings, so ``neutral`` fits it."""
    block = MixtralSparseMoeBlock(
        MixtralConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            num_local_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            **EAGER,
        )
    )
    # 4.57 casts the router's weights back to the input's dtype, release 5 leaves them in fp32.
    points = SOFTMAX_POINTS if RELEASE_5 else (*SOFTMAX_POINTS, "router_weights")
    return layer_of(
        filled(block, config, weights, place), eager_contract("mixtral", config, *points)
    )


@runs(lambda config: neutral(config, reads=("norm_topk_prob", "hidden_act")))
def qwen3_moe(config: MoEConfig, weights: MoEWeights, place: RankContext) -> PlainLayer:
    """Qwen3MoeSparseMoeBlock; both releases cast the router's weights to the model's dtype."""
    block = Qwen3MoeSparseMoeBlock(
        Qwen3MoeConfig(
            hidden_size=config.hidden_size,
            moe_intermediate_size=config.moe_intermediate_size,
            num_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            norm_topk_prob=config.norm_topk_prob,
            hidden_act=config.hidden_act,
            **EAGER,
        )
    )
    contract = eager_contract("qwen3_moe", config, *SOFTMAX_POINTS, "router_weights")
    return layer_of(filled(block, config, weights, place), contract)


#: The shared expert's gate is a linear layer and a sigmoid of the model's dtype.
SHARED_GATE_POINTS = ("shared_gate_logits", "shared_gate_weights", "shared_terms")


def like_qwen2(config: MoEConfig) -> MoEConfig:
    """The layers that Qwen2MoeSparseMoeBlock can be: always with a gated shared expert."""
    return neutral(
        config,
        reads=("norm_topk_prob", "hidden_act"),
        shared_expert_intermediate_size=config.shared_expert_intermediate_size or 24,
        shared_expert_gate=True,
    )


@runs(like_qwen2)
def qwen2_moe(config: MoEConfig, weights: MoEWeights, place: RankContext) -> PlainLayer:
    """Qwen2MoeSparseMoeBlock: Qwen3's routed experts beside a shared one behind a sigmoid."""
    block = Qwen2MoeSparseMoeBlock(
        Qwen2MoeConfig(
            hidden_size=config.hidden_size,
            moe_intermediate_size=config.moe_intermediate_size,
            shared_expert_intermediate_size=config.shared_expert_intermediate_size,
            num_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            norm_topk_prob=config.norm_topk_prob,
            hidden_act=config.hidden_act,
            **EAGER,
        )
    )
    points = (*SOFTMAX_POINTS, "router_weights", *SHARED_GATE_POINTS)
    return layer_of(
        filled(block, config, weights, place), eager_contract("qwen2_moe", config, *points)
    )


# --- DeepSeek-V3 ------------------------------------------------------------------------------


def like_deepseek(config: MoEConfig) -> MoEConfig:
    """The layers that DeepseekV3MoE can be: groups of two experts at least, one shared expert."""
    reads = ("norm_topk_prob", "routed_scaling_factor", "hidden_act", "n_group", "topk_group")
    if config.n_group * 2 > config.num_experts:
        experts = max(2, config.num_experts)
        config = replace(config, n_group=1, topk_group=1, num_experts=experts)
    return neutral(
        config,
        reads=reads,
        scoring_func="sigmoid",
        use_correction_bias=True,
        shared_expert_intermediate_size=config.moe_intermediate_size,
    )


@runs(like_deepseek)
def deepseek_v3(config: MoEConfig, weights: MoEWeights, place: RankContext) -> PlainLayer:
    """DeepseekV3MoE: the router is fp32 in both releases."""
    block = DeepseekV3MoE(
        DeepseekV3Config(
            hidden_size=config.hidden_size,
            moe_intermediate_size=config.moe_intermediate_size,
            n_routed_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            norm_topk_prob=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
            hidden_act=config.hidden_act,
            n_shared_experts=1,
            **EAGER,
        )
    )
    # 4.57 sums the experts in the dtype of the router's weights, fp32, and casts the sum;
    # release 5 shares Mixtral's loop, which casts every term and sums in the model's dtype.
    points = ("terms", "combine") if RELEASE_5 else ("reduced",)
    return layer_of(
        filled(block, config, weights, place), eager_contract("deepseek_v3", config, *points)
    )


# --- a block as a layer -----------------------------------------------------------------------


def layer_of(block: Any, contract: RoundingContract) -> PlainLayer:
    """Run a block, and show which experts it takes."""

    def forward(hidden_TH: Tensor) -> tuple[Tensor, Taps]:
        answer = block(hidden_TH[None])
        out_1TH = answer[0] if isinstance(answer, tuple) else answer
        return out_1TH[0], routing_of(block, hidden_TH)

    return PlainLayer(forward, contract)


def routing_of(block: Any, hidden_TH: Tensor) -> Taps:
    """Ask the block's router once more: a block keeps its routing to itself."""
    match block.gate(hidden_TH):
        case (_, weights_TK, ids_TK):  # all of release 5
            return Taps(ids_TK, weights_TK)
        case (ids_TK, weights_TK):  # DeepSeek-V3 of 4.57
            return Taps(ids_TK, weights_TK)
        case logits_TE:  # a linear layer in 4.57, after which the block chooses
            scores_TE = torch.softmax(logits_TE, dim=1, dtype=torch.float)
            return Taps(ids_TK=scores_TE.topk(block.top_k, dim=-1).indices)


@torch.no_grad()
def filled(block: Any, config: MoEConfig, weights: MoEWeights, place: RankContext) -> Any:
    """Give a block the judge's weights, in the config's dtype and on this rank's device."""
    block.to(config.dtype).to(place.device).eval()
    block.gate.weight.copy_(weights.router_EH)
    fill_experts(block.experts, weights.w13_LFH, weights.w2_LHI)
    if weights.shared_w13_FH is not None and weights.shared_w2_HI is not None:
        gated = weights.shared_gate_1H is not None
        shared = block.shared_expert if gated else block.shared_experts
        fill_mlp(shared, weights.shared_w13_FH, weights.shared_w2_HI)
    if weights.shared_gate_1H is not None:
        block.shared_expert_gate.weight.copy_(weights.shared_gate_1H)
    bias_E = weights.correction_bias_E
    if bias_E is not None:
        # 4.57 masks the experts of other groups with 0, not with -inf, which lets them in once
        # biased scores are negative (huggingface/transformers#45440, mended in release 5).  A
        # shift of all biases keeps the order of experts.
        block.gate.e_score_correction_bias = bias_E if RELEASE_5 else bias_E - bias_E.min()
    return block


def fill_experts(experts: Any, w13_LFH: Tensor, w2_LHI: Tensor) -> None:
    """Release 5 stacks the experts' matrices as the judge does; 4.57 has a module for each."""
    if hasattr(experts, "gate_up_proj"):
        experts.gate_up_proj.copy_(w13_LFH)
        experts.down_proj.copy_(w2_LHI)
        return
    for expert, w13_FH, w2_HI in zip(experts, w13_LFH, w2_LHI, strict=True):
        fill_mlp(expert, w13_FH, w2_HI)


def fill_mlp(mlp: nn.Module, w13_FH: Tensor, w2_HI: Tensor) -> None:
    """Rows of w13 are [gate | up]; Mixtral of 4.57 calls the three matrices w1, w3 and w2."""
    names = ("w1", "w3", "w2") if hasattr(mlp, "w1") else ("gate_proj", "up_proj", "down_proj")
    for name, tensor in zip(names, (*w13_FH.chunk(2), w2_HI), strict=True):
        getattr(mlp, name).weight.copy_(tensor)
