"""Truths of layers with a mistake that no setting and no other weights could express.

Each overrides the one step of :class:`~twinmoe.oracle.truth.Truth` that somebody got wrong.

Legend: T tokens of all ranks, K experts per token, E experts, L experts of a rank, R ranks,
H hidden_size.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from twinmoe.oracle.contract import RoundingContract
from twinmoe.oracle.envelope import E, Enclosure, Grade, product
from twinmoe.oracle.order import exact_groups, in_order, ranked
from twinmoe.oracle.routing import RoutingTruth
from twinmoe.oracle.truth import Stages, Truth, WeightSource
from twinmoe.reference.config import MoEConfig


class _OtherRouting(Truth):
    """A router that goes wrong somewhere after its scores."""

    @abstractmethod
    def misled(self, right: RoutingTruth) -> RoutingTruth:
        """What becomes of the right routing."""

    def routing(
        self,
        contract: RoundingContract,
        grade: Grade = Grade.SHARP,
        carry: type[Enclosure] = Enclosure,
    ) -> RoutingTruth:
        """Route as ever, then go wrong."""
        return self.misled(super().routing(contract, grade, carry))


class BiasedWeights(_OtherRouting):
    """Router weights taken from the biased scores."""

    def misled(self, right: RoutingTruth) -> RoutingTruth:
        """Score with the bias."""
        return replace(right, score_TE=right.selection_TE)


class _SoftmaxOfScores(RoutingTruth):
    """Weights by a softmax over the chosen scores, which were scores already."""

    def weights(self, ids_TK: Tensor) -> Enclosure:
        score = self.score_TE.value.gather(1, ids_TK)
        error = self.score_TE.radius.gather(1, ids_TK).amax(dim=1, keepdim=True)
        value = torch.softmax(score, dim=1)
        unit = self.fmt.unit * (4 + ids_TK.shape[1])
        factor = self.config.routed_scaling_factor
        return Enclosure(value * factor, value * abs(factor) * (torch.expm1(2 * error) + unit))


class SoftmaxTwice(_OtherRouting):
    """Scores over all experts, then a softmax over the chosen scores."""

    def misled(self, right: RoutingTruth) -> RoutingTruth:
        """Choose as ever; weigh by the softmax."""
        return _as(_SoftmaxOfScores, right)


def with_epsilon(value: float) -> type[Truth]:
    """The truth of a layer that adds ``value``, not 1e-20, to the sum it divides by."""

    class Routing(RoutingTruth):
        epsilon = value

    class OtherEpsilon(_OtherRouting):
        def misled(self, right: RoutingTruth) -> RoutingTruth:
            return _as(Routing, right)

    return OtherEpsilon


def _as(kind: type[RoutingTruth], right: RoutingTruth) -> RoutingTruth:
    return kind(**{field.name: getattr(right, field.name) for field in fields(right)})


class GroupsRankedUnbiased(_OtherRouting):
    """The best groups are found by scores without the correction bias, the experts with it."""

    def misled(self, right: RoutingTruth) -> RoutingTruth:
        """Choose among the experts of those groups."""
        kept_TE = exact_groups(self.config, right.score_TE.value, right.fmt.max_value)
        selection = right.selection_TE.only(kept_TE)
        selection = replace(selection, value=selection.value.masked_fill(~kept_TE, -torch.inf))
        return _ungrouped(right, selection)


class GroupsMaskedByZero(_OtherRouting):
    """Experts of groups that are left out score 0, and so beat negative biased scores."""

    def misled(self, right: RoutingTruth) -> RoutingTruth:
        """Choose among all experts, by scores of which some are 0."""
        kept_TE = exact_groups(self.config, right.selection_TE.value, right.fmt.max_value)
        return _ungrouped(right, right.selection_TE.only(kept_TE))


def _ungrouped(right: RoutingTruth, selection_TE: Enclosure) -> RoutingTruth:
    """The best of all experts by ``selection_TE``."""
    order = in_order(ranked(selection_TE.value), torch.ones_like(right.bias_E, dtype=torch.bool))
    return replace(
        right,
        config=replace(right.config, n_group=1, topk_group=1),
        selection_TE=selection_TE,
        ids_TK=order[:, : right.config.num_experts_per_tok],
    )


class _OtherSlots(Truth):
    """A layer that computes other slots than the router's: fewer, or somebody else's."""

    @abstractmethod
    def slots(self, contract: RoundingContract, ids_TK: Tensor, weights_TK: E) -> tuple[Tensor, E]:
        """Ids and weights that are computed where these were chosen; K may change."""

    def stages(
        self,
        contract: RoundingContract,
        ids_TK: Tensor,
        weights_TK: E,
        grade: Grade = Grade.SHARP,
        expert_output_TKH: E | None = None,
    ) -> Stages[E]:
        """Carry the other slots through ``contract``."""
        return super().stages(contract, *self.slots(contract, ids_TK, weights_TK), grade)


class LastChoiceDropped(_OtherSlots):
    """Of each token's K experts, the last choice is left out after the weights are made."""

    def slots(self, contract: RoundingContract, ids_TK: Tensor, weights_TK: E) -> tuple[Tensor, E]:
        """Weight 0 for the lowest of the chosen selection scores."""
        chosen = self.routing(contract).selection_TE.value.gather(1, ids_TK)
        kept = torch.ones_like(ids_TK, dtype=torch.bool)
        kept.scatter_(1, chosen.argmin(dim=1, keepdim=True), False)
        return ids_TK, weights_TK.only(kept)


