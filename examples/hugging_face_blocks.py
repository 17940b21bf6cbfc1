"""MoE blocks of Hugging Face transformers before the judge (written for release 4.57).

    twinmoe check --subject examples/hugging_face_blocks.py:mixtral
    twinmoe check --subject examples/hugging_face_blocks.py:qwen3_moe
    twinmoe check --subject examples/hugging_face_blocks.py:deepseek_v3

Copy the part of your model: what its block reads of a config (``runs``), how it gets its
weights, and where its eager code rounds (the contract).

Legend: T tokens, H hidden_size, K experts per token, F rows of w13 (gate, then up).
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from twinmoe.oracle import RoundingContract, Taps, storage_contract
from twinmoe.oracle.contract import Ties
from twinmoe.oracle.plain_layer import PlainLayer
from twinmoe.oracle.rounding import FORMATS
from twinmoe.oracle.testing import neutral, runs
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights

# --- Mixtral and Qwen3-MoE --------------------------------------------------------------------


def softmax_contract(name: str, config: MoEConfig) -> RoundingContract:
    """Where the eager code of Mixtral and Qwen3-MoE rounds; torch.topk leaves ties open."""
    narrow = FORMATS[config.dtype]
    return replace(
        storage_contract(name, config.dtype),
        ties=Ties.ANY,
        logits=narrow,  # the router is a linear layer of the model's dtype
        router_weights=narrow,  # "we cast back to the input dtype"
        gate=narrow,  # act(gate) is a tensor of its own
        terms=narrow,  # expert output * weight
        combine=narrow,  # index_add_ into a tensor of the model's dtype
    )


def mixtral(config: MoEConfig, weights: MoEWeights, place: RankContext) -> PlainLayer:
    """MixtralSparseMoeBlock; it reads none of the settings, so ``neutral`` fits it."""
    block = MixtralSparseMoeBlock(
        MixtralConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            num_local_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
        )
    )
    return softmax_layer("mixtral", config, filled(block, config, weights, place))


@runs(lambda config: neutral(config, reads=("norm_topk_prob", "hidden_act")))
def qwen3_moe(config: MoEConfig, weights: MoEWeights, place: RankContext) -> PlainLayer:
    """Qwen3MoeSparseMoeBlock."""
    block = Qwen3MoeSparseMoeBlock(
        Qwen3MoeConfig(
            hidden_size=config.hidden_size,
            moe_intermediate_size=config.moe_intermediate_size,
            num_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            norm_topk_prob=config.norm_topk_prob,
            hidden_act=config.hidden_act,
        )
    )
    return softmax_layer("qwen3_moe", config, filled(block, config, weights, place))


def softmax_layer(name: str, config: MoEConfig, block: Any) -> PlainLayer:
    """Run the block, and show which experts it takes: the routing is computed inside it."""

    def forward(hidden_TH: Tensor) -> tuple[Tensor, Taps]:
        out_1TH, logits_TE = block(hidden_TH[None])
        scores_TE = torch.softmax(logits_TE, dim=1, dtype=torch.float)
        return out_1TH[0], Taps(ids_TK=scores_TE.topk(block.top_k, dim=-1).indices)

    return PlainLayer(forward, softmax_contract(name, config))


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
    """DeepseekV3MoE: the router is fp32, and so is the sum over experts."""
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
        )
    )
    filled(block, config, weights, place)
    narrow = FORMATS[config.dtype]
    stored = storage_contract("deepseek_v3", config.dtype)
    contract = replace(stored, ties=Ties.ANY, gate=narrow, reduced=narrow)

    def forward(hidden_TH: Tensor) -> tuple[Tensor, Taps]:
        return block(hidden_TH[None])[0], Taps(*block.gate(hidden_TH))

    return PlainLayer(forward, contract)


# --- weights ----------------------------------------------------------------------------------


@torch.no_grad()
def filled(block: Any, config: MoEConfig, weights: MoEWeights, place: RankContext) -> Any:
    """Give a block the judge's weights, in the config's dtype and on this rank's device."""
    block.to(config.dtype).to(place.device).eval()
    block.gate.weight.copy_(weights.router_EH)
    for expert, w13_FH, w2_HI in zip(block.experts, weights.w13_LFH, weights.w2_LHI, strict=True):
        fill_mlp(expert, w13_FH, w2_HI)
    if weights.shared_w13_FH is not None and weights.shared_w2_HI is not None:
        fill_mlp(block.shared_experts, weights.shared_w13_FH, weights.shared_w2_HI)
    bias_E = weights.correction_bias_E
    if bias_E is not None:
        # This release masks the experts of other groups with 0, not with -inf, which lets them
        # in once biased scores are negative.  A shift of all biases keeps the order of experts.
        block.gate.e_score_correction_bias = bias_E - bias_E.min()
    return block


def fill_mlp(mlp: nn.Module, w13_FH: Tensor, w2_HI: Tensor) -> None:
    """Rows of w13 are [gate | up]; Mixtral calls the three matrices w1, w3 and w2."""
    names = ("w1", "w3", "w2") if hasattr(mlp, "w1") else ("gate_proj", "up_proj", "down_proj")
    for name, tensor in zip(names, (*w13_FH.chunk(2), w2_HI), strict=True):
        getattr(mlp, name).weight.copy_(tensor)
