"""Enclosures of block-scaled quantisation: value -> code x scale, dequantised.

A block of values shares one scale, amax / largest code.  The quantised tensor is what the
next GEMM multiplies, so its enclosure is that of the dequantised product.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from twinmoe.oracle.envelope import E, product, rounded
from twinmoe.oracle.rounding import Format

#: Smaller than any scale of a block that is not all zeros, in any format.
_TINY = 2.0**-200


@dataclass(frozen=True)
class Quantiser:
    """Blocks of ``block`` consecutive values, codes in ``codes``, scales in ``scales``.

    ``power_of_two`` scales are rounded up to a power of two (OCP Microscaling's E8M0).
    """

    block: int
    codes: Format
    scales: Format
    power_of_two: bool = False

    def scale(self, amax: E, arithmetic: Format) -> E:
        """The scale for a block whose largest magnitude is ``amax``."""
        share = type(amax).exact(torch.full_like(amax.value, 1 / self.codes.max_value))
        scale = rounded(product(amax, share, arithmetic), self.scales)
        return scale.mapped(_up_to_power_of_two) if self.power_of_two else scale


def quantised(x: E, quantiser: Quantiser | None, arithmetic: Format) -> E:
    """Enclose the dequantised tensor; x is [..., n], the last block may be short.

    Values over scales, rounded to codes, times scales, in ``arithmetic``: whether a kernel
    divides or multiplies by a reciprocal is its own business.
    """
    if quantiser is None:
        return x
    size = x.value.shape[-1]
    blocks = type(x)(*(_blocks(part, quantiser.block) for part in (x.value, x.radius)))
    scale = quantiser.scale(blocks.largest(), arithmetic)
    codes = rounded(product(blocks, _reciprocal(scale, arithmetic), arithmetic), quantiser.codes)
    whole = product(codes, scale, arithmetic)
    return type(x)(*(part.flatten(-2)[..., :size] for part in (whole.value, whole.radius)))


def _blocks(values: Tensor, block: int) -> Tensor:
    padded: Tensor = F.pad(values, (0, -values.shape[-1] % block))
    return padded.view(*padded.shape[:-1], -1, block)


def _reciprocal(scale: E, arithmetic: Format) -> E:
    """1 / scale; a block of zeros has scale 0, and codes 0 whatever they are divided by.

    That of a subnormal scale overflows, which who divides by the scale does not notice.
    """
    value = scale.value.clamp(min=_TINY)
    low = (scale.value - scale.error()).clamp(min=_TINY)
    some = scale.magnitude() > 0
    radius = scale.radius / (value * (value - scale.radius).clamp(min=_TINY))
    reciprocal = type(scale)((1 / value).where(some, 0.0), radius)
    reach = (1 / low).where(some, 0.0)
    return reciprocal.in_range(reach, reach, arithmetic)


def _up_to_power_of_two(value: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(value)
    exponent = exponent - (mantissa == 0.5).int()
    return torch.where(value <= 0, 0.0, torch.ldexp(torch.ones_like(value), exponent.double()))
