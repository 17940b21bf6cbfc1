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


@dataclass(frozen=True)
class GemmTiles:
    """Column tile and depth step of one grouped GEMM, and how a GPU runs it."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @classmethod
    def choose(cls, columns: int, depth: int, itemsize: int, busy_tiles: float) -> "GemmTiles":
        """Large blocks for the interpreter, which pays by the operation; else Hopper's.

        ``busy_tiles``: row tiles that a batch of this size fills on average; a function of
        shapes alone.  Few of them leave multiprocessors idle unless columns are cut finer.
        """
        if INTERPRETED:
            block_n = min(max(triton.next_power_of_2(columns), 16), 512)
            block_k = min(max(triton.next_power_of_2(depth), 16), 1024)
            return cls(block_n, block_k, num_warps=1, num_stages=1)
        return cls(block_n=128, block_k=128 // itemsize, num_warps=4, num_stages=3)


class TritonBackend(SortedBackend):
    """Two fused kernels; runs any shape, on CUDA devices and in Triton's interpreter.

    Rounding: gate and up stay in fp32, h rounds to the model dtype, y stays in fp32.
    """

    name = "triton"

    @classmethod
    def unsupported(cls, config: MoEConfig, device: torch.device) -> str | None:
        """See ``ExpertBackend.unsupported``."""
        if config.dtype is torch.float64:
            return (
                f"dtype ({config.dtype}) is not available: the kernels accumulate in fp32; use "
                "the reference experts, or dtype float32, bfloat16 or float16"
            )
        if device.type == "cpu" and not INTERPRETED:
            return (
                "device (cpu) has no compiled kernels: Triton compiles for CUDA devices only; "
                "move the layer to cuda or set TRITON_INTERPRET=1"
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
        up = GemmTiles.choose(intermediate, hidden, x_MH.itemsize, busy)
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
        down = GemmTiles.choose(hidden, intermediate, x_MH.itemsize, busy)
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
