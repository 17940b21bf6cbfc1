"""How the inference layer runs: everything that is not mathematics."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from twinmoe.optimized.communication.agreement import describe, exchange
from twinmoe.optimized.communication.eligibility import Tier
from twinmoe.reference.config import ConfigError, MoEConfig


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """Choices of transport, backend and capacity; all ranks must be given the same.

    ``transport``: force a tier, None takes the best that every rank can use.
    ``disable_triton_nvls_kernels``: the kill switch, plain collectives only (Megatron's
    ``--inference-disable-triton-nvls-kernels``).
    ``experts_backend``: the name of one backend, or "auto": the quickest on record at this shape.
    ``experts_record``: where that is written, by ``twinmoe bench --record``; None for what was
    measured for this project.
    ``wire_dtype``: payload of the reduce-scatter, fp32 or the model's dtype.
    ``max_tokens_per_rank``: rows per rank that the symmetric buffers hold.
    ``pool``: layers of one name share symmetric memory, and run one after another on one stream;
    layers that overlap, two micro-batches in flight say, need names of their own.
    """

    transport: Tier | None = None
    disable_triton_nvls_kernels: bool = False
    experts_backend: str = "auto"
    experts_record: Path | None = None
    wire_dtype: torch.dtype = torch.float32
    max_tokens_per_rank: int = 256
    pool: str = "ep"

    def check(self, config: MoEConfig) -> None:
        """Raise ConfigError for options that do not go with ``config``."""
        if not isinstance(self.transport, Tier | None):
            raise ConfigError(
                f"transport ({self.transport!r}) is no tier: use one of "
                f"{', '.join(map(str, Tier))}, or None for the best that all ranks can run"
            )
        if self.wire_dtype not in (torch.float32, config.dtype):
            raise ConfigError(
                f"wire_dtype ({self.wire_dtype}) must be torch.float32 or the model's dtype "
                f"({config.dtype}): partial sums travel unrounded or as the model stores them; "
                "use one of the two"
            )
        if self.disable_triton_nvls_kernels and self.transport not in (None, Tier.COLLECTIVE):
            raise ConfigError(
                f"transport ({self.transport.value}) cannot be forced while "
                "disable_triton_nvls_kernels is set: the switch leaves plain collectives only; "
                "drop one of the two"
            )
        most = (2**31 - 1) // config.hidden_size
        if type(self.max_tokens_per_rank) is not int or not 1 <= self.max_tokens_per_rank <= most:
            raise ConfigError(
                f"max_tokens_per_rank ({self.max_tokens_per_rank!r}) must be an integer from 1 to "
                f"{most}: buffers are sized from it, and kernels number their elements in 32 bits; "
                "use the largest graph bucket"
            )
        if config.dtype is torch.float64:
            raise ConfigError(
                "dtype (torch.float64) has no inference kernels: they accumulate in fp32; use "
                "bfloat16, float16 or float32, or the reference layer"
            )


def check_agreement(
    config: MoEConfig,
    options: InferenceOptions,
    backend: str,
    failure: Exception | None,
    group: dist.ProcessGroup | None,
) -> None:
    """Go on only if all ranks can build their layer, and mean the same; a collective.

    ``backend`` is what this rank computes experts with, ``failure`` what it stumbled over.
    Raises it, or ConfigError on the others.
    """
    told = exchange((describe(failure), backend, config, options), group)
    if failure is not None:
        raise failure
    for rank, (stumbled_over, their_backend, *settings) in enumerate(told):
        if stumbled_over is not None:
            raise ConfigError(
                f"rank {rank} could not build its layer ({stumbled_over}): a group runs on all "
                "ranks or on none; correct it there"
            )
        for mine, theirs in zip((config, options), settings, strict=True):
            if mine != theirs:
                raise ConfigError(
                    f"rank {rank} asks for {theirs}, this one for {mine}: ranks that differ would "
                    "exchange rows of different meaning; pass the same on all ranks"
                )
        if their_backend != backend:
            raise ConfigError(
                f"rank {rank} computes experts with {their_backend}, this one with {backend}: "
                "their roundings differ, and 'auto' goes by what each machine has; name one in "
                "experts_backend"
            )
