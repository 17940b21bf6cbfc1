"""Exact roundings of fp64 values to the floating-point formats of MoE kernels.

``tensor.to(torch.bfloat16)`` on an fp64 tensor rounds twice, through fp32, and so
returns the wrong neighbour for values close to a midpoint: 1 + 2**-8 + 2**-40
becomes 1.0.  A judge whose every bound ends in a rounding cannot afford that.
Here each rounding is done once, by scaling the value so that one unit in the last
place becomes 1, which is exact in fp64, and rounding to an integer.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """A binary floating-point format with subnormals (IEEE 754-2019, section 3).

    ``precision`` counts significand bits with the hidden one, ``min_exponent`` is
    the exponent of the smallest normal number, ``max_value`` the largest finite one.

    As a format to *store* in: ``truncates`` casts toward zero, ``saturates`` clamps
    instead of overflowing.  As an *accumulator*: ``flushes`` results below the normal
    range to zero; ``block`` products at a time are aligned and truncated to
    ``block_unit`` before they are added, as tensor cores do (P. Blanchard, N. J. Higham,
    F. Lopez, T. Mary, S. Pranesh, SIAM J. Sci. Comput. 42, 2020); 0 means that they are not.
    Operands smaller than ``aligned_from`` are aligned as if they were that large: subnormal
    ones lose bits where products are aligned by exponents as stored.  In a matrix product,
    operands and partial sums smaller than ``drops_below`` may count as zero.
    """

    name: str
    precision: int
    min_exponent: int
    max_value: float
    truncates: bool = False
    saturates: bool = False
    flushes: bool = False
    block: int = 0
    block_unit: float = 0.0
    aligned_from: float = 0.0
    drops_below: float = 0.0

    @property
    def unit(self) -> float:
        """Unit roundoff: the largest relative error of one rounding to nearest."""
        return 2.0**-self.precision

    @property
    def smallest_normal(self) -> float:
        """Results below it may be flushed to zero by hardware that flushes."""
        return 2.0**self.min_exponent

    @property
    def underflow(self) -> float:
        """The largest absolute error of one operation whose result is below the normal range."""
        unit_there = 2.0 ** (self.min_exponent - self.precision)
        return self.smallest_normal if self.flushes else unit_there


def _format(name: str, dtype: torch.dtype, precision: int, min_exponent: int) -> Format:
    return Format(name, precision, min_exponent, torch.finfo(dtype).max)


FP64 = _format("fp64", torch.float64, 53, -1022)
FP32 = _format("fp32", torch.float32, 24, -126)
FP16 = _format("fp16", torch.float16, 11, -14)
BF16 = _format("bf16", torch.bfloat16, 8, -126)
#: The fp32 accumulator of a tensor core on 16-bit operands, 16 products a block.
TENSOR_CORE = replace(FP32, name="tensor core", block=16, block_unit=2.0**-23)
#: The fp32 accumulator that fp16 operands meet on a Hopper GPU: exact sums of subnormal ones
#: were measured to be off by up to 2**-16 of the result (docs/h200.md).
HOPPER_FP16 = replace(FP32, name="fp32, fp16 exponents as stored", aligned_from=2.0**-14)
#: The fp32 accumulator of the dot products that CPUs make of bf16 operands: subnormal ones, and
#: subnormal sums, are zeros to VDPBF16PS and TDPBF16PS, whatever the control register says
#: (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2).
CPU_BF16 = replace(FP32, name="fp32, bf16 subnormals as zeros", drops_below=2.0**-126)
#: 8-bit formats of the Open Compute Project (OCP 8-bit Floating Point Specification, 2023),
#: saturating, as quantisers use them.
E4M3 = Format("e4m3", 4, -6, 448.0, saturates=True)
E5M2 = Format("e5m2", 3, -14, 57344.0, saturates=True)

FORMATS: dict[torch.dtype, Format] = {
    torch.float64: FP64,
    torch.float32: FP32,
    torch.float16: FP16,
    torch.bfloat16: BF16,
}


def power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent in fp64 for integer exponents in [-1022, 1023], exactly; below, 2**-1022.

    Built from bits: ``exp2`` promises no exact result and ``ldexp`` computes its
    scale in fp32, which overflows at 2**128.
    """
    return ((exponent.to(torch.int64).clamp(min=-1022) + 1023) << 52).view(torch.float64)


def ulp(value: Tensor, target: Format) -> Tensor:
    """Spacing of ``target`` at ``value``; at subnormals and zero, the smallest subnormal.

    ``value`` is fp64 of any shape; the result has its shape.
    """
    _, exponent = torch.frexp(value)
    # frexp gives zero the exponent 0, as if it were a half
    leading_bit = torch.where(value == 0, target.min_exponent, exponent - 1)
    leading_bit = leading_bit.clamp(min=target.min_exponent)
    return power_of_two(leading_bit - (target.precision - 1))


def round_to(value: Tensor, target: Format) -> Tensor:
    """Round fp64 ``value`` once to ``target``, to nearest with ties to even; still fp64.

    Beyond the largest finite number by half a unit or more gives infinity, as
    IEEE 754 says; NaN and infinity pass through.  A format that truncates or saturates
    does so, and then never overflows.
    """
    if target is FP64:
        return value
    if target.saturates:
        value = value.clamp(-target.max_value, target.max_value)
    unit = ulp(value, target)
    if target.truncates:
        kept = (torch.trunc(value / unit) * unit).clamp(-target.max_value, target.max_value)
        return torch.where(value.isfinite(), kept, value)
    rounded = torch.round(value / unit) * unit
    overflow = rounded.abs() > target.max_value
    rounded = torch.where(
        overflow, torch.copysign(torch.full_like(value, torch.inf), value), rounded
    )
    return torch.where(value.isfinite(), rounded, value)


def midpoint_toward(seen: Tensor, value: Tensor, target: Format) -> Tensor:
    """The rounding boundary between ``seen``, a number of ``target``, and its neighbour.

    The neighbour is the next number of ``target`` in the direction of ``value``; what
    lies between ``seen`` and the boundary rounds to ``seen``.  For an infinity it is the
    point beyond which finite values overflow.
    """
    largest = torch.full_like(seen, target.max_value)
    finite = torch.where(seen.isinf(), torch.copysign(largest, seen), seen)
    inward = (value - seen) * seen < 0
    # just below a power of two the spacing is half of that above it
    spacing = ulp(torch.where(inward, finite * (1 - 2.0**-40), finite), target)
    boundary = finite + torch.sign(value - seen) * spacing / 2
    overflow = finite + torch.copysign(ulp(largest, target) / 2, seen)
    return torch.where(seen.isinf(), overflow, boundary)


def lowest_bit(value: Tensor) -> Tensor:
    """Exponent of the lowest set bit of each fp64 element; a large number for zeros.

    Every element is an integer multiple of 2**lowest_bit.  Sums of such multiples
    stay exact while they fit the significand, which is how the envelope knows that
    small-integer inputs admit no rounding at all.
    """
    mantissa, exponent = torch.frexp(value)
    integer = (mantissa * 2.0**53).to(torch.int64).abs()
    _, trailing = torch.frexp((integer & -integer).to(torch.float64))
    bit = exponent.to(torch.int64) - 53 + trailing.to(torch.int64) - 1
    return torch.where(value == 0, torch.full_like(bit, 4096), bit)
