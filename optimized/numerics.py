"""Leaf arithmetic of the kernels: exact casts and accurate functions on both machines.

Triton's interpreter truncates where a GPU rounds to nearest even when it narrows
to bfloat16, and mangles bfloat16 subnormals in both directions; a GPU's own
``exp`` and ``log`` lose relative accuracy with the size of their argument.  The
functions here hold the same error everywhere: a few units of 2^-24, the terms
that the rounding contracts count.

``exp`` after Cody and Waite, *Software Manual for the Elementary Functions*
(1980), chapter 6: the argument is reduced in two steps whose first product is
exact.
"""

from twinmoe.optimized.interpreter import prepare
from twinmoe.optimized.triton_runtime import INTERPRETED, tl, triton

if INTERPRETED:
    prepare()

_INTERPRETED = tl.constexpr(INTERPRETED)

_LOG2_E = tl.constexpr(1.4426950408889634)
#: ln 2 = _LN2_HIGH + _LN2_LOW; the high part has 16 bits, so n * _LN2_HIGH is exact.
_LN2_HIGH = tl.constexpr(0.693145751953125)
_LN2_LOW = tl.constexpr(1.428606820309417e-06)


@triton.jit
def to_fp32(x):
    """Widen fp32, fp16 or bf16 values to fp32, exactly."""
    if _INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:  # noqa: RET505 - the compiler needs both returns in one constexpr branch
        return x.to(tl.float32)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Narrow fp32 values to ``dtype``, once, to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        kept = tl.where(x == x, nearest, 0x7FC0)  # noqa: PLR0124 - false for NaN only
        return kept.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:  # noqa: RET505
        return x.to(dtype)


@triton.jit
def dot_operand(x):
    """Prepare an operand of ``tl.dot``: the interpreter would multiply bf16 bit patterns."""
    if _INTERPRETED:
        return to_fp32(x)
    else:  # noqa: RET505
        return x


@triton.jit
def exp_nonpositive(x):
    """exp(x) for x <= 0 or NaN, to a few units of 2^-24; 0 for -inf."""
    if _INTERPRETED:
        return tl.exp(x)  # NumPy's, accurate as it is
    else:  # noqa: RET505
        x = tl.where(x < -150.0, -150.0, x)
        n = tl.floor(x * _LOG2_E + 0.5)
        return tl.exp(x - n * _LN2_HIGH - n * _LN2_LOW) * tl.exp2(n)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) without overflow for either sign."""
    e = exp_nonpositive(-tl.abs(x))
    return tl.div_rn(tl.where(x < 0, e, 1.0), 1.0 + e)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) without overflow, relative accuracy kept as it nears 0."""
    e = exp_nonpositive(-tl.abs(x))
    # log1p(e) = 2 atanh(s); s <= 1/3, so the first omitted term is below 2^-26.
    s = tl.div_rn(e, 2.0 + e)
    q = s * s
    series = 1.0 / 13 + q * (1.0 / 15)
    series = 1.0 / 9 + q * (1.0 / 11 + q * series)
    series = 1.0 / 5 + q * (1.0 / 7 + q * series)
    series = 1.0 + q * (1.0 / 3 + q * series)
    return tl.where(x > 0, x, 0.0) + 2.0 * s * series
