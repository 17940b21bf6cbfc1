"""FlashInfer's fused MoE, as its documentation describes it, in plain PyTorch.

Stands in for the package on machines that cannot run it: rows [up | gate], int32 global ids,
fp32 scales, experts of other ranks and -1 skipped, results stored in the model dtype after
each GEMM and after the sum.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class ActivationType(IntEnum):
    """FlashInfer's names."""

    Gelu = 0
    Relu = 1
    Silu = 2
    Swiglu = 3
    Geglu = 4
    Relu2 = 6


_FUNCTIONS = {
    ActivationType.Gelu: F.gelu,
    ActivationType.Relu: F.relu,
    ActivationType.Silu: F.silu,
    ActivationType.Swiglu: F.silu,
    ActivationType.Geglu: F.gelu,
    ActivationType.Relu2: lambda x: F.relu(x).square(),
}


class AutoTuner:
    """Where FlashInfer asks for a tactic."""

    def choose_one(self, _operation: str, runners: list[Any]) -> list[int]:
        """Every tactic that would be measured."""
        tactics: list[int] = runners[0].get_valid_tactics([], None)
        return tactics


class FakeFlashInfer:
    """Both modules; ``tuned`` lists (tune_mode, buckets) of each call."""

    def __init__(self) -> None:
        self.tuned: list[tuple[bool, tuple[int, ...]]] = []
        self.fused_moe: Any = SimpleNamespace(
            cutlass_fused_moe=cutlass_fused_moe, ActivationType=ActivationType
        )
        self.autotuner: Any = SimpleNamespace(autotune=self._autotune, AutoTuner=AutoTuner)

    @contextmanager
    def _autotune(self, tune_mode: bool, tuning_buckets: tuple[int, ...]) -> Iterator[None]:
        self.tuned.append((tune_mode, tuning_buckets))
        yield


def cutlass_fused_moe(
    x_MH: Tensor,
    ids_MK: Tensor,
    scales_MK: Tensor,
    w31_LFH: Tensor,
    w2_LHI: Tensor,
    output_dtype: torch.dtype,
    quant_scales: list[Tensor],
    *,
    ep_size: int,
    ep_rank: int,
    output: Tensor,
    tune_max_num_tokens: int,
    activation_type: ActivationType,
) -> None:
    """Write the weighted sum of this rank's experts to ``output``."""
    assert ids_MK.dtype is torch.int32
    assert scales_MK.dtype is torch.float32
    assert output.dtype is output_dtype is x_MH.dtype
    assert tune_max_num_tokens >= len(x_MH)
    assert not quant_scales
    assert ep_rank < ep_size
    local = len(w2_LHI)
    gated = activation_type in (ActivationType.Swiglu, ActivationType.Geglu)
    act = _FUNCTIONS[activation_type]
    sum_MH = torch.zeros(x_MH.shape, dtype=torch.float32)
    for row, ids_K in enumerate(ids_MK.tolist()):
        for k, expert in enumerate(ids_K):
            mine = expert - ep_rank * local
            if not 0 <= mine < local:
                continue
            rows = (x_MH[row].float() @ w31_LFH[mine].float().T).to(output_dtype).float()
            up, gate = rows.chunk(2) if gated else (1.0, rows)
            h = (act(gate) * up).to(output_dtype).float()
            y = (h @ w2_LHI[mine].float().T).to(output_dtype).float()
            sum_MH[row] += scales_MK[row, k] * y
    output.copy_(sum_MH)
