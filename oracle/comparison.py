"""Hold one observed tensor against one enclosure, element by element."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from twinmoe.oracle.envelope import Enclosure
from twinmoe.oracle.rounding import FORMATS, Format, midpoint_toward, round_to, ulp

#: A flip rate is refused when chance explains it with less than this probability.
FLIP_ALPHA = 1e-6

#: Fewer elements than this say too little about a rate.
FLIP_ELEMENTS = 512


@dataclass(frozen=True)
class Comparison:
    """The result for one tensor: where it leaves its interval, and by how much.

    ``outside`` marks elements beyond the interval [low, high] of correct results;
    ``ratio`` is the error that the observed element needs over the radius that it may
    have: above 1 outside, infinity for a wrong class (NaN, infinity) or where no error at
    all is allowed; ``flips`` counts elements that differ from the
    exactly rounded truth, ``expected_flips`` bounds the number that correct arithmetic
    can expect: the mean of min(1, radius / ulp) times the element count.
    """

    outside: Tensor
    ratio: Tensor
    low: Tensor
    high: Tensor
    flips: int
    expected_flips: float

    @property
    def elements(self) -> int:
        """Number of elements compared."""
        return self.outside.numel()

    @property
    def worst_ratio(self) -> float:
        """Largest ratio, 0.0 for an empty tensor."""
        return float(self.ratio.max()) if self.ratio.numel() else 0.0

    @property
    def too_many_flips(self) -> bool:
        """More flips than declared rounding explains, by Chernoff's bound.

        P(X >= x) <= exp(-n KL(x/n || p)) for a binomial X of n trials of probability p
        (H. Chernoff, Ann. Math. Stat. 23, 1952).
        """
        n = self.elements
        rate, expected = self.flips / max(n, 1), self.expected_flips / max(n, 1)
        if n < FLIP_ELEMENTS or rate <= expected or expected >= 1:
            return False
        if expected == 0:
            return True
        divergence = rate * math.log(rate / expected)
        if rate < 1:
            divergence += (1 - rate) * math.log((1 - rate) / (1 - expected))
        return -n * divergence < math.log(FLIP_ALPHA)


def compare(observed: Tensor, truth: Enclosure, stored: Format | None = None) -> Comparison:
    """Judge ``observed`` against ``truth`` rounded once to ``stored``.

    ``stored`` None means that the enclosure already includes every rounding.  NaN is
    demanded where the truth is NaN and refused elsewhere; an infinity is accepted only
    where the interval reaches it; an infinite radius accepts anything but a bare claim.
    """
    seen = observed.double()
    centre, low, high = truth.value, truth.value - truth.radius, truth.value + truth.radius
    if stored is not None:
        centre, low, high = (round_to(bound, stored) for bound in (centre, low, high))
    unbounded = truth.radius.isinf()
    nan_demanded = truth.value.isnan()
    inside = (low <= seen) & (seen <= high) | unbounded
    inside = torch.where(nan_demanded, seen.isnan(), inside)
    ratio = _share_of_radius(seen, truth, stored)
    ratio = torch.where(nan_demanded | unbounded, torch.where(inside, 0.0, torch.inf), ratio)
    flipped = (seen != centre) & ~nan_demanded
    spacing = ulp(centre.nan_to_num(), stored or FORMATS[observed.dtype])
    chance = torch.where(nan_demanded, 0.0, (truth.radius / spacing).clamp(max=1.0))
    return Comparison(~inside, ratio, low, high, int(flipped.sum()), float(chance.sum()))


def _share_of_radius(seen: Tensor, truth: Enclosure, stored: Format | None) -> Tensor:
    """The error that ``seen`` needs, over the radius; at most 1 inside, 0 for an exact result.

    Through a rounding, the error needed is the distance from the exact value to the
    boundary of the numbers that round to ``seen``: what roundings alone explain costs none.
    """
    if stored is None:
        needed = (seen - truth.value).abs()
    else:
        boundary = midpoint_toward(seen, truth.value, stored)
        beyond = (boundary - seen) * (truth.value - boundary) > 0
        needed = torch.where(beyond, (truth.value - boundary).abs(), 0.0)
    ratio = torch.where(needed == 0, 0.0, needed / truth.radius)
    return ratio.nan_to_num(nan=torch.inf, posinf=torch.inf)
