"""Enclosures of block-scaled quantisation: value -> code x scale, dequantised.

A block of values shares one scale, amax / largest code.  The quantised tensor is what the
next GEMM multiplies, so its enclosure is that of the dequantised product.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from twinmoe.oracle.envelope import E
from twinmoe.oracle.rounding import Format, round_to


@dataclass(frozen=True)
class Quantiser:
    """Blocks of ``block`` consecutive values, codes in ``codes``, scales in ``scales``.

    ``power_of_two`` scales are rounded up to a power of two (OCP Microscaling's E8M0).
    A block of zeros has scale 1.
    """

    block: int
    codes: Format
    scales: Format
    power_of_two: bool = False

    def scale(self, amax: Tensor) -> Tensor:
        """The scale for a block whose largest magnitude is ``amax``."""
        scale = round_to(amax / self.codes.max_value, self.scales)
        if self.power_of_two:
            mantissa, exponent = torch.frexp(scale)
            exponent = exponent - (mantissa == 0.5).int()
            scale = torch.ldexp(torch.ones_like(scale), exponent.double())
        return torch.where(amax == 0, 1.0, scale)


def quantised(x: E, quantiser: Quantiser | None) -> E:
    """Enclose the dequantised tensor; x is [..., n], the last block may be short.

    The scale lies between those of amax(|x| - e) and amax(|x| + e); the code between the
    least and the greatest of the four corners; the product between their products.  Where the
    block's values are certain, so is the result, and the radius is 0.
    """
    if quantiser is None:
        return x
    size = x.value.shape[-1]
    padding = -size % quantiser.block
    value, radius = (
        torch.nn.functional.pad(t, (0, padding)).unflatten(-1, (-1, quantiser.block))
        for t in (x.value, x.radius)
    )
    lowest = (value.abs() - radius).clamp(min=0).amax(dim=-1, keepdim=True)
    highest = (value.abs() + radius).amax(dim=-1, keepdim=True)
    scales = [quantiser.scale(bound) for bound in (lowest, highest)]
    codes = torch.stack(
        [
            round_to(end / scale, quantiser.codes)
            for end in (value - radius, value + radius)
            for scale in scales
        ]
    )
    # a code that one scale gives may meet the other: codes and scales vary on their own
    extremes = (codes.amin(dim=0), codes.amax(dim=0))
    corners = torch.stack([code * scale for code in extremes for scale in scales])
    scale = quantiser.scale(value.abs().amax(dim=-1, keepdim=True))
    centre = round_to(value / scale, quantiser.codes) * scale
    reach = torch.maximum(corners.amax(dim=0) - centre, centre - corners.amin(dim=0))
    centre, reach = (t.flatten(-2)[..., :size] for t in (centre, reach))
    return type(x)(centre, reach)
