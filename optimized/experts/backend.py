"""What an expert backend is, and the part that backends on sorted slots share.

Shapes: M rows, K experts per row, S slots, H hidden_size, L local experts.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from twinmoe.optimized.experts.combine import combine
from twinmoe.optimized.experts.slots import SlotPlan, plan_slots
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights


class ExpertBackend(ABC):
    """One way to compute this rank's experts; built once, run under captured graphs.

    Implementations keep to fixed shapes and never synchronise with the host, but for what they
    tune before a capture.
    """

    #: What users call it: in options, reports and messages.
    name: ClassVar[str]

    def __init__(self, config: MoEConfig, weights: MoEWeights, first_expert: int) -> None:
        self.config = config
        self.weights = weights
        self.first_expert = first_expert

    @classmethod
    @abstractmethod
    def unsupported(cls, config: MoEConfig, device: torch.device) -> str | None:
        """Say why this backend cannot run (value, reason, remedy); None if it can."""

    @property
    def rows_dtype(self) -> torch.dtype:
        """What ``expert_rows`` returns: what is stored of an expert's output."""
        return self.config.dtype

    @abstractmethod
    def forward(self, x_MH: Tensor, ids_MK: Tensor, weights_MK: Tensor, out_MH: Tensor) -> None:
        """See ``InferenceGroupedMLP.forward``."""

    @abstractmethod
    def expert_rows(self, x_SH: Tensor, local_expert_S: Tensor) -> Tensor:
        """See ``InferenceGroupedMLP.expert_rows``."""

    def refresh(self) -> None:  # noqa: B027 - most backends derive nothing from the weights
        """Recompute, into the same storage, whatever layout was derived from the weights."""


class SortedBackend(ExpertBackend):
    """Sort slots by local expert, compute them in that order, sum each row's slots."""

    @abstractmethod
    def sorted_rows(self, x_MH: Tensor, weights_MK: Tensor | None, plan: SlotPlan) -> Tensor:
        """Return y_SH at the plan's positions; what lies behind the last one is arbitrary.

        weights_MK: None, or the weights that scale each slot's input row, rounded to the
        dtype of x_MH.
        """

    def forward(self, x_MH: Tensor, ids_MK: Tensor, weights_MK: Tensor, out_MH: Tensor) -> None:
        """See ``ExpertBackend.forward``."""
        on_input = self.config.router_weight_on_input
        plan = plan_slots(ids_MK, self.first_expert, self.weights.w2_LHI.shape[0])
        y_SH = self.sorted_rows(x_MH, weights_MK if on_input else None, plan)
        combine(
            y_SH,
            ids_MK,
            weights_MK,
            out_MH,
            plan=plan,
            first_expert=self.first_expert,
            weighted=not on_input,
        )

    def expert_rows(self, x_SH: Tensor, local_expert_S: Tensor) -> Tensor:
        """See ``ExpertBackend.expert_rows``."""
        plan = plan_slots(local_expert_S[:, None], 0, self.weights.w2_LHI.shape[0])
        return self.sorted_rows(x_SH, None, plan).index_select(0, plan.positions_S)
