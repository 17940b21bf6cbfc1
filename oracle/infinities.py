"""What becomes of infinities, NaN and numbers beyond a format's range: known, or anything.

An enclosure's value may be an infinity or NaN, with radius 0: every correct result is that.  Where
it depends on an order of summation, or on which side of the overflow a number lies, a result may be
finite, infinite or NaN: the value is 0 there and the radius infinite, which allows anything.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from twinmoe.oracle.rounding import Format

#: A value and its radius.
Pair = tuple[Tensor, Tensor]


class Specials(NamedTuple):
    """Where a tensor is certainly NaN, certainly one of the infinities, or not known at all."""

    nan: Tensor
    plus: Tensor
    minus: Tensor
    unknown: Tensor

    @classmethod
    def of(cls, value: Tensor, radius: Tensor) -> "Specials | None":
        """Those of an enclosure; None if all of it is finite, as nearly always."""
        if bool(value.isfinite().all()) and bool(radius.isfinite().all()):
            return None
        nan = value.isnan() & (radius != torch.inf)
        certain = radius == 0
        plus, minus = (value == torch.inf) & certain, (value == -torch.inf) & certain
        finite = value.isfinite() & radius.isfinite()
        return cls(nan, plus, minus, ~(finite | nan | plus | minus))

    @property
    def anywhere(self) -> Tensor:
        """Where any of them is."""
        return self.nan | self.plus | self.minus | self.unknown

    def along(self, dim: int) -> "Specials":
        """What they make of sums over ``dim``: infinities of both signs make NaN."""
        nan, plus, minus, unknown = (part.any(dim=dim) for part in self)
        return Specials(nan | (plus & minus), plus, minus, unknown)

    def times(self, weight: Tensor, drops_below: float) -> "Specials":
        """What they make of products with weight^T, weight [m, n]; infinity times zero is NaN.

        Weights below ``drops_below`` may count as zero.
        """

        def met(special: Tensor, columns: Tensor) -> Tensor:
            return special.double() @ columns.double().T > 0

        infinite, everywhere = self.plus | self.minus, torch.ones_like(weight, dtype=torch.bool)
        plus = met(self.plus, weight > 0) | met(self.minus, weight < 0)
        minus = met(self.plus, weight < 0) | met(self.minus, weight > 0)
        nan = met(self.nan, everywhere) | met(infinite, weight == 0) | (plus & minus)
        faint = (weight != 0) & (weight.abs() < drops_below)
        return Specials(nan, plus, minus, met(self.unknown, everywhere) | met(infinite, faint))

    def kept(self, radius: Tensor) -> Tensor:
        """Radii after a step that leaves certainty and doubt as they are."""
        return radius.masked_fill(self.nan | self.plus | self.minus, 0.0).masked_fill(
            self.unknown, torch.inf
        )

    def put_into(self, value: Tensor, radius: Tensor) -> Pair:
        """Add them to the sum of all finite terms, which may itself be beyond the range."""
        against = (self.plus & (value == -torch.inf)) | (self.minus & (value == torch.inf))
        infinite = self.plus | self.minus
        unknown = self.unknown | against | (infinite & radius.isinf())
        value = torch.where(self.plus, torch.inf, torch.where(self.minus, -torch.inf, value))
        return _pair(value, radius.masked_fill(infinite, 0.0), self.nan, unknown)


def in_range(value: Tensor, radius: Tensor, above: Tensor, below: Tensor, target: Format) -> Pair:
    """A value that ``target`` had to hold, with all that it went through on the way.

    Results on the way lie in [-``below``, ``above``].  Within the range nothing changes.  What is
    surely beyond one end, and never was at the other, is that infinity; all else is not known.
    """
    leaves = (above > target.max_value) | (below > target.max_value)  # a NaN does not
    if not bool(leaves.any()):
        return value, radius
    beyond = target.max_value * (1 + 2 * target.unit)  # past the middle to the next power of two
    plus = (value - radius > beyond) & (below <= target.max_value)
    minus = (value + radius < -beyond) & (above <= target.max_value)
    value = torch.where(plus, torch.inf, torch.where(minus, -torch.inf, value))
    unknown = leaves & ~(plus | minus)
    return _pair(value, radius.masked_fill(plus | minus, 0.0), value.isnan(), unknown)


def of_product(a: Pair, b: Pair, product: Pair) -> Pair:
    """Put right the ``product`` of two enclosures of which one is not finite throughout."""
    (left, left_radius), (right, right_radius) = a, b
    one = Specials.of(*torch.broadcast_tensors(left, left_radius))
    other = Specials.of(*torch.broadcast_tensors(right, right_radius))
    if one is None and other is None:
        return product
    special = torch.zeros_like(product[0], dtype=torch.bool)
    nan, infinite, unknown = special, special, special
    for specials, factor, error in ((one, right, right_radius), (other, left, left_radius)):
        if specials is None:
            continue
        endless = specials.plus | specials.minus
        is_zero, no_zero = (factor == 0) & (error == 0), factor.abs() > error
        nan = nan | specials.nan | (endless & is_zero)
        infinite = infinite | (endless & no_zero)
        unknown = unknown | specials.unknown | (endless & ~is_zero & ~no_zero)
        special = special | specials.anywhere
    value, radius = product
    radius = radius.masked_fill(infinite, 0.0)
    return _pair(value.where(~special | infinite, 0.0), radius, nan, unknown & ~nan)


def of_function(specials: Specials, value: Tensor, radius: Tensor) -> Pair:
    """Put right a function's ``value`` at what is not finite.

    Its limit at an infinity, where the formula gives none (``-inf * 0``), is not known: one
    evaluation finds NaN, another the limit.
    """
    infinite = specials.plus | specials.minus
    unknown = specials.unknown | (infinite & value.isnan())
    return _pair(value, radius.masked_fill(infinite, 0.0), specials.nan, unknown)


def _pair(value: Tensor, radius: Tensor, nan: Tensor, unknown: Tensor) -> Pair:
    """The same with NaN where it is certain, and anything allowed where nothing is."""
    value = torch.where(nan, torch.nan, torch.where(unknown, 0.0, value))
    return value, torch.where(nan, 0.0, torch.where(unknown, torch.inf, radius))
