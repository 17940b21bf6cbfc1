"""A truth that computes its experts once for all subjects that chose the same ones."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from twinmoe.oracle.contract import RoundingContract
from twinmoe.oracle.truth import Truth
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights

#: Sets of expert outputs kept, each of up to seven fp64 tensors [T, K, H].
_KEPT = 8

#: All that expert outputs depend on in a contract.
_OF_EXPERTS = (
    *("accumulator", "weighted_input", "quantise_input", "gate_up", "gate"),
    *("activation", "weighs", "weighted_activation", "quantise_activation", "expert_output"),
)


class RememberingTruth(Truth):
    """One truth for many judgements: nearly all of a judgement's time goes into experts.

    The question holds all that expert outputs depend on; router weights, which multiply
    outputs, are not in it.
    """

    def __init__(
        self, config: MoEConfig, weights: MoEWeights, hidden_by_rank: Sequence[Tensor]
    ) -> None:
        super().__init__(config, weights, hidden_by_rank)
        self._known: OrderedDict[Hashable, list[Any]] = OrderedDict()

    def recall(self, question: tuple[object, ...], compute: Callable[[], list[Any]]) -> list[Any]:
        """Compute what was not asked for lately, for the same tokens."""
        where_T2 = torch.stack([self.rank_T, self.row_T], dim=1)
        key = tuple(_key(part) for part in (where_T2, *question))
        if key not in self._known:
            self._known[key] = compute()
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
        return self._known[key]


def _key(part: object) -> Hashable:
    """What makes two questions one: bits of tensors, and of a contract what concerns experts."""
    if isinstance(part, Tensor):
        return part.contiguous().numpy().tobytes()
    if isinstance(part, RoundingContract):
        return tuple(getattr(part, point) for point in _OF_EXPERTS)
    assert isinstance(part, Hashable)
    return part
