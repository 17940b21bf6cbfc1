"""Enclosures: an fp64 value and the radius that declared rounding allows around it.

One rule, one function.  ``u`` is the accumulator's unit roundoff, ``v`` the exact
value, ``e`` the radius.  Sources: N. J. Higham, *Accuracy and Stability of Numerical
Algorithms*, 2nd ed., chapter 3 (HARD); N. J. Higham and T. Mary, SIAM J. Sci.
Comput. 41 (2019), and I. C. F. Ipsen and H. Zhou, arXiv 1906.10465 (MED, SHARP).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Self, TypeVar

import torch
from torch import Tensor

from twinmoe.oracle.infinities import Specials, in_range, of_product
from twinmoe.oracle.rounding import Format, lowest_bit, round_to

#: Standard deviations that the probabilistic grades allow.  The chance of any false
#: alarm among N elements is at most 2 N exp(-LAMBDA**2 / 2): 3e-8 for a million.
LAMBDA = 8.0


Index = tuple[Tensor, ...]


class Grade(IntEnum):
    """How a radius was derived, from model to proof.

    HARD is a worst case over all orders: outside it, the arithmetic is not the declared
    one.  MED takes roundings as independent, mean zero.  SHARP also takes the data's
    partial sums to stay near their 2-norm; outside it the precision is suspect.
    """

    SHARP = 0
    MED = 1
    HARD = 2


@dataclass(frozen=True)
class Enclosure:
    """The interval [value - radius, value + radius]; both fp64, of one shape.

    For infinities, NaN and what may be anything see :mod:`twinmoe.oracle.infinities`.
    """

    value: Tensor
    radius: Tensor

    #: Standard deviations that the radius of a probabilistic grade spans.
    deviations: ClassVar[float] = LAMBDA

    @classmethod
    def of(cls, value: Tensor, error: Tensor) -> Self:
        """A value and one number for each element's error."""
        return cls(value, error)

    @classmethod
    def exact(cls, value: Tensor) -> Self:
        """A stored tensor, taken as it is."""
        value = value.double()
        return cls(value, torch.zeros_like(value))

    @classmethod
    def stack(cls, parts: "list[Self]") -> Self:
        """Enclosures of one shape along a new first dimension."""
        return cls(
            torch.stack([part.value for part in parts]),
            torch.stack([part.radius for part in parts]),
        )

    @classmethod
    def scattered(cls, shape: Sequence[int], parts: "Sequence[tuple[Index, Self]]") -> Self:
        """Zeros of ``shape`` with each part put at its index."""
        whole = cls.exact(torch.zeros(*shape))
        for index, part in parts:
            whole.value[index] = part.value
            whole.radius[index] = part.radius
        return whole

    def __getitem__(self, index: object) -> Self:
        return type(self)(self.value[index], self.radius[index])  # type: ignore[index]

    def to(self, device: torch.device) -> Self:
        """The same numbers on ``device``."""
        return type(self)(self.value.to(device), self.radius.to(device))

    def magnitude(self) -> Tensor:
        """The largest absolute value inside."""
        return self.value.abs() + self.radius

    def error(self) -> Tensor:
        """One number for each element's error."""
        return self.radius

    def specials(self) -> Specials | None:
        """Where something is not finite; None if nothing is."""
        return Specials.of(self.value, self.radius)

    def in_range(self, above: Tensor, below: Tensor, target: Format) -> Self:
        """See :func:`twinmoe.oracle.infinities.in_range`."""
        return type(self)(*in_range(self.value, self.radius, above, below, target))

    def only(self, mask: Tensor) -> Self:
        """Exact zeros where ``mask`` is false."""
        return type(self)(torch.where(mask, self.value, 0.0), torch.where(mask, self.radius, 0.0))

    def mapped(self, increasing: Callable[[Tensor], Tensor]) -> Self:
        """An increasing function: both ends go through it."""
        value = increasing(self.value)
        above = increasing(self.value + self.radius) - value
        return type(self)(value, torch.maximum(above, value - increasing(self.value - self.radius)))

    def largest(self) -> Self:
        """The largest magnitude along the last dimension, which is kept."""
        size = self.value.abs()
        ends = (size, size + self.radius, (size - self.radius).clamp(min=0))
        value, high, low = (end.amax(dim=-1, keepdim=True) for end in ends)
        return type(self)(value, torch.maximum(high - value, value - low))

    # How several sources of error make one: what a Spread does otherwise.

    @staticmethod
    def partial_sums(value: Tensor, propagated: Tensor, two_norm: Tensor) -> Tensor:
        """How large partial sums grow on data of random signs, or of one: |v| + e + 2 2-norms."""
        return value.abs() + propagated + 2 * two_norm

    @staticmethod
    def join(*radii: Tensor) -> Tensor:
        """Errors at worst all have one sign: their sum."""
        return torch.stack(torch.broadcast_tensors(*radii)).sum(dim=0)

    def join_along(self, dim: int) -> Tensor:
        """The joined radius of the sum over ``dim``."""
        return self.radius.sum(dim=dim)

    def through(self, weight: Tensor) -> Tensor:
        """The radius of this times weight^T, from this radius alone: e |W|^T."""
        return self.radius @ weight.abs().T

    def stored(self, value: Tensor, target: Format) -> Self:
        """See :func:`rounded`."""
        above = round_to(self.value + self.radius, target) - value
        below = value - round_to(self.value - self.radius, target)
        # inf - inf: both ends overflow alike, so the infinity itself is certain
        certain = (value_.nan_to_num(0.0, torch.inf) for value_ in (above, below))
        radius = torch.maximum(*certain)
        return type(self)(value.masked_fill(radius.isinf(), 0.0), radius)