class OwnExpertsOnly(_OtherSlots):
    """Each rank returns what its own experts add; nobody sums over ranks."""

    def slots(self, _contract: RoundingContract, ids_TK: Tensor, weights_TK: E) -> tuple[Tensor, E]:
        """Weight 0 for experts of another rank than the token's."""
        return ids_TK, weights_TK.only(self.placement.owner(ids_TK) == self.rank_T[:, None])


class _LocalIds(_OtherSlots):
    """Every rank takes a slot for one of its own experts' by the wrong id, and all are summed."""

    def everywhere(self, ids_TK: Tensor, weights_TK: E) -> tuple[Tensor, E]:
        """Local ids [T, K] and weights as the slots [T, R * K] that all ranks compute."""
        ranks, local = self.placement.ep_size, self.placement.num_local_experts
        ids = torch.cat([ids_TK + rank * local for rank in range(ranks)], dim=1)
        return ids, weights_TK[:, torch.arange(ids_TK.shape[1]).repeat(ranks)]


class NoOffset(_LocalIds):
    """Rank r takes global ids 0 .. L - 1 for its own experts, and skips the others."""

    def slots(self, _contract: RoundingContract, ids_TK: Tensor, weights_TK: E) -> tuple[Tensor, E]:
        """Expert ``id`` of every rank, where there is one."""
        local = ids_TK < self.placement.num_local_experts
        return self.everywhere(torch.where(local, ids_TK, 0), weights_TK.only(local))


class WrappedIds(_LocalIds):
    """Every rank computes every slot, by id modulo L."""

    def slots(self, _contract: RoundingContract, ids_TK: Tensor, weights_TK: E) -> tuple[Tensor, E]:
        """Expert ``id % L`` of every rank."""
        return self.everywhere(self.placement.local_id(ids_TK), weights_TK)


#: (tokens, experts per token, experts) -> rows that an expert takes.
Capacity = Callable[[int, int, int], int]


class TokensDropped(_OtherSlots):
    """An expert takes the first rows that come, as many as its capacity, and drops the others."""

    capacity: Capacity
    #: Whether every rank has a capacity of its own, for the rows that it sends.
    by_sender = False

    def __init__(
        self, config: MoEConfig, weights: WeightSource, hidden_by_rank: Sequence[Tensor]
    ) -> None:
        super().__init__(config, weights, hidden_by_rank)
        self._whole, self._place_T = self, torch.arange(len(self.hidden_TH))

    def of_tokens(self, tokens: Tensor) -> Truth:
        """The same for some tokens: what is dropped depends on all."""
        chosen = super().of_tokens(tokens)
        assert isinstance(chosen, TokensDropped)
        chosen._place_T = self._place_T[tokens]
        return chosen

    def slots(self, contract: RoundingContract, ids_TK: Tensor, weights_TK: E) -> tuple[Tensor, E]:
        """Weight 0 for what is dropped."""
        kept_TE = self._whole._kept(contract)[self._place_T]
        return ids_TK, weights_TK.only(kept_TE.gather(1, ids_TK))

    def _kept(self, contract: RoundingContract) -> Tensor:
        """Whether each expert still has room when a token comes, [T, E]."""
        config, ids_TK = self.config, self.routing(contract).ids_TK
        visits_TE = torch.zeros(len(ids_TK), config.num_experts, dtype=torch.int64)
        visits_TE.scatter_(1, ids_TK, 1)
        senders = range(self.placement.ep_size) if self.by_sender else (None,)
        kept_TE = torch.zeros_like(visits_TE, dtype=torch.bool)
        for rank in senders:
            sent = slice(None) if rank is None else self.rank_T == rank
            rows_TE = visits_TE[sent]
            room = self.capacity(len(rows_TE), config.num_experts_per_tok, config.num_experts)
            kept_TE[sent] = rows_TE.cumsum(0) <= room
        return kept_TE


def with_capacity(rows: Capacity, by_sender: bool) -> type[Truth]:
    """The truth of a layer whose experts take so many rows."""
    members = {"capacity": staticmethod(rows), "by_sender": by_sender}
    return type("TokensDroppedAt", (TokensDropped,), members)


class SharedScaled(Truth):
    """The shared expert, times routed_scaling_factor."""

    def _shared(self, contract: RoundingContract, carry: type[E], grade: Grade) -> E | None:
        shared_TH = super()._shared(contract, carry, grade)
        if shared_TH is None:
            return None
        factor = carry.exact(torch.tensor([[self.config.routed_scaling_factor]]))
        return product(shared_TH, factor, contract.accumulator)
