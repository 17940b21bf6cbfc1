"""What a correct router may answer: score enclosures, admissible sets, weights.

Scores carry rounding error, so two experts whose scores nearly tie may be chosen in
either order by correct implementations.  An observed set of experts is *admissible*
when no expert left out is certainly better than one that was taken; the truth is then
evaluated for the observed set.  Where the inputs of two scores are identical and
exact, every deterministic scoring ties them exactly, and the contract's tie rule holds:
the lowest expert id wins.

Legend: T tokens, H hidden_size, E experts, G groups, K experts per token.
"""

from dataclasses import dataclass, replace
from itertools import combinations, islice

import torch
from torch import Tensor

from twinmoe.oracle.contract import RoundingContract
from twinmoe.oracle.envelope import LAMBDA, Enclosure, Grade, matmul, product, total
from twinmoe.oracle.rounding import Format
from twinmoe.reference.config import MoEConfig


def _score(config: MoEConfig, logits_TE: Enclosure, fmt: Format) -> Enclosure:
    """Enclose score(logits); each rule is the exact change over [z - e, z + e].

    softmax  p (exp(2 max e_z) - 1), plus the roundings of exp, of its argument
             z - max z, of the sum of E positive terms and of the division
    sigmoid  p (1 - p) (exp(e_z) - 1)
    sqrt(softplus)  e_z sigmoid(z + e_z) / s, the slope of softplus through the root
    """
    z, e, u = logits_TE.value, logits_TE.radius, fmt.unit
    underflow = fmt.smallest_normal
    if config.scoring_func == "softmax":
        p = torch.softmax(z, dim=-1)
        argument = (z.amax(dim=-1, keepdim=True) - z).abs()
        roundings = u * (4 + argument + LAMBDA * config.num_experts**0.5)
        radius = p * (torch.expm1(2 * e.amax(dim=-1, keepdim=True)) + roundings)
        return Enclosure(p, radius + underflow)
    if config.scoring_func == "sigmoid":
        p = torch.sigmoid(z)
        return Enclosure(p, p * torch.sigmoid(-z) * torch.expm1(e) + 4 * u * p + underflow)
    softplus = torch.nn.functional.softplus(z, threshold=700.0)
    s = softplus.sqrt()
    spread = e * torch.sigmoid(z + e) + underflow
    return Enclosure(s, spread / (s + spread.sqrt()) + 8 * u * s + underflow)


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
    fmt: Format

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
        """Score every expert for every token; all inputs are the tensors as stored."""
        fmt = contract.router
        logits = matmul(hidden_TH, router_EH, fmt, grade)
        score = _score(config, logits, fmt)
        bias = torch.zeros(config.num_experts, dtype=torch.float64)
        if correction_bias_E is not None:
            bias = correction_bias_E.double()
        value = score.value + bias
        selection = Enclosure(value, score.radius + fmt.unit * value.abs() * (bias != 0))
        allowed = _exact_groups(config, value.nan_to_num(nan=torch.finfo(torch.float64).min))
        ranked = value.nan_to_num(nan=torch.finfo(torch.float64).min)
        ranked = ranked.masked_fill(~allowed, -torch.inf)
        order = ranked.sort(dim=-1, descending=True, stable=True).indices
        ids = order[:, : config.num_experts_per_tok]
        return cls(config, logits, score, selection, bias, ids, fmt)

    def weights(self, ids_TK: Tensor) -> Enclosure:
        """Router weights for chosen ids [T, K]: gather, renormalise, scale.

        w = p / (S + 1e-20) moves by at most (e_p + w e_S) / (S - e_S); K + 3 roundings.
        """
        taken = ids_TK.clamp(min=0)
        p = Enclosure(self.score_TE.value.gather(1, taken), self.score_TE.radius.gather(1, taken))
        if self.config.norm_topk_prob:
            unit = self.fmt.unit
            sums = total(p, -1, self.fmt)
            s, e_s = (sums.value + 1e-20)[:, None], sums.radius[:, None]
            value = p.value / s
            floor = (sums.value[:, None] - e_s).clamp(min=0) + 1e-20
            p = Enclosure(value, (p.radius + value * e_s) / floor + 3 * unit * value)
        factor = torch.full((1, 1), self.config.routed_scaling_factor, dtype=torch.float64)
        scaled = product(p, Enclosure.exact(factor), self.fmt)
        padding = ids_TK < 0
        return Enclosure(
            scaled.value.masked_fill(padding, 0.0), scaled.radius.masked_fill(padding, 0.0)
        )

    def admissible(self, ids_TK: Tensor) -> Tensor:
        """Bool [T]: could a correct router have answered this set of ids?

        ``ids_TK`` must be valid expert ids; duplicates are never admissible.  Rows with
        a NaN logit are not ranked by any rule, so any K distinct ids are admissible.
        """
        chosen_TE = torch.zeros_like(self.selection_TE.value, dtype=torch.bool)
        chosen_TE.scatter_(1, ids_TK, True)
        distinct = chosen_TE.sum(dim=-1) == self.config.num_experts_per_tok
        kept_TG, groups_ok = self._kept_groups(_by_group(self.config, chosen_TE).any(dim=-1))
        rivals_TE = kept_TG.repeat_interleave(self.config.num_experts // self.config.n_group, 1)
        beaten = self._certainly_better(chosen_TE, rivals_TE & ~chosen_TE)
        unranked = self.logits_TE.value.isnan().any(dim=-1)
        return distinct & ((groups_ok & ~beaten) | unranked)

    def ambiguous(self) -> Tensor:
        """Bool [T]: tokens whose exact selection is not the only admissible one."""
        low, high = self._interval()
        chosen = torch.zeros_like(low, dtype=torch.bool).scatter_(1, self.ids_TK, True)
        worst_in = torch.where(chosen, low, torch.inf).amin(dim=-1)
        best_out = torch.where(chosen, -torch.inf, high).amax(dim=-1)
        near = (best_out >= worst_in) & ~self._exactly_tied_rows()
        return near if self.config.n_group == 1 else near | self._groups_ambiguous()

    def candidates(self, token: int, limit: int) -> list[Tensor]:
        """Admissible answers [K] for one token, the exact one first.

        For a subject that shows no ids.  Experts certainly chosen stay; the first ``limit``
        combinations of the near-tied rest are tried, best scores first.
        """
        low, high = (bound[token] for bound in self._interval())
        exact = self.ids_TK[token]
        chosen = torch.zeros_like(low, dtype=torch.bool).scatter_(0, exact, True)
        best_out = torch.where(chosen, -torch.inf, high).max()
        worst_in = torch.where(chosen, low, torch.inf).min()
        certain = chosen & (low > best_out)
        near = (~certain & (high >= worst_in)).nonzero().flatten()
        near = near[high[near].argsort(descending=True, stable=True)].tolist()
        free = self.config.num_experts_per_tok - int(certain.sum())
        answers = [
            torch.cat([certain.nonzero().flatten(), torch.tensor(rest, dtype=torch.int64)])
            for rest in islice(combinations(near, free), limit)
        ]
        return [exact, *(ids for ids in answers if self._one_admissible(token, ids))]

    def _one_admissible(self, token: int, ids_K: Tensor) -> bool:
        alone = replace(
            self,
            logits_TE=self.logits_TE[token : token + 1],
            score_TE=self.score_TE[token : token + 1],
            selection_TE=self.selection_TE[token : token + 1],
        )
        return bool(alone.admissible(ids_K[None]))

    def _interval(self) -> tuple[Tensor, Tensor]:
        value, radius = self.selection_TE.value, self.selection_TE.radius
        lowest = torch.finfo(torch.float64).min  # a NaN score ranks below every real one
        return (value - radius).nan_to_num(nan=lowest), (value + radius).nan_to_num(nan=lowest)

    def _exactly_tied_rows(self) -> Tensor:
        """Rows in which all boundary rivals tie exactly, so that the tie rule decides."""
        return (self.logits_TE.radius == 0).all(dim=-1)

    def _certainly_better(self, chosen_TE: Tensor, rivals_TE: Tensor) -> Tensor:
        """Bool [T]: does some rival certainly beat some chosen expert?

        By intervals: low(rival) > high(chosen).  By the tie rule: a rival with a lower
        id whose logit and bias are exactly those of a chosen expert.
        """
        low, high = self._interval()
        weakest = torch.where(chosen_TE, high, torch.inf).amin(dim=-1)
        strongest = torch.where(rivals_TE, low, -torch.inf).amax(dim=-1)
        beaten = strongest > weakest
        exact = self.logits_TE.radius == 0
        for row in (exact.any(dim=-1) & ~beaten).nonzero().flatten().tolist():
            beaten[row] = self._tie_rule_broken(row, chosen_TE[row], rivals_TE[row], exact[row])
        return beaten

    def _tie_rule_broken(self, row: int, chosen: Tensor, rivals: Tensor, exact: Tensor) -> bool:
        z = self.logits_TE.value[row]
        taken, left = (chosen & exact).nonzero().flatten(), (rivals & exact).nonzero().flatten()
        same = (z[taken, None] == z[None, left]) & (
            self.bias_E[taken, None] == self.bias_E[None, left]
        )
        return bool((same & (left[None, :] < taken[:, None])).any())

    def _group_scores(self) -> Enclosure:
        config = self.config
        low, high = (_by_group(config, bound) for bound in self._interval())
        best = 2 if config.group_score == "top2_sum" and low.shape[-1] > 1 else 1
        low, high = (bound.topk(best, dim=-1).values.sum(dim=-1) for bound in (low, high))
        centre = (low + high) / 2
        return Enclosure(centre, (high - low) / 2 + self.fmt.unit * centre.abs())

    def _group_ranks(self) -> tuple[Tensor, Tensor]:
        """(certain, possible) [T, G]: groups kept under every, or some, admissible order."""
        scores = self._group_scores()
        low, high = scores.value - scores.radius, scores.value + scores.radius
        may_beat = high[:, None, :] >= low[:, :, None]
        must_beat = low[:, None, :] > high[:, :, None]
        itself = torch.eye(self.config.n_group, dtype=torch.bool)
        certain = (may_beat & ~itself).sum(dim=-1) < self.config.topk_group
        possible = must_beat.sum(dim=-1) < self.config.topk_group
        return certain, possible

    def _kept_groups(self, used_TG: Tensor) -> tuple[Tensor, Tensor]:
        """Groups whose experts compete with an answer that used ``used_TG``, and if it may."""
        if self.config.n_group == 1:
            return torch.ones_like(used_TG), torch.ones(used_TG.shape[0], dtype=torch.bool)
        certain, possible = self._group_ranks()
        kept = certain | used_TG
        legal = (used_TG & ~possible).sum(dim=-1) == 0
        return kept, legal & (kept.sum(dim=-1) <= self.config.topk_group)

    def _groups_ambiguous(self) -> Tensor:
        certain, possible = self._group_ranks()
        return (possible & ~certain).any(dim=-1)


def _by_group(config: MoEConfig, per_expert_TE: Tensor) -> Tensor:
    """[T, E] as [T, G, E / G]."""
    return per_expert_TE.view(-1, config.n_group, config.num_experts // config.n_group)


def _exact_groups(config: MoEConfig, selection_TE: Tensor) -> Tensor:
    """Bool [T, E]: experts of the groups kept by exact scores, lowest id on a tie."""
    if config.n_group == 1:
        return torch.ones_like(selection_TE, dtype=torch.bool)
    grouped = _by_group(config, selection_TE)
    best = 2 if config.group_score == "top2_sum" and grouped.shape[-1] > 1 else 1
    scores = grouped.sort(dim=-1, descending=True).values[..., :best].sum(dim=-1)
    order = scores.sort(dim=-1, descending=True, stable=True).indices[:, : config.topk_group]
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
    return kept.repeat_interleave(grouped.shape[-1], dim=1)
