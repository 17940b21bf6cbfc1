"""Backend ``triton``: our own grouped GEMMs, gather and activation fused into the first.

Shapes: M rows, S slots, H hidden_size, I moe_intermediate_size, F rows of w13, L local
experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from twinmoe.optimized.experts.backend import SortedBackend
from twinmoe.optimized.experts.fused_kernels import expert_down, expert_gate_up
from twinmoe.optimized.experts.slots import SlotPlan
from twinmoe.optimized.launch import launch
from twinmoe.optimized.triton_runtime import INTERPRETED, triton
from twinmoe.reference.config import MoEConfig

#: Row tiles that leave a Hopper GPU's 132 multiprocessors hungry.
_FEW_TILES = 16


@dataclass(frozen=True)
class GemmTiles:
    """Column tile and depth step of one grouped GEMM, and how a GPU runs it.

    The best or within some percent of it in a sweep of 100 tiles on an H200, at the widths of
    Qwen3-30B-A3B and DeepSeek-V3 with 4 to 256 rows (docs/h200.md).
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @classmethod
    def choose(
        cls, columns: int, depth: int, itemsize: int, block_m: int, busy_tiles: float, first: bool
    ) -> "GemmTiles":
        """Tiles of the first GEMM, which holds a tile each of gate and up, or of the second.

        ``busy_tiles``: row tiles that a batch of this size fills on average; a function of
        shapes alone.  Of few of them each streams its weights in deeper steps.
        """
        if INTERPRETED:
            return cls._interpreted(columns, depth)
        if block_m > 16:
            return cls(64, (256 if block_m == 32 else 128) // itemsize, num_warps=4, num_stages=3)
        if not first:
            return cls(64, 256 // itemsize, num_warps=4, num_stages=4)
        if busy_tiles < _FEW_TILES:
            return cls(32, 512 // itemsize, num_warps=4, num_stages=3)
        return cls(32, 256 // itemsize, num_warps=4, num_stages=4)

    @classmethod
    def _interpreted(cls, columns: int, depth: int) -> "GemmTiles":
        """Large blocks: the interpreter pays by the operation."""
        block_n = min(max(triton.next_power_of_2(columns), 16), 512)
        block_k = min(max(triton.next_power_of_2(depth), 16), 1024)
        return cls(block_n, block_k, num_warps=1, num_stages=1)


class TritonBackend(SortedBackend):
    """Two fused kernels; runs any shape, on CUDA devices and in Triton's interpreter.

    Rounding: gate and up stay in fp32, h rounds to the model dtype, y stays in fp32.
    """

    name = "triton"

    @property
    def rows_dtype(self) -> torch.dtype:
        """See ``ExpertBackend.rows_dtype``: the accumulator's, unrounded."""
        return torch.float32

    @classmethod
    def unsupported(cls, config: MoEConfig, device: torch.device) -> str | None:
        """See ``ExpertBackend.unsupported``."""
        if config.dtype is torch.float64:
            return (
                f"dtype ({config.dtype}) is not available: the kernels accumulate in fp32; use "
                "the reference experts, or dtype float32, bfloat16 or float16"
            )
        return None

    def sorted_rows(self, x_MH: Tensor, weights_MK: Tensor | None, plan: SlotPlan) -> Tensor:
        """See ``SortedBackend.sorted_rows``; fp32."""
        config, weights = self.config, self.weights
        hidden, intermediate = config.hidden_size, config.moe_intermediate_size
        num_slots = plan.slots_S.shape[0]
        h_SI = x_MH.new_empty(num_slots, intermediate)
        y_SH = torch.empty(num_slots, hidden, dtype=torch.float32, device=x_MH.device)
        if num_slots == 0:
            return y_SH
        tiles = (plan.ends_L, plan.tile_expert_X, plan.tile_first_X)
        busy = self._busy_tiles(plan)
        up = GemmTiles.choose(intermediate, hidden, x_MH.itemsize, plan.block_m, busy, True)
        launch(
            expert_gate_up,
            self._grid(plan, intermediate, up),
            x_MH,
            weights_MK,
            plan.slots_S,
            *tiles,
            weights.w13_LFH,
            h_SI,
            K=plan.experts_per_row,
            ACT=config.hidden_act,
            GATED=config.gated,
            LIMIT=config.swiglu_limit,
            **self._constants(plan, up),
        )
        down = GemmTiles.choose(hidden, intermediate, x_MH.itemsize, plan.block_m, busy, False)
        launch(
            expert_down,
            self._grid(plan, hidden, down),
            h_SI,
            *tiles,
            weights.w2_LHI,
            y_SH,
            **self._constants(plan, down),
        )
        return y_SH

    def _busy_tiles(self, plan: SlotPlan) -> float:
        """Row tiles that uniform routing fills: of L experts, those that any slot chose."""
        local, slots = plan.ends_L.shape[0], plan.slots_S.shape[0]
        chosen = local * (1 - (1 - 1 / self.config.num_experts) ** slots)
        return max(chosen, slots * local / self.config.num_experts / plan.block_m)

    def _grid(self, plan: SlotPlan, columns: int, tiles: GemmTiles) -> tuple[int, int]:
        return plan.tile_expert_X.shape[0], triton.cdiv(columns, tiles.block_n)

    def _constants(self, plan: SlotPlan, tiles: GemmTiles) -> dict[str, int]:
        return {
            "H": self.config.hidden_size,
            "I": self.config.moe_intermediate_size,
            "L": plan.ends_L.shape[0],
            "BLOCK_M": plan.block_m,
            "BLOCK_N": tiles.block_n,
            "BLOCK_K": tiles.block_k,
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
        }
