"""Enclosures: an fp64 value and the radius that declared rounding allows around it.

One rule, one function.  ``u`` is the accumulator's unit roundoff, ``v`` the exact
value, ``e`` the radius.  Sources: N. J. Higham, *Accuracy and Stability of Numerical
Algorithms*, 2nd ed., chapter 3 (HARD); N. J. Higham and T. Mary, SIAM J. Sci.
Comput. 41 (2019), and I. C. F. Ipsen and H. Zhou, arXiv 1906.10465 (MED, SHARP).
"""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from twinmoe.oracle.rounding import Format, lowest_bit, round_to

#: Standard deviations that the probabilistic grades allow.  The chance of any false
#: alarm among N elements is at most 2 N exp(-LAMBDA**2 / 2): 3e-8 for a million.
LAMBDA = 8.0


class Grade(IntEnum):
    """How a radius was derived, from proof to model.

    HARD is a worst case over all orders: outside it, the arithmetic is not the declared
    one.  MED takes roundings as independent, mean zero.  SHARP also takes the data's
    partial sums to stay near their 2-norm; outside it the precision is suspect.
    """

    SHARP = 0
    MED = 1
    HARD = 2


@dataclass(frozen=True)
class Enclosure:
    """The interval [value - radius, value + radius]; both fp64, of one shape."""

    value: Tensor
    radius: Tensor

    @classmethod
    def exact(cls, value: Tensor) -> "Enclosure":
        """A stored tensor, taken as it is."""
        value = value.double()
        return cls(value, torch.zeros_like(value))

    def __getitem__(self, index: object) -> "Enclosure":
        return Enclosure(self.value[index], self.radius[index])  # type: ignore[index]

    def magnitude(self) -> Tensor:
        """The largest absolute value inside."""
        return self.value.abs() + self.radius


def rounded(x: Enclosure, target: Format | None) -> Enclosure:
    """Store ``x`` in ``target``: v' = rd(v), e' = max(rd(v + e) - v', v' - rd(v - e)).

    Rounding is monotone, so this is exact, and 0 unless the interval straddles a
    rounding boundary: roundings that every correct implementation commits cancel.
    """
    if target is None:
        return x
    value = round_to(x.value, target)
    above = round_to(x.value + x.radius, target) - value
    below = value - round_to(x.value - x.radius, target)
    # inf - inf: both ends overflow alike, so the infinity itself is certain
    radius = torch.maximum(above.nan_to_num(0.0, torch.inf), below.nan_to_num(0.0, torch.inf))
    return Enclosure(value, radius)


def matmul(x: Enclosure, weight: Tensor, accumulator: Format, grade: Grade) -> Enclosure:
    """X [..., n] times weight^T, weight [m, n] fp64: e = e_x |W|^T + accumulation error.

    HARD  n u / (1 - n u) (|x| + e_x) |W|^T
    MED   lam sqrt(n) u (|x| + e_x) |W|^T
    SHARP lam sqrt(n) u (|v| + 2 sqrt(x^2 (W^2)^T)), the |v| for one-signed sums
    """
    terms = weight.shape[-1]
    unit = accumulator.unit
    value = x.value @ weight.T
    propagated = x.radius @ weight.abs().T
    one_norm = x.magnitude() @ weight.abs().T
    if grade is Grade.HARD:
        error = terms * unit / (1 - terms * unit) * one_norm
    elif grade is Grade.MED:
        error = LAMBDA * terms**0.5 * unit * one_norm
    else:
        two_norm = (x.value.square() @ weight.square().T).sqrt()
        sharp = LAMBDA * terms**0.5 * unit * (value.abs() + propagated + 2 * two_norm)
        error = torch.minimum(sharp, terms * unit / (1 - terms * unit) * one_norm)
    # products below the normal range lose up to one smallest normal number each
    error = error + terms * accumulator.smallest_normal * (one_norm > 0)
    exact = _sums_are_exact(x, weight, one_norm, accumulator)
    return Enclosure(value, propagated + torch.where(exact, 0.0, error))


def _sums_are_exact(x: Enclosure, weight: Tensor, one_norm: Tensor, accumulator: Format) -> Tensor:
    """Where no order of summation can round: all products share a grid, all sums fit.

    Products are multiples of 2**(bit(x) + bit(W)); any partial sum is at most the
    1-norm, so it is representable while 1-norm / grid <= 2**precision.
    """
    grid_x = lowest_bit(x.value).amin(dim=-1, keepdim=True)
    grid_w = lowest_bit(weight).amin(dim=-1)
    grid = (grid_x + grid_w).clamp(-1000, 1000).double()
    fits = one_norm.log2() - grid <= accumulator.precision
    return (fits | (one_norm == 0)) & (x.radius.sum(dim=-1, keepdim=True) == 0)


def product(a: Enclosure, b: Enclosure, unit: float) -> Enclosure:
    """One rounded multiplication: |a| e_b + |b| e_a + e_a e_b + u |a b|."""
    value = a.value * b.value
    spread = a.value.abs() * b.radius + b.value.abs() * a.radius + a.radius * b.radius
    # one factor exactly 1 or 0 multiplies without rounding
    trivial = ((a.radius == 0) & ((a.value == 1) | (a.value == 0))) | (
        (b.radius == 0) & ((b.value == 1) | (b.value == 0))
    )
    return Enclosure(value, spread + torch.where(trivial, 0.0, unit * (value.abs() + spread)))


def total(terms: Enclosure, dim: int, unit: float) -> Enclosure:
    """Sum over ``dim`` in any order: m = n - 1 additions cost m u / (1 - m u) sum |term|.

    Adding an exact zero is exact, so only the n terms that can be nonzero count.
    """
    magnitude = terms.magnitude()
    additions = ((magnitude > 0).sum(dim=dim) - 1).clamp(min=0)
    error = additions * unit / (1 - additions * unit) * magnitude.sum(dim=dim)
    return Enclosure(terms.value.sum(dim=dim), terms.radius.sum(dim=dim) + error)