E = TypeVar("E", bound=Enclosure)


def rounded(x: E, target: Format | None) -> E:
    """Store ``x`` in ``target``: v' = rd(v), e' = max(rd(v + e) - v', v' - rd(v - e)).

    Rounding is monotone, so this is exact, and 0 unless the interval straddles a
    rounding boundary: roundings that every correct implementation commits cancel.
    """
    return x if target is None else x.stored(round_to(x.value, target), target)


#: Elements of a weight matrix that are widened to fp64 at a time.
_CHUNK = 1 << 20


def matmul(x: E, weight: Tensor, accumulator: Format, grade: Grade) -> E:
    """Product of x [..., n] and weight^T, weight [m, n] as stored: e = e_x |W|^T + error.

    HARD  n u / (1 - n u) s, where s = (|x| + e_x) |W|^T bounds every partial sum
    MED   lam sqrt(n) u s
    SHARP the same with s = |v| + 2 sqrt(x^2 (W^2)^T), the |v| for one-signed sums
    tensor cores  ceil(n / block) block_unit (s + |v|) in addition: every block's sum is
    cut, and so are its products, which matters where their signs agree
    operands aligned from a  u (max(|x|, a) max(|W|, a)^T - |x| |W|^T) in addition, 0 for zeros

    A Spread (``spread.py``) has its own lam and, for SHARP, its own s.
    """
    rows = max(1, _CHUNK // max(1, weight.shape[-1]))
    specials = x.specials()
    if specials is None:
        parts = [_matmul(x, part.double(), accumulator, grade) for part in weight.split(rows)]
    else:
        finite = x.only(~specials.anywhere)
        parts = []
        for part in weight.split(rows):
            sums = _matmul(finite, part.double(), accumulator, grade)
            met = specials.times(part, accumulator.drops_below)
            parts.append(type(x)(*met.put_into(sums.value, sums.radius)))
    if len(parts) == 1:
        return parts[0]
    return type(x)(
        torch.cat([part.value for part in parts], dim=-1),
        torch.cat([part.radius for part in parts], dim=-1),
    )


def _matmul(x: E, weight: Tensor, accumulator: Format, grade: Grade) -> E:
    terms = weight.shape[-1]
    unit = accumulator.unit
    value = x.value @ weight.T
    propagated = x.through(weight)
    one_norm = x.magnitude() @ weight.abs().T
    size = one_norm
    if grade is Grade.SHARP:
        two_norm = (x.value.square() @ weight.square().T).sqrt()
        size = torch.minimum(x.partial_sums(value, propagated, two_norm), one_norm)
    error = terms * unit / (1 - terms * unit) * one_norm
    if grade is not Grade.HARD:
        error = torch.minimum(x.deviations * terms**0.5 * unit * size, error)
    if accumulator.block:
        cut = accumulator.block_unit * (size + value.abs())
        error = error + -(-terms // accumulator.block) * cut
    lost = max(accumulator.underflow, accumulator.drops_below)
    error = error + (one_norm > 0).double() * (terms * lost)
    exact = _sums_are_exact(x, weight, one_norm, accumulator)
    error = torch.where(exact, 0.0, error)
    if accumulator.drops_below:
        error = error + _dropped(x, weight.abs(), accumulator.drops_below)
    if accumulator.aligned_from:
        least = accumulator.aligned_from
        nominal = _raised(x.value, least) @ _raised(weight, least).T
        error = error + unit * (nominal - x.value.abs() @ weight.abs().T).clamp(min=0)
    radius = x.join(propagated, error)
    reach = one_norm + type(x)(value, radius).error()
    above, below = (reach + value) / 2, (reach - value) / 2  # sums of terms of either sign
    return type(x)(value, radius).in_range(above, below, accumulator)


def _dropped(x: Enclosure, columns: Tensor, least: float) -> Tensor | float:
    """The sums of magnitudes of what is lost with factors that may be below ``least``.

    Of a factor that only may be that small, no more than ``least`` can be lost.
    """
    size, sure = x.magnitude(), x.value.abs() - x.error() >= least
    heavy = columns.where(columns >= least, 0.0)
    light = columns - heavy
    if not (size.masked_fill(sure, 0.0).any() or light.any()):
        return 0.0  # as in nearly all
    return size.clamp(max=least).where(~sure, 0.0) @ columns.T + size @ light.T


def _raised(factor: Tensor, least: float) -> Tensor:
    """Magnitudes as an adder takes them that reads no exponent below ``least``'s."""
    return torch.where(factor == 0, 0.0, factor.abs().clamp(min=least))


def _sums_are_exact(x: Enclosure, weight: Tensor, one_norm: Tensor, accumulator: Format) -> Tensor:
    """Where no order of summation can round: all products share a grid, all sums fit.

    Products are multiples of 2**(bit(x) + bit(W)); any partial sum is at most the
    1-norm, so it is representable while 1-norm / grid <= 2**precision, and no smaller
    than the grid, which has to lie in the normal range.
    """
    grid_x = lowest_bit(x.value).amin(dim=-1, keepdim=True)
    certain = x.error().sum(dim=-1, keepdim=True) == 0

    def fits(columns: Tensor) -> Tensor:
        grid = (grid_x + lowest_bit(columns).amin(dim=-1)).clamp(-1000, 1000).double()
        below = one_norm < torch.exp2(grid + accumulator.precision)
        fit = below & (grid >= accumulator.min_exponent)
        return (fit | (one_norm == 0)) & certain

    # a few columns refute most matrices, and cost little
    refuted = not fits(weight[:, :32]).any()
    return torch.zeros_like(one_norm, dtype=torch.bool) if refuted else fits(weight)


def product(a: E, b: E, accumulator: Format) -> E:
    """One rounded multiplication, the result of which has to fit the accumulator."""
    return held(multiplied(a, b, accumulator), accumulator)


def multiplied(a: E, b: E, accumulator: Format) -> E:
    """|a| e_b + |b| e_a + e_a e_b + u |a b|, as if the accumulator's exponent had no end.

    Of a product that nobody need hold: a fused multiply-add only holds the sum.
    """
    value = a.value * b.value
    spread = a.join(a.value.abs() * b.radius, b.value.abs() * a.radius, a.radius * b.radius)
    # one factor exactly 1 or 0 multiplies without rounding
    trivial = _is_one_or_zero(a) | _is_one_or_zero(b)
    error = accumulator.unit * type(a)(value, spread).magnitude() + accumulator.underflow
    radius = a.join(spread, torch.where(trivial, 0.0, error))
    if a.specials() is not None or b.specials() is not None:
        pair = of_product((a.value, a.radius), (b.value, b.radius), (value, radius))
        return type(a)(*pair)
    return type(a)(value, radius)


def held(x: E, accumulator: Format, reach: Tensor | None = None) -> E:
    """``x`` in a register of the accumulator; ``reach`` bounds what went before, of its sign."""
    end = x.error()
    above, below = (x.value + end).clamp(min=0), (end - x.value).clamp(min=0)
    if reach is not None:
        above = torch.maximum(above, reach).where(x.value + end >= 0, 0.0)
        below = torch.maximum(below, reach).where(x.value - end <= 0, 0.0)
    return x.in_range(above, below, accumulator)


def _is_one_or_zero(x: Enclosure) -> Tensor:
    return (x.error() == 0) & ((x.value == 1) | (x.value == 0))


def total(terms: E, dim: int, accumulator: Format) -> E:
    """Sum over ``dim`` in any order: m = n - 1 additions cost m u / (1 - m u) sum |term|.

    Adding an exact zero is exact, so only the n terms that can be nonzero count.  A sum
    of numbers never underflows: it is a multiple of their lowest bit.
    """
    specials = terms.specials()
    if specials is not None:
        finite = total(terms.only(~specials.anywhere), dim, accumulator)
        met = specials.along(dim).put_into(finite.value, finite.radius)
        return type(terms)(*met)
    magnitude = terms.magnitude()
    additions = ((magnitude > 0).sum(dim=dim) - 1).clamp(min=0)
    unit = accumulator.unit
    error = additions * unit / (1 - additions * unit) * magnitude.sum(dim=dim)
    error = torch.where(additions > 0, error, 0.0)
    if accumulator.flushes:
        error = error + (additions > 0).double() * accumulator.underflow
    value = terms.value.sum(dim=dim)
    result = type(terms)(value, terms.join(terms.join_along(dim), error))
    ends = (terms.value.clamp(min=0).sum(dim=dim), (-terms.value).clamp(min=0).sum(dim=dim))
    above, below = (end + result.error() for end in ends)
    return result.in_range(above, below, accumulator)
