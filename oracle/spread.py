"""Spread: the same rules as an enclosure's, for the expected size of errors.

An enclosure says how far a correct result may lie; a spread, how far it is expected to.
It answers how many roundings correct arithmetic can be expected to flip.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from twinmoe.oracle.envelope import Enclosure, Index
from twinmoe.oracle.rounding import Format, ulp


@dataclass(frozen=True)
class Spread(Enclosure):
    """``radius`` is [2, ...]: bounds on the mean and the root mean square of |error|.

    Both are needed.  A small error seldom flips a stored rounding, but then costs a whole
    ulp, so that its mean stays small while its mean square does not.  Independent errors
    add in quadrature; the mean of their sum is at most the sum of their means and, by
    Jensen's inequality, at most the root mean square.
    """

    #: One standard deviation of a sequential sum of n terms: each addition errs by at most
    #: u |s_k|, uniformly, rms u |s_k| / sqrt(3), and partial sums s_k that grow to a 2-norm
    #: have sum s_k^2 = n / 2 (2-norm)^2.  Other orders err less.
    deviations: ClassVar[float] = 6**-0.5

    @classmethod
    def of(cls, value: Tensor, size: Tensor) -> Self:
        """An error of which mean and root mean square are both ``size``."""
        return cls(value, torch.stack([size, size]))

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

    @property
    def mean(self) -> Tensor:
        """Bound on the mean of |error|."""
        return self.radius[0]

    def __getitem__(self, index: object) -> Self:
        inner = index if isinstance(index, tuple) else (index,)
        return type(self)(self.value[index], self.radius[:, *inner])  # type: ignore[index]

    def magnitude(self) -> Tensor:
        """The size of the value: the error's is negligible in an expectation."""
        return self.value.abs()

    @staticmethod
    def join(*radii: Tensor) -> Tensor:
        """Independent errors; one without a leading dimension has mean = rms."""
        dims = max(part.dim() for part in radii)
        parts = [part if part.dim() == dims else part.expand(2, *part.shape) for part in radii]
        stacked = torch.stack(torch.broadcast_tensors(*parts))
        return _jensen(stacked[:, 0].sum(dim=0), stacked[:, 1].square().sum(dim=0).sqrt())

    def join_along(self, dim: int) -> Tensor:
        """The joined errors of the sum over ``dim``, a dimension of the value."""
        mean, rms = self.radius
        return _jensen(mean.sum(dim=dim), rms.square().sum(dim=dim).sqrt())

    def through(self, weight: Tensor) -> Tensor:
        """The errors of this times weight^T."""
        mean, rms = self.radius
        return _jensen(
            mean @ weight.abs().T, (rms.square() @ weight.square().T).clamp(min=0).sqrt()
        )

    def stored(self, value: Tensor, target: Format) -> Self:
        """A flip costs a whole ulp; an error wider than that passes through as it is."""
        mean, rms = self.radius
        spacing = ulp(value.nan_to_num(), target)
        chance = self.flip_chance(value, target)
        square = rms.square() * (rms > spacing) + chance * spacing.square()
        mean = torch.maximum(mean * (mean > spacing), chance * spacing)
        return type(self)(value, torch.stack([mean, square.sqrt()]))

    def flip_chance(self, value: Tensor, target: Format) -> Tensor:
        """P(rounding to ``target`` does not give ``value``, the rounded exact value).

        The exact value is known, and so is its distance to the nearer rounding boundary;
        a normal error of this rms passes it with probability erfc(distance / rms sqrt(2)).
        The truth itself is known to about 2**-50.
        """
        spacing = ulp(value.nan_to_num(), target)
        distance = (spacing / 2 - (self.value - value).abs()).clamp(min=0)
        rms = torch.maximum(self.radius[1], 2.0**-50 * spacing * (self.value != value))
        chance = torch.erfc(distance / (rms * 2**0.5)).nan_to_num(1.0)
        return torch.where((rms == 0) & (distance > 0), 0.0, chance)


def _jensen(mean: Tensor, rms: Tensor) -> Tensor:
    return torch.stack([torch.minimum(mean, rms), rms])
