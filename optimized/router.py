"""InferenceTopKRouter: the routing of record in two kernel launches, no host involved.

Shapes: T tokens, H hidden_size, E experts, K experts per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from twinmoe.optimized.launch import launch
from twinmoe.optimized.router_kernels import router_logits, router_select
from twinmoe.optimized.triton_runtime import INTERPRETED, triton
from twinmoe.reference.config import ConfigError, MoEConfig
from twinmoe.reference.weights import MoEWeights


@dataclass(frozen=True)
class Routing:
    """Who computes each token: both tensors contiguous, as the fused all-gather ships them.

    ids_TK: int32 global expert ids, best first, -1 in padding rows.
    weights_TK: fp32 combine weights, 0 in padding rows.
    """

    ids_TK: Tensor
    weights_TK: Tensor


@dataclass(frozen=True)
class RouterTiles:
    """Block sizes of both kernels; a function of shapes alone, never of content."""

    block_t: int
    block_e: int
    block_h: int
    h_per_part: int
    select_block_t: int

    @classmethod
    def choose(cls, num_tokens: int, num_experts: int, hidden_size: int) -> "RouterTiles":
        """Few large blocks for the interpreter; on a GPU, enough programs to fill it.

        ``h_per_part`` does not depend on the number of tokens, so that neither do
        the sums.
        """
        if INTERPRETED:
            block_h = min(triton.next_power_of_2(hidden_size), 1024)
            block_t = min(triton.next_power_of_2(num_tokens), 128)
            block_e = min(triton.next_power_of_2(num_experts), 256)
            whole = triton.cdiv(hidden_size, block_h) * block_h
            return cls(block_t, block_e, block_h, whole, block_t)
        h_per_part = 512 if hidden_size <= 4096 else 1024
        return cls(block_t=4, block_e=8, block_h=256, h_per_part=h_per_part, select_block_t=1)


class InferenceTopKRouter:
    """Top-k routing by fused kernels: same mathematics as ``reference.router.TopKRouter``.

    Logits in fp32 (no tf32) whatever the dtype of x and of the weights; scores,
    selection and weights in fp32.  Experts and groups are ranked by the total order of that
    class, NaN and infinities included, and the K ids of a row are always distinct.

    Raises ConfigError if ``config.router_dtype`` is not fp32.
    """

    def __init__(self, config: MoEConfig, weights: MoEWeights) -> None:
        if config.router_dtype is not torch.float32:
            raise ConfigError(
                f"router_dtype ({config.router_dtype}) must be torch.float32 on the inference "
                "path: its router kernels score in fp32; set router_dtype=torch.float32 or use "
                "the reference router"
            )
        self.config = config
        self.weights = weights

    def __call__(self, x_TH: Tensor, num_valid: Tensor | None = None) -> Routing:
        """See ``forward``."""
        return self.forward(x_TH, num_valid)

    def forward(self, x_TH: Tensor, num_valid: Tensor | None = None) -> Routing:
        """Route ``x_TH``; rows from ``num_valid`` on are padding and never looked at.

        x_TH: [T, H] contiguous, fp32, fp16 or bf16.  num_valid: one int32 or int64 on
        the device of x_TH, so that a captured graph can be replayed with another
        count; None means that every row is valid.
        """
        config = self.config
        num_tokens, K = x_TH.shape[0], config.num_experts_per_tok
        ids_TK = torch.empty(num_tokens, K, dtype=torch.int32, device=x_TH.device)
        weights_TK = torch.empty(num_tokens, K, dtype=torch.float32, device=x_TH.device)
        if num_tokens == 0:
            return Routing(ids_TK, weights_TK)
        tiles = RouterTiles.choose(num_tokens, config.num_experts, config.hidden_size)
        partials_PTE = self._logits(x_TH, num_valid, tiles)
        self._select(partials_PTE, num_valid, ids_TK, weights_TK, tiles)
        return Routing(ids_TK, weights_TK)

    def _logits(self, x_TH: Tensor, num_valid: Tensor | None, tiles: RouterTiles) -> Tensor:
        num_tokens, H = x_TH.shape
        E = self.config.num_experts
        parts = triton.cdiv(H, tiles.h_per_part)
        partials_PTE = torch.empty(parts, num_tokens, E, dtype=torch.float32, device=x_TH.device)
        grid = (triton.cdiv(num_tokens, tiles.block_t), triton.cdiv(E, tiles.block_e), parts)
        launch(
            router_logits,
            grid,
            x_TH.contiguous(),
            self.weights.router_EH,
            partials_PTE if num_valid is None else num_valid,
            partials_PTE,
            num_tokens,
            H=H,
            E=E,
            HAS_NUM_VALID=num_valid is not None,
            H_PER_PART=tiles.h_per_part,
            BLOCK_T=tiles.block_t,
            BLOCK_E=tiles.block_e,
            BLOCK_H=tiles.block_h,
        )
        return partials_PTE

    def _select(
        self,
        partials_PTE: Tensor,
        num_valid: Tensor | None,
        ids_TK: Tensor,
        weights_TK: Tensor,
        tiles: RouterTiles,
    ) -> None:
        config, bias_E = self.config, self.weights.correction_bias_E
        parts, num_tokens, E = partials_PTE.shape
        launch(
            router_select,
            (triton.cdiv(num_tokens, tiles.select_block_t),),
            partials_PTE,
            partials_PTE if bias_E is None else bias_E,
            partials_PTE if num_valid is None else num_valid,
            ids_TK,
            weights_TK,
            num_tokens,
            E=E,
            K=config.num_experts_per_tok,
            PARTS=parts,
            N_GROUP=config.n_group,
            TOPK_GROUP=config.topk_group,
            SCORING=config.scoring_func,
            GROUP_SCORE=config.group_score,
            NORMALISE=config.norm_topk_prob,
            SCALE=config.routed_scaling_factor,
            HAS_BIAS=bias_E is not None,
            HAS_NUM_VALID=num_valid is not None,
            BLOCK_T=tiles.select_block_t,
            BLOCK_G=triton.next_power_of_2(config.n_group),
            BLOCK_M=triton.next_power_of_2(E // config.n_group),
            BLOCK_K=triton.next_power_of_2(config.num_experts_per_tok),
            BLOCK_P=triton.next_power_of_2(parts),
            num_warps=1 if E <= 256 else 4,
        )
