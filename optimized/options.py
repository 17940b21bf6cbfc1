"""How the inference layer runs: everything that is not mathematics."""

from dataclasses import dataclass

import torch

from twinmoe.optimized.communication.eligibility import Tier
from twinmoe.reference.config import ConfigError, MoEConfig


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """Choices of transport, backend and capacity; all ranks must be given the same.

    ``transport``: force a tier, None takes the best that every rank can use.
    ``disable_triton_nvls_kernels``: the kill switch, plain collectives only (Megatron's
    ``--inference-disable-triton-nvls-kernels``).
    ``experts_backend``: "auto" or the name of one backend.
    ``wire_dtype``: payload of the reduce-scatter, fp32 or the model's dtype.
    ``max_tokens_per_rank``: rows per rank that the symmetric buffers hold.
    """

    transport: Tier | None = None
    disable_triton_nvls_kernels: bool = False
    experts_backend: str = "auto"
    wire_dtype: torch.dtype = torch.float32
    max_tokens_per_rank: int = 256

    def check(self, config: MoEConfig) -> None:
        """Raise ConfigError for options that do not go with ``config``."""
        if self.wire_dtype not in (torch.float32, config.dtype):
            raise ConfigError(
                f"wire_dtype ({self.wire_dtype}) must be torch.float32 or the model's dtype "
                f"({config.dtype}): partial sums travel unrounded or as the model stores them; "
                "use one of the two"
            )
        if self.max_tokens_per_rank < 1:
            raise ConfigError(
                f"max_tokens_per_rank ({self.max_tokens_per_rank}) must be at least 1: buffers "
                "are sized from it; use the largest graph bucket"
            )
        if config.dtype is torch.float64:
            raise ConfigError(
                "dtype (torch.float64) has no inference kernels: they accumulate in fp32; use "
                "bfloat16, float16 or float32, or the reference layer"
            )
