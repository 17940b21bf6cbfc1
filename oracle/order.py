"""The total order of experts and of groups (``reference.router.TopKRouter``), for fp64 scores.

Numbers by value, +inf first; then NaN; then -inf; then what is out of reach.

Legend: T tokens, E experts, G groups, M experts in a group.
"""

import torch
from torch import Tensor

from twinmoe.oracle.rounding import Format
from twinmoe.reference.config import MoEConfig

#: What NaN is ranked as: above -inf, below every other number.
_NAN = torch.finfo(torch.float64).min


def ranked(values: Tensor) -> Tensor:
    """Numbers that compare as ``values`` are ordered; only -inf is still -inf."""
    numbers = values.where(values.isinf(), values.clamp(min=_NAN / 2))
    return numbers.where(~values.isnan(), _NAN)


def certain_specials(low: Tensor, high: Tensor) -> Tensor:
    """The ranks of what is certainly NaN or an infinity; NaN, which equals nothing, elsewhere."""
    return low.where((low == high) & (low.isinf() | (low == _NAN)), torch.nan)


def in_order(ranks: Tensor, among: Tensor) -> Tensor:
    """Indices along the last dimension, best first: those of ``among`` before all others."""
    order = ranks.argsort(dim=-1, descending=True, stable=True)
    first = among.expand_as(ranks).gather(-1, order).int()
    return order.gather(-1, first.argsort(dim=-1, descending=True, stable=True))


def overflowed(values: Tensor, largest: float) -> Tensor:
    """Infinities instead of what no number up to ``largest`` holds."""
    values = values.masked_fill(values > largest, torch.inf)
    return values.masked_fill(values < -largest, -torch.inf)


def by_group(config: MoEConfig, per_expert_TE: Tensor) -> Tensor:
    """[T, E] as [T, G, M]."""
    return per_expert_TE.view(-1, config.n_group, config.num_experts // config.n_group)


def group_sums(config: MoEConfig, selection_TE: Tensor, largest: float) -> Tensor:
    """Scores of groups [T, G]: IEEE sums of what counts, in numbers up to ``largest``."""
    grouped_TGM = by_group(config, selection_TE)
    counted = 2 if config.group_score == "top2_sum" else 1
    order = ranked(grouped_TGM).argsort(dim=-1, descending=True, stable=True)
    return overflowed(grouped_TGM.gather(-1, order[..., :counted]).sum(dim=-1), largest)


def group_bounds(
    config: MoEConfig, bounds_TE: tuple[Tensor, Tensor], fmt: Format
) -> tuple[Tensor, Tensor]:
    """The lowest and the highest ranks [T, G] of group scores that are summed in ``fmt``.

    A sum grows with each of its terms in the total order, NaN and infinities included.
    """
    low, high = (group_sums(config, bound_TE, fmt.max_value) for bound_TE in bounds_TE)
    slack_low, slack_high = (
        fmt.unit * bound.abs().where(bound.isfinite(), 0.0) for bound in (low, high)
    )
    return (
        ranked(overflowed(low - slack_low, fmt.max_value)),
        ranked(overflowed(high + slack_high, fmt.max_value)),
    )


def exact_groups(config: MoEConfig, selection_TE: Tensor, largest: float) -> Tensor:
    """Bool [T, E]: experts of the groups kept by exact scores, lowest id on a tie."""
    if config.n_group == 1:
        return torch.ones_like(selection_TE, dtype=torch.bool)
    scores = ranked(group_sums(config, selection_TE, largest))
    order = scores.argsort(dim=-1, descending=True, stable=True)[:, : config.topk_group]
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
    return kept.repeat_interleave(config.num_experts // config.n_group, dim=1)
