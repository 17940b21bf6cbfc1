"""A truth that computes its experts once for all subjects that chose the same ones."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from twinmoe.oracle.contract import RoundingContract
from twinmoe.oracle.envelope import E, Grade
from twinmoe.oracle.truth import Truth
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights

#: Sets of expert outputs kept, each two fp64 tensors [T, K, H].
_KEPT = 8


class RememberingTruth(Truth):
    """One truth for many judgements: nearly all of a judgement's time goes into experts.

    The key holds all that expert outputs depend on; router weights, which multiply
    outputs here, are not in it.
    """

    def __init__(
        self, config: MoEConfig, weights: MoEWeights, hidden_by_rank: Sequence[Tensor]
    ) -> None:
        super().__init__(config, weights, hidden_by_rank)
        self._known: OrderedDict[Hashable, object] = OrderedDict()

    def expert_outputs(
        self,
        contract: RoundingContract,
        ids_TK: Tensor,
        weights_TK: E,
        grade: Grade = Grade.SHARP,
    ) -> E:
        """See :meth:`Truth.expert_outputs`."""
        if self.config.router_weight_on_input:
            return super().expert_outputs(contract, ids_TK, weights_TK, grade)
        where_T2 = torch.stack([self.rank_T, self.row_T], dim=1)
        tokens, experts = (t.contiguous().numpy().tobytes() for t in (where_T2, ids_TK))
        key = (contract, tokens, experts, type(weights_TK), grade)
        if key not in self._known:
            self._known[key] = super().expert_outputs(contract, ids_TK, weights_TK, grade)
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
        return self._known[key]  # type: ignore[return-value]
