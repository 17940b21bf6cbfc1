"""Hold one observed tensor against one enclosure, element by element."""

from dataclasses import dataclass

import torch
from torch import Tensor

from twinmoe.oracle.digits import apart
from twinmoe.oracle.envelope import Enclosure
from twinmoe.oracle.rounding import Format, midpoint_toward, round_to


@dataclass(frozen=True)
class Comparison:
    """The result for one tensor: where it leaves its interval, and by how much.

    ``outside`` marks elements beyond the interval [``low``, ``high``] of correct results;
    ``ratio`` is the error that the observed element needs over the radius that it may
    have: above 1 outside, infinity for a wrong class (NaN, infinity) or where no error at
    all is allowed; ``centre`` is the exactly rounded truth.
    """

    outside: Tensor
    ratio: Tensor
    low: Tensor
    high: Tensor
    centre: Tensor

    @property
    def elements(self) -> int:
        """Number of elements compared."""
        return self.outside.numel()

    @property
    def bounded(self) -> Tensor:
        """Where neither end of the interval is an infinity, and no NaN is demanded."""
        return self.low.isfinite() & self.high.isfinite()

    def beside(self, seen: Tensor, index: tuple[int, ...]) -> str:
        """The element ``seen`` at ``index`` with what is allowed there, to be told apart."""
        ends = (float(end[index]) for end in (seen, self.low, self.high))
        shown, low, high = apart(*ends)
        return f"{shown}, allowed {low} .. {high}"

    @property
    def worst_ratio(self) -> float:
        """Largest ratio, 0.0 for an empty tensor."""
        return float(self.ratio.max()) if self.ratio.numel() else 0.0


def compare(observed: Tensor, truth: Enclosure, stored: Format | None = None) -> Comparison:
    """Judge ``observed`` against ``truth`` rounded once to ``stored``.

    ``stored`` None means that the enclosure already includes every rounding.  NaN is
    demanded where the truth is NaN and refused elsewhere; an infinity is accepted only
    where the interval reaches it; an infinite radius accepts anything.
    """
    seen = observed.double()
    centre, low, high = truth.value, truth.value - truth.radius, truth.value + truth.radius
    if stored is not None:
        centre, low, high = (round_to(bound, stored) for bound in (centre, low, high))
    # an infinite truth leaves no interval, only itself
    unbounded = truth.radius.isinf() | (truth.value.isinf() & (seen == truth.value))
    nan_demanded = truth.value.isnan()
    inside = (low <= seen) & (seen <= high) | unbounded
    inside = torch.where(nan_demanded, seen.isnan(), inside)
    ratio = _share_of_radius(seen, truth, stored)
    ratio = torch.where(nan_demanded | unbounded, torch.where(inside, 0.0, torch.inf), ratio)
    return Comparison(~inside, ratio, low, high, centre)


def _share_of_radius(seen: Tensor, truth: Enclosure, stored: Format | None) -> Tensor:
    """The error that ``seen`` needs, over the radius; at most 1 inside, 0 for an exact result.

    Through a rounding, the error needed is the distance from the exact value to the
    boundary of the numbers that round to ``seen``: what roundings alone explain costs none.
    """
    if stored is None:
        needed = torch.where(seen == truth.value, 0.0, (seen - truth.value).abs())
    else:
        boundary = midpoint_toward(seen, truth.value, stored)
        beyond = (boundary - seen) * (truth.value - boundary) > 0
        needed = torch.where(beyond, (truth.value - boundary).abs(), 0.0)
        needed = torch.where(seen.isnan(), torch.nan, needed)
    ratio = torch.where(needed == 0, 0.0, needed / truth.radius)
    return ratio.nan_to_num(nan=torch.inf, posinf=torch.inf)
