"""Spread: the same rules as an enclosure's, for the expected size of errors.

An enclosure says how far a correct result may lie; a spread, how far it is expected to.
It answers how many roundings correct arithmetic can be expected to flip.

Errors are of two natures.  The many roundings of a sum make a *quiet* error, as good as
normal.  A stored rounding that a quiet error flips makes a *loud* one: a whole ulp, but
seldom.  What follows sums loud errors to a compound Poisson variable, which is zero most
of the time; taking it for a normal of its variance would expect ten times the flips.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from twinmoe.oracle.envelope import Enclosure, Index
from twinmoe.oracle.infinities import Specials
from twinmoe.oracle.rounding import Format, ulp


@dataclass(frozen=True)
class Spread(Enclosure):
    """``radius`` is [4, ...]: quiet rms, and of the loud error its mean size, rms and shared rms.

    Quiet errors add in quadrature.  The mean size of a sum of loud ones is at most the
    sum of their mean sizes, which is kept, and at most their root mean square (Jensen).
    *Shared* is what all elements of a row have in common, having come through a GEMM: it
    tells how much the share of flips varies from row to row.
    """

    #: Roundings to nearest err uniformly: each addition by at most u |s_k|, rms u |s_k| / sqrt 3.
    deviations: ClassVar[float] = 3**-0.5

    @classmethod
    def of(cls, value: Tensor, error: Tensor) -> Self:
        """A quiet error of this root mean square."""
        return cls(value, _quiet(error))

    @classmethod
    def exact(cls, value: Tensor) -> Self:
        """A stored tensor, taken as it is."""
        value = value.double()
        return cls.of(value, torch.zeros_like(value))

    @classmethod
    def stack(cls, parts: "list[Self]") -> Self:
        """Spreads of one shape along a new first dimension."""
        return cls(
            torch.stack([part.value for part in parts]),
            torch.stack([part.radius for part in parts], dim=1),
        )

    @classmethod
    def scattered(cls, shape: Sequence[int], parts: "Sequence[tuple[Index, Self]]") -> Self:
        """Zeros of ``shape`` with each part put at its index."""
        whole = cls.exact(torch.zeros(*shape))
        for index, part in parts:
            whole.value[index] = part.value
            whole.radius[:, *index] = part.radius  # type: ignore[index]
        return whole

    def __getitem__(self, index: object) -> Self:
        inner = index if isinstance(index, tuple) else (index,)
        return type(self)(self.value[index], self.radius[:, *inner])  # type: ignore[index]

    def magnitude(self) -> Tensor:
        """The size of the value: the error's is negligible in an expectation."""
        return self.value.abs()

    def error(self) -> Tensor:
        """Root mean square of the whole error."""
        quiet, _, rms, _ = self.radius
        return torch.hypot(quiet, rms)

    def specials(self) -> Specials | None:
        """None: rows that are not finite take no part in what is expected."""
        return None

    def in_range(self, above: Tensor, below: Tensor, target: Format) -> Self:
        """Leave infinities to the rounding that makes them."""
        return self

    def mapped(self, increasing: Callable[[Tensor], Tensor]) -> Self:
        """A step function (nothing else is mapped): the value is expected on its step."""
        return self.exact(increasing(self.value))

    def largest(self) -> Self:
        """The largest magnitude along the last dimension, with its own error."""
        where = self.value.abs().argmax(dim=-1, keepdim=True)
        radius = self.radius.gather(-1, where.expand(len(self.radius), *where.shape))
        return type(self)(self.value.gather(-1, where).abs(), radius)

    @staticmethod
    def partial_sums(value: Tensor, propagated: Tensor, two_norm: Tensor) -> Tensor:
        """Root mean square over the partial sums of a sum of random order.

        On the way to v, after a share t of the terms, their mean is t v and their variance
        t (1 - t) (2-norm)^2: mean squares v^2 / 3 and (2-norm)^2 / 6.
        """
        return (value.square() / 3 + two_norm.square() / 6).sqrt()

    @staticmethod
    def join(*radii: Tensor) -> Tensor:
        """Independent errors; one without a leading dimension is quiet."""
        dims = max(part.dim() for part in radii)
        parts = [part if part.dim() == dims else _quiet(part) for part in radii]
        return _joined(torch.stack(torch.broadcast_tensors(*parts)))

    def join_along(self, dim: int) -> Tensor:
        """The joined errors of the sum over ``dim``, a dimension of the value."""
        dim = dim % self.value.dim()
        return _joined(self.radius.movedim(dim + 1, 0))

    def through(self, weight: Tensor) -> Tensor:
        """The errors of this times weight^T."""
        quiet, mean, rms, _ = self.radius
        squares = torch.stack([quiet, rms]).square() @ weight.square().T
        quiet, rms = squares.clamp(min=0).sqrt()
        return torch.stack([quiet, mean @ weight.abs().T, rms, rms])

    def stored(self, value: Tensor, target: Format) -> Self:
        """Quiet errors below an ulp become flips; the mean size of loud ones survives.

        An error e flips a rounding with probability |e| / ulp, and then costs an ulp.  A
        quiet error wider than that hardly notices.
        """
        spacing = ulp(value.nan_to_num(), target)
        quiet, mean, rms, shared = self.radius
        wide = quiet > spacing
        mean = mean + torch.where(wide, 0.0, self._quiet_chance(value, spacing) * spacing)
        rms = (rms.square() + mean * spacing).sqrt()
        return type(self)(value, torch.stack([quiet * wide, mean, rms, shared]))

    def flips(self, value: Tensor, target: Format) -> tuple[Tensor, Tensor]:
        """Chances [..., n] that rounding to ``target`` does not give ``value``, the rounded truth.

        Also a bound on the variance [...] of the share that flips of a row's n elements.
        The part of the row's own elements varies by itself; of what they share, flip rates
        are min(1, |e| / ulp), whose root mean squares add at most (Minkowski).
        """
        spacing = ulp(value.nan_to_num(), target)
        quiet = self._quiet_chance(value, spacing)
        _, mean, rms, shared = (self.radius / spacing).nan_to_num(1.0)
        chance = (quiet + torch.minimum(mean, rms)).clamp(max=1)
        # of a normal error, rms = sqrt(pi / 2) mean size
        together = torch.minimum(shared + (math.pi / 2) ** 0.5 * quiet, chance.sqrt())
        own = chance.sum(dim=-1) / max(1, value.shape[-1]) ** 2
        return chance, together.mean(dim=-1).square() + own

    def _quiet_chance(self, value: Tensor, spacing: Tensor) -> Tensor:
        """P(the quiet error alone reaches beyond a rounding boundary).

        The exact value is known, and so are its distances to the boundaries on both sides; a
        normal error passes one with probability erfc(distance / rms sqrt(2)) / 2.  Values on
        a boundary (sums of stored outputs times 1/3, say) pass it all alike, as the sign of
        one common error has it, so their chance counts as 1.  The truth itself is known to
        about 2**-50.
        """
        off_centre = (self.value - value).abs()
        rms = torch.maximum(self.radius[0], 2.0**-50 * spacing * (off_centre > 0))
        near, far = (spacing / 2 - off_centre).clamp(min=0), spacing / 2 + off_centre
        chance = sum(torch.erfc(distance / (rms * 2**0.5)) / 2 for distance in (near, far))
        chance = torch.where(near <= 2.0**-40 * spacing, 1.0, chance)
        return torch.where((rms == 0) & (near > 0), 0.0, chance.nan_to_num(1.0))


def _quiet(rms: Tensor) -> Tensor:
    silence = torch.zeros_like(rms)
    return torch.stack([rms, silence, silence, silence])


def _joined(parts: Tensor) -> Tensor:
    """Parts [n, 4, ...] of one sum to [4, ...]."""
    squares, means = parts.square().sum(dim=0).sqrt(), parts[:, 1].sum(dim=0)
    return torch.stack([squares[0], means, squares[2], squares[3]])
