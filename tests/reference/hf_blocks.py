"""MoE blocks of Hugging Face transformers and our layer, with shared weights.

Release 4.57, which has a module for each expert, and release 5 from 5.17 on, which stacks them.

Legend: T tokens, E experts, H hidden_size, K experts per token, F rows of w13 (gate, then up),
I intermediate size.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights

#: Small versions of the models' own configs.
_SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
    },
    "deepseek_v3": {
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 2,
    },
}
MODELS = tuple(_SIZES)


def hf_block(
    model: str, dtype: torch.dtype, seed: int, **changes: Any
) -> tuple[nn.Module, MoEConfig, MoEWeights]:
    """Return a transformers MoE block, and our config and weights of the same layer.

    ``changes`` are settings of the transformers config.  Skips the test where transformers is
    absent.
    """
    transformers = pytest.importorskip(
        "transformers", reason="compares with the MoE blocks of transformers"
    )
    hf_config = transformers.AutoConfig.for_model(model, **(_SIZES[model] | changes))
    config = MoEConfig.from_hf(hf_config, dtype=dtype)
    weights = MoEWeights.random(config, seed)
    block = _block_class(model)(hf_config).to(dtype).eval()
    with torch.no_grad():
        _fill(block, weights)
    return block, config, weights


def hf_forward(block: nn.Module, x_TH: torch.Tensor) -> torch.Tensor:
    """Run a block on tokens [T, H], whatever else it returns besides the hidden states."""
    with torch.no_grad():
        answer = block(x_TH.unsqueeze(0))
    hidden = answer[0] if isinstance(answer, tuple) else answer
    return hidden.squeeze(0)


def hf_routing(model: str, block: Any, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the experts [T, K] that a block chooses, and the weights that it gives them."""
    with torch.no_grad():
        answer = block.gate(x_TH)
    if stacks_experts(block):
        _, weights_TK, ids_TK = answer
        return ids_TK, weights_TK
    if model == "deepseek_v3":
        return answer
    scores_TE = torch.softmax(answer, dim=1, dtype=torch.float)
    weights_TK, ids_TK = torch.topk(scores_TE, block.top_k, dim=-1)
    if model == "mixtral" or block.norm_topk_prob:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return ids_TK, weights_TK.to(x_TH.dtype)


def stacks_experts(block: Any) -> bool:
    """Whether a block is one of release 5: two parameters hold the matrices of all experts."""
    return hasattr(block.experts, "gate_up_proj")


def _block_class(model: str) -> Callable[..., nn.Module]:
    if model == "mixtral":
        from transformers.models.mixtral import modeling_mixtral  # noqa: PLC0415 - heavy

        return modeling_mixtral.MixtralSparseMoeBlock
    if model == "qwen3_moe":
        from transformers.models.qwen3_moe import modeling_qwen3_moe  # noqa: PLC0415 - heavy

        return modeling_qwen3_moe.Qwen3MoeSparseMoeBlock
    from transformers.models.deepseek_v3 import modeling_deepseek_v3  # noqa: PLC0415 - heavy

    return modeling_deepseek_v3.DeepseekV3MoE


def _fill(block: Any, weights: MoEWeights) -> None:
    block.gate.weight.copy_(weights.router_EH)
    if weights.correction_bias_E is not None:
        # .to(dtype) of the block has cast this buffer too; the models keep it in fp32.
        block.gate.e_score_correction_bias = weights.correction_bias_E.clone()
    if stacks_experts(block):
        block.experts.gate_up_proj.copy_(weights.w13_LFH)
        block.experts.down_proj.copy_(weights.w2_LHI)
    else:
        for expert, w13_FH, w2_HI in zip(
            block.experts, weights.w13_LFH, weights.w2_LHI, strict=True
        ):
            _fill_mlp(expert, w13_FH, w2_HI)
    if weights.shared_w13_FH is not None:
        _fill_mlp(block.shared_experts, weights.shared_w13_FH, weights.shared_w2_HI)


def _fill_mlp(mlp: Any, w13_FH: torch.Tensor, w2_HI: torch.Tensor | None) -> None:
    names = ("w1", "w3", "w2") if hasattr(mlp, "w1") else ("gate_proj", "up_proj", "down_proj")
    for name, tensor in zip(names, (*w13_FH.chunk(2), w2_HI), strict=True):
        getattr(mlp, name).weight.copy_(tensor)
