"""Products on their way to where they are stored, or added: what has to fit the accumulator.

Who multiplies more than two factors chooses the order, and so what comes in between; who adds a
product at once may fuse the two, and then never holds it.
"""

from dataclasses import dataclass
from typing import Generic

import torch
from torch import Tensor

from twinmoe.oracle.envelope import E, held, multiplied, rounded
from twinmoe.oracle.rounding import Format


def summand(a: E, b: E, stored: Format | None, accumulator: Format) -> E:
    """The product of ``a`` and ``b`` that is added next: unless stored, it need not fit."""
    product = multiplied(a, b, accumulator)
    return product if stored is None else rounded(held(product, accumulator), stored)


@dataclass(frozen=True)
class Unstored(Generic[E]):
    """A product of factors that a kernel may multiply in any order, until it stores the result.

    (gate up) sigmoid(gate) overflows where gate sigmoid(gate), times up, does not.  ``product`` is
    as if exponents had no end, ``reach`` the largest product of some of the factors, at least 1.
    """

    product: E
    reach: Tensor
    accumulator: Format

    def times(self, factor: E) -> "Unstored[E]":
        """The same with one more factor."""
        product = multiplied(self.product, factor, self.accumulator)
        # a product on the way that was below the normal range, times all that is above 1
        lost = torch.where(product.error() > 0, self.accumulator.underflow * self.reach, 0.0)
        product = type(product)(product.value, product.join(product.radius, lost))
        reach = self.reach * factor.magnitude().clamp(min=1)
        return Unstored(product, reach, self.accumulator)

    def held(self) -> E:
        """The whole product, in the accumulator."""
        return held(self.product, self.accumulator, self.reach)

    def stored(self, target: Format | None) -> "Unstored[E]":
        """The one factor that a stored product is; None stores nothing."""
        if target is None:
            return self
        kept = rounded(self.held(), target)
        return Unstored(kept, kept.magnitude().clamp(min=1), self.accumulator)
