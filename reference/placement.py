"""Which rank owns which expert.

Legend: T tokens, K experts per token.
"""

from dataclasses import dataclass

import torch

from twinmoe.reference.config import ConfigError


@dataclass(frozen=True)
class Placement:
    """Contiguous, even placement: rank r owns experts [r * L, (r + 1) * L).

    Raises ConfigError unless ``ep_size`` divides ``num_experts``.
    """

    num_experts: int
    ep_size: int

    def __post_init__(self) -> None:
        if self.ep_size < 1 or self.num_experts % self.ep_size:
            raise ConfigError(
                f"num_experts ({self.num_experts}) must be divisible by ep_size ({self.ep_size}): "
                "each rank owns the same number of experts; use an ep_size that divides "
                f"{self.num_experts}"
            )

    @property
    def num_local_experts(self) -> int:
        """Experts on each rank."""
        return self.num_experts // self.ep_size

    def experts_of(self, rank: int) -> range:
        """Return the global ids of the experts that ``rank`` owns."""
        if not 0 <= rank < self.ep_size:
            raise ConfigError(
                f"rank ({rank}) is not in a group of ep_size ({self.ep_size}): ranks count from 0; "
                f"use 0 to {self.ep_size - 1}"
            )
        return range(rank * self.num_local_experts, (rank + 1) * self.num_local_experts)

    def owner(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rank that owns each global expert id; same shape and dtype as ``ids``."""
        return ids.div(self.num_local_experts, rounding_mode="floor")

    def local_id(self, ids: torch.Tensor) -> torch.Tensor:
        """Return each expert's position among its owner's experts; same shape and dtype."""
        return ids.remainder(self.num_local_experts)
