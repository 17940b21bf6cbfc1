"""Backend ``grouped_mm``: torch.nn.functional.grouped_mm over device-resident offsets.

Shapes: M rows, S slots, H hidden_size, I moe_intermediate_size, F rows of w13, L local
experts.
"""

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from twinmoe.optimized.experts.activation import activate
from twinmoe.optimized.experts.backend import SortedBackend
from twinmoe.optimized.experts.slots import SlotPlan
from twinmoe.reference.config import MoEConfig

#: grouped_mm refuses strides that are no multiple of this many bytes.
STRIDE_BYTES = 16


class GroupedMMBackend(SortedBackend):
    """Gather, grouped GEMM, activation, grouped GEMM.

    Rounding: gate and up, h and y each round to the model dtype.
    """

    name = "grouped_mm"

    @classmethod
    def unsupported(cls, config: MoEConfig, device: torch.device) -> str | None:
        """See ``ExpertBackend.unsupported``."""
        if config.dtype is torch.float64:
            return (
                f"dtype ({config.dtype}) is not available: grouped_mm takes up to 32 bits; use "
                "the reference experts, or dtype float32, bfloat16 or float16"
            )
        for setting in ("hidden_size", "moe_intermediate_size"):
            size = getattr(config, setting)
            if size * config.dtype.itemsize % STRIDE_BYTES:
                multiple = STRIDE_BYTES // config.dtype.itemsize
                return (
                    f"{setting} ({size}) must be a multiple of {multiple} in {config.dtype}: "
                    f"grouped_mm needs strides of {STRIDE_BYTES} bytes; use the triton backend"
                )
        return None if device.type == "cpu" else _unsupported_on_cuda(config, device)

    def sorted_rows(self, x_MH: Tensor, weights_MK: Tensor | None, plan: SlotPlan) -> Tensor:
        """See ``SortedBackend.sorted_rows``; in the model dtype."""
        weights = self.weights
        # Behind the last end lie repeats of slot 0: gathered, but no GEMM computes on them.
        x_SH = x_MH.index_select(0, plan.slots_S // plan.experts_per_row)
        if weights_MK is not None:
            weight_S = weights_MK.reshape(-1).index_select(0, plan.slots_S)
            x_SH = (weight_S[:, None] * x_SH.float()).to(x_MH.dtype)
        gate_up_SF = grouped_mm(x_SH, weights.w13_LFH.transpose(1, 2), offs=plan.ends_L)
        h_SI = activate(self.config, gate_up_SF, plan.ends_L[-1:])
        return grouped_mm(h_SI, weights.w2_LHI.transpose(1, 2), offs=plan.ends_L)


def _unsupported_on_cuda(config: MoEConfig, device: torch.device) -> str | None:
    """Outside this set PyTorch loops over groups and reads the offsets on the host."""
    major, minor = torch.cuda.get_device_capability(device)
    if major not in (9, 10):
        return (
            f"compute capability ({major}.{minor}) must be 9.x or 10.x: elsewhere grouped_mm "
            "synchronises with the host, which a graph cannot capture; use the triton backend"
        )
    if config.dtype is not torch.bfloat16:
        return (
            f"dtype ({config.dtype}) must be torch.bfloat16 on CUDA: for others grouped_mm "
            "synchronises with the host, which a graph cannot capture; use the triton backend"
        )
    return None
