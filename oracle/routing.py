"""What a correct router may answer: score enclosures, admissible sets, weights.

Scores carry rounding error, so two experts whose scores nearly tie may be chosen in
either order by correct implementations.  An observed set of experts is *admissible*
when no expert left out is certainly better than one that was taken; the truth is then
evaluated for the observed set.  Where two scores, or their inputs, are identical and
exact, they tie in every arithmetic, and the contract's tie rule holds: the lowest expert
id wins.

Legend: T tokens, H hidden_size, E experts, G groups, K experts per token.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations, islice
from typing import ClassVar

import torch
from torch import Tensor

from twinmoe.oracle.contract import RoundingContract, Scales, Ties
from twinmoe.oracle.envelope import Enclosure, Grade, matmul, product, rounded, total
from twinmoe.oracle.order import (
    by_group,
    certain_specials,
    exact_groups,
    group_bounds,
    in_order,
    overflowed,
    ranked,
)
from twinmoe.oracle.rounding import Format, round_to
from twinmoe.reference.config import MoEConfig

#: Sets of experts that are tried for one near-tied token of a subject without ids.
TRIES = 512

#: Puts a [T, E] tensor into a shape in which experts meet.
Arrange = Callable[[Tensor], Tensor]


def _score(config: MoEConfig, logits_TE: Enclosure, fmt: Format, deviations: float) -> Enclosure:
    """Enclose score(logits); each rule is the exact change over [z - e, z + e].

    softmax  p (1 - p) (exp(2 max e_z) - 1), plus the roundings of exp, of its argument
             z - max z, of the sum of E positive terms and of the division; at most 1
    sigmoid  p (1 - p) (exp(e_z) - 1)
    sqrt(softplus)  e_z sigmoid(z + e_z) / s, the slope of softplus through the root
    """
    z, e, u = logits_TE.value, logits_TE.radius, fmt.unit
    underflow = fmt.smallest_normal
    if config.scoring_func == "softmax":
        p = torch.softmax(z, dim=-1)
        argument = (z.amax(dim=-1, keepdim=True) - z).abs()
        roundings = u * (4 + argument + deviations * config.num_experts**0.5)
        others = (1 - p).clamp(min=2.0**-50)  # what this difference may have lost
        radius = p * (others * torch.expm1(2 * e.amax(dim=-1, keepdim=True)) + roundings)
        return Enclosure(p, (radius + underflow).clamp(max=1.0))
    if config.scoring_func == "sigmoid":
        p = torch.sigmoid(z)
        return Enclosure(p, p * torch.sigmoid(-z) * torch.expm1(e) + 4 * u * p + underflow)
    softplus = torch.nn.functional.softplus(z, threshold=700.0)
    s = softplus.sqrt()
    spread = e * torch.sigmoid(z + e) + underflow
    return Enclosure(s, spread / (s + spread.sqrt()) + 8 * u * s + underflow)


def held_factor(config: MoEConfig, fmt: Format) -> Enclosure:
    """``routed_scaling_factor`` [1, 1]: a kernel may hold it in ``fmt``."""
    factor = torch.full((1, 1), config.routed_scaling_factor, dtype=torch.float64)
    return Enclosure(factor, (round_to(factor, fmt) - factor).abs())


def _stored(x: Enclosure, target: Format | None, carry: type[Enclosure]) -> Enclosure:
    """``x`` stored in ``target``; its radius is what ``carry`` takes for one error."""
    kept = rounded(carry.of(x.value, x.radius), target)
    return Enclosure(kept.value, kept.error())


@dataclass(frozen=True)
class RoutingTruth:
    """Everything the judge knows about a batch's routing before seeing an answer.

    ``logits_TE``, ``score_TE`` (unbiased) and ``selection_TE`` (biased) are enclosures;
    ``ids_TK`` is the exact selection, best first.
    """

    config: MoEConfig
    logits_TE: Enclosure
    score_TE: Enclosure
    selection_TE: Enclosure
    bias_E: Tensor
    ids_TK: Tensor
    contract: RoundingContract
    carry: type[Enclosure] = Enclosure

    #: Keeps the normalisation of scores that all vanish finite.
    epsilon: ClassVar[float] = 1e-20

    @property
    def fmt(self) -> Format:
        """What the router computes in."""
        return self.contract.router

    @classmethod
    def of(
        cls,
        config: MoEConfig,
        hidden_TH: Enclosure,
        router_EH: Tensor,
        correction_bias_E: Tensor | None,
        contract: RoundingContract,
        grade: Grade,
    ) -> "RoutingTruth":
        """Score every expert for every token; all inputs are the tensors as stored.

        Around a Spread, radii are root mean squares instead of what is allowed.
        """
        fmt, carry = contract.router, type(hidden_TH)
        carried = rounded(matmul(hidden_TH, router_EH, fmt, grade), contract.logits)
        logits = Enclosure(carried.value, carried.error())
        score = _score(config, logits, fmt, hidden_TH.deviations)
        score = _stored(score, contract.scores, carry)
        bias = torch.zeros(config.num_experts, dtype=torch.float64)
        if correction_bias_E is not None:
            bias = correction_bias_E.double()
        value = score.value + bias
        rounding = (fmt.unit * value.abs()).where((bias != 0) & ~bias.isinf(), 0.0)
        selection = Enclosure(value, score.radius + rounding)
        allowed = exact_groups(config, value, fmt.max_value)
        ids = in_order(ranked(value), allowed)[:, : config.num_experts_per_tok]
        return cls(config, logits, score, selection, bias, ids, contract, carry)

    def weights(self, ids_TK: Tensor) -> Enclosure:
        """Router weights for chosen ids [T, K]: gather, renormalise, scale.

        w = p / (S + epsilon) moves by at most (e_p + w e_S) / (S - e_S); K + 3 roundings, and
        those of the contract.
        """
        taken = ids_TK.clamp(min=0)
        p = Enclosure(self.score_TE.value.gather(1, taken), self.score_TE.radius.gather(1, taken))
        if self.config.norm_topk_prob:
            unit = self.fmt.unit
            sums = total(p, -1, self.fmt)
            sums = Enclosure(sums.value + self.epsilon, sums.radius)
            sums = _stored(sums, self.contract.score_sum, self.carry)[:, None]
            value = p.value / sums.value
            floor = (sums.value - sums.radius).clamp(min=self.epsilon)
            p = Enclosure(value, (p.radius + value * sums.radius) / floor + 3 * unit * value)
            p = _stored(p, self.contract.normalised_weights, self.carry)
        if self.contract.scales is Scales.WEIGHTS:
            p = product(p, held_factor(self.config, self.fmt), self.fmt)
        padding = ids_TK < 0
        return Enclosure(p.value.masked_fill(padding, 0.0), p.radius.masked_fill(padding, 0.0))

    def admissible(self, ids_TK: Tensor) -> Tensor:
        """Bool [T]: could a correct router have answered this set of ids?

        ``ids_TK`` must be valid expert ids; duplicates are never admissible.  A contract that
        leaves ties open says nothing about NaN either: rows with a NaN logit may go anywhere.
        """
        chosen_TE = torch.zeros_like(self.selection_TE.value, dtype=torch.bool)
        chosen_TE.scatter_(1, ids_TK, True)
        distinct = chosen_TE.sum(dim=-1) == self.config.num_experts_per_tok
        kept_TG, _ = self._group_ranks()
        good = ~self._certainly_better(chosen_TE, self._experts_of(kept_TG) & ~chosen_TE)
        good &= ~(chosen_TE & ~self._experts_of(kept_TG)).any(dim=-1)
        for row in self._groups_ambiguous().nonzero().flatten().tolist():
            good[row] = self._admissible_in_some_groups(row, chosen_TE[row])
        unranked = self.logits_TE.value.isnan().any(dim=-1) & (self.contract.ties is Ties.ANY)
        return distinct & (good | unranked)

    def ambiguous(self) -> Tensor:
        """Bool [T]: tokens whose exact selection is not the only admissible one, and matters.

        Where every score is NaN, so is every weight, and the answer of whatever experts.
        """
        low, high = self._interval()
        rivals = self._experts_of(self._group_ranks()[0]).scatter(1, self.ids_TK, False)
        near = high[:, None, :] >= low.gather(1, self.ids_TK)[:, :, None]
        near &= rivals[:, None, :] & ~self._tied_with(self.ids_TK)
        near_T = near.flatten(1).any(dim=-1) | self._groups_ambiguous()
        return near_T & ~self.score_TE.value.isnan().all(dim=-1)

    def best_rival(self, ids_TK: Tensor) -> Tensor | None:
        """[T]: the highest-ranked expert of each token that ``ids_TK`` leaves out; None if none."""
        if self.config.num_experts_per_tok == self.config.num_experts:
            return None
        left_TE = torch.ones_like(self.selection_TE.value, dtype=torch.bool)
        left_TE.scatter_(1, ids_TK, False)
        return in_order(ranked(self.selection_TE.value), left_TE)[:, 0]

    def candidates(self, token: int, limit: int) -> list[Tensor]:
        """Admissible answers [K] for one token, the exact one first; at most ``limit``.

        For a subject that shows no ids.  At most ``TRIES`` sets are asked about.
        """
        exact = self.ids_TK[token]
        found = {frozenset(exact.tolist()): exact}
        for ids in islice(self._near_answers(token), TRIES):
            if len(found) == limit:
                break
            if frozenset(ids.tolist()) not in found and self._one_admissible(token, ids):
                found[frozenset(ids.tolist())] = ids
        return list(found.values())

    def _near_answers(self, token: int) -> Iterator[Tensor]:
        """Sets of K experts that some admissible choice of groups may rank highest."""
        low, high = (bound[token] for bound in self._interval())
        value, k = ranked(self.selection_TE.value[token]), self.config.num_experts_per_tok
        for kept_G in self._kept_sets(token):
            rivals = self._experts_of(kept_G[None])[0]
            best = in_order(value, rivals)[:k]
            chosen = torch.zeros_like(rivals).scatter_(0, best, True)
            certain = chosen & (low > high.masked_fill(chosen | ~rivals, -torch.inf).max())
            near = rivals & ~certain & (high >= low[best].min())
            open_places = k - int(certain.sum())
            for rest in combinations(in_order(high, near)[: int(near.sum())].tolist(), open_places):
                yield torch.tensor([*certain.nonzero().flatten().tolist(), *rest])

    def _one_admissible(self, token: int, ids_K: Tensor) -> bool:
        return bool(self._only(token).admissible(ids_K[None]))

    def _only(self, token: int) -> "RoutingTruth":
        return replace(
            self,
            logits_TE=self.logits_TE[token : token + 1],
            score_TE=self.score_TE[token : token + 1],
            selection_TE=self.selection_TE[token : token + 1],
            ids_TK=self.ids_TK[token : token + 1],
        )

    def _bounds(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest selection scores, NaN among them, as the router holds them.

        Where a logit may overflow, any score may come out.
        """
        value, largest = self.selection_TE.value, self.fmt.max_value
        open_TE = ~self.selection_TE.radius.isfinite() & ~value.isnan()
        radius = self.selection_TE.radius.masked_fill(open_TE, 0.0)
        low, high = (overflowed(bound, largest) for bound in (value - radius, value + radius))
        return low.masked_fill(open_TE, -torch.inf), high.masked_fill(open_TE, torch.inf)

    def _interval(self) -> tuple[Tensor, Tensor]:
        low, high = self._bounds()
        return ranked(low), ranked(high)

    def _tied_with(self, ids_TK: Tensor) -> Tensor:
        """Bool [T, K, E]: whose score equals that of ids in any arithmetic."""
        return self._tied(
            lambda part_TE: part_TE.gather(1, ids_TK)[:, :, None],
            lambda part_TE: part_TE[:, None, :],
        )

    def _tied_groups(self) -> Tensor:
        """Bool [T, G, G]: pairs of groups whose experts tie one by one, best first."""
        order_TGM = by_group(self.config, ranked(self.selection_TE.value)).argsort(dim=-1)

        def arranged(part_TE: Tensor) -> Tensor:
            return by_group(self.config, part_TE).gather(-1, order_TGM)

        members = self._tied(
            lambda part_TE: arranged(part_TE)[:, :, None],
            lambda part_TE: arranged(part_TE)[:, None, :],
        ).all(dim=-1)
        special = certain_specials(*self._group_bounds())
        sums = (special[:, :, None] == special[:, None, :]) & (self.contract.ties is Ties.LOWEST_ID)
        return members | sums

    def _tied(self, left: Arrange, right: Arrange) -> Tensor:
        """Where experts tie in any arithmetic: certain logits or scores, and biases, are equal.

        So are NaN and NaN, and biased scores of one infinity.
        """
        bias_TE = self.bias_E.expand_as(self.score_TE.value)
        certain = [
            part.value.masked_fill(part.radius != 0, torch.nan)  # which equals nothing
            for part in (self.logits_TE, self.score_TE)
        ]
        logits, scores, biases = (left(part) == right(part) for part in (*certain, bias_TE))
        special_TE = certain_specials(*self._interval())
        tied = (logits | scores) & biases | (left(special_TE) == right(special_TE))
        return tied & (self.contract.ties is Ties.LOWEST_ID)

    def _certainly_better(self, chosen_TE: Tensor, rivals_TE: Tensor) -> Tensor:
        """Bool [T]: does some rival certainly beat some chosen expert?

        By intervals: low(rival) > high(chosen).  By the tie rule: a rival with a lower
        id whose logit and bias are exactly those of a chosen expert.
        """
        low, high = self._interval()
        weakest = torch.where(chosen_TE, high, torch.inf).amin(dim=-1)
        strongest = torch.where(rivals_TE, low, -torch.inf).amax(dim=-1)
        taken_TK, ids_TK = chosen_TE.int().topk(self.config.num_experts_per_tok, dim=-1)
        broken = (taken_TK > 0)[:, :, None] & rivals_TE[:, None, :] & self._tied_with(ids_TK)
        broken &= torch.arange(low.shape[1]) < ids_TK[:, :, None]
        return (strongest > weakest) | broken.flatten(1).any(dim=-1)

    def _group_bounds(self) -> tuple[Tensor, Tensor]:
        return group_bounds(self.config, self._bounds(), self.fmt)

    def _group_ranks(self) -> tuple[Tensor, Tensor]:
        """(certain, possible) [T, G]: groups kept under every, or some, admissible order."""
        if self.config.n_group == 1:
            everything = torch.ones(len(self.ids_TK), 1, dtype=torch.bool)
            return everything, everything
        low, high = self._group_bounds()
        tied = self._tied_groups()
        lower_id = torch.ones(tied.shape[1:], dtype=tied.dtype).tril(-1)
        may_beat = torch.where(tied, lower_id, high[:, None, :] >= low[:, :, None])
        must_beat = torch.where(tied, lower_id, low[:, None, :] > high[:, :, None])
        itself = torch.eye(self.config.n_group, dtype=torch.bool)
        certain = (may_beat & ~itself).sum(dim=-1) < self.config.topk_group
        possible = must_beat.sum(dim=-1) < self.config.topk_group
        return certain, possible

    def _kept_sets(self, token: int) -> Iterator[Tensor]:
        """Every set of groups (bool [G]) that an admissible order of group scores keeps."""
        certain_TG, possible_TG = self._group_ranks()
        certain, possible = certain_TG[token], possible_TG[token]
        low, high = (bound[token] for bound in self._group_bounds())
        tied = self._tied_groups()[token]
        lower_id = torch.ones_like(tied).tril(-1)
        open_groups = (possible & ~certain).nonzero().flatten().tolist()
        for more in combinations(open_groups, self.config.topk_group - int(certain.sum())):
            kept = certain.clone()
            kept[list(more)] = True
            overtaken = tied & kept[:, None] & ~kept[None, :] & lower_id
            in_order = bool(kept.all()) or bool(high[kept].min() >= low[~kept].max())
            if in_order and not overtaken.any():
                yield kept

    def _admissible_in_some_groups(self, token: int, chosen_E: Tensor) -> bool:
        alone = self._only(token)
        for kept_G in self._kept_sets(token):
            rivals = self._experts_of(kept_G[None])
            inside = not (chosen_E & ~rivals[0]).any()
            if inside and not alone._certainly_better(chosen_E[None], rivals & ~chosen_E):
                return True
        return False

    def _experts_of(self, groups_TG: Tensor) -> Tensor:
        """Bool [T, E]: the experts of the marked groups."""
        return groups_TG.repeat_interleave(self.config.num_experts // self.config.n_group, dim=1)

    def _groups_ambiguous(self) -> Tensor:
        certain, possible = self._group_ranks()
        return (possible & ~certain).any(dim=-1)
