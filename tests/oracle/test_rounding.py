"""Exact roundings: against PyTorch where it rounds once, against rationals everywhere."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from twinmoe.oracle.rounding import (
    BF16,
    E4M3,
    E5M2,
    FORMATS,
    FP16,
    FP32,
    FP64,
    Format,
    lowest_bit,
    midpoint_toward,
    power_of_two,
    round_to,
    ulp,
)

SIXTEEN_BITS = {torch.bfloat16: BF16, torch.float16: FP16}
NARROW = [BF16, FP16, FP32]
seeds = st.integers(0, 2**32)


def generator(seed: int) -> torch.Generator:
    """Return a generator of its own for each seed."""
    return torch.Generator().manual_seed(seed)


def every_value(dtype: torch.dtype) -> Tensor:
    """Return all 65536 values of a 16-bit dtype, in the order of their bit patterns."""
    return torch.arange(2**16).to(torch.int32).to(torch.int16).view(dtype)


def any_bits(count: int, seed: int) -> Tensor:
    """Return fp64 values of uniform bit patterns, in and far beyond the range of fp32."""
    bits = torch.randint(-(2**62), 2**62, (count,), generator=generator(seed)) * 2 + 1
    return bits.view(torch.float64)


def near_boundaries(target: Format, count: int, seed: int) -> Tensor:
    """Return fp64 values at, or a hair beside, the numbers and midpoints of ``target``.

    Subnormals and values around the overflow threshold are drawn as often as others.
    """
    g = generator(seed)
    digits = target.precision
    span = torch.tensor([-digits - 2, 3, 260, 2])
    first = torch.tensor([target.min_exponent, -1, target.min_exponent, -target.min_exponent])
    kind = torch.randint(4, (count,), generator=g)
    exponent = first[kind] + (
        torch.rand(count, generator=g) * span[kind].abs()
    ).long() * torch.sign(span[kind])
    grid = torch.randint(2 ** (digits - 1), 2**digits, (count,), generator=g).double()
    half = torch.randint(2, (count,), generator=g).double() / 2
    hair = torch.tensor([0.0, 2.0**-20, -(2.0**-20), 2.0**-27, -(2.0**-27)])
    offset = hair[torch.randint(5, (count,), generator=g)].double()
    sign = torch.randint(2, (count,), generator=g) * 2 - 1
    return sign * (grid + half + offset) * power_of_two(exponent - digits + 1)


def nearest_even(value: float, target: Format) -> float:
    """Round in exact rational arithmetic; Python rounds a Fraction's ties to even."""
    exact = Fraction(value)
    largest = Fraction(target.max_value)
    leading_bit = max(math.frexp(value)[1] - 1, target.min_exponent)
    spacing = Fraction(2) ** (leading_bit - target.precision + 1)
    rounded = round(exact / spacing) * spacing
    if abs(rounded) > largest:
        return float("inf") if rounded > 0 else float("-inf")
    return float(rounded)


def identical(one: Tensor, other: Tensor) -> bool:
    """Equal values and signs of zero, all NaN alike."""
    same = (one == other) & (one.signbit() == other.signbit())
    return bool((same | (one.isnan() & other.isnan())).all())


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@given(seed=seeds)
def test_from_fp32_it_is_torchs_single_rounding(dtype, seed):
    """Any fp32 value: what PyTorch narrows in one step comes out the same, bit for bit."""
    bits = torch.randint(-(2**31), 2**31, (8192,), generator=generator(seed)).to(torch.int32)
    x = torch.cat([bits.view(torch.float32), every_value(dtype)[::16].float()])
    assert identical(round_to(x.double(), FORMATS[dtype]), x.to(dtype).double())


@given(seed=seeds)
def test_from_fp64_to_fp32_it_is_torchs_single_rounding(seed):
    """Any fp64 value: subnormal results, overflow and underflow included."""
    x = torch.cat([any_bits(4096, seed), near_boundaries(FP32, 4096, seed)])
    assert identical(round_to(x, FP32), x.float().double())


@pytest.mark.parametrize("target", [*NARROW, FP64, E4M3, E5M2], ids=lambda f: f.name)
def test_representable_values_stay(target):
    """A number of the format is its own rounding, signs of zero, infinities and NaN too."""
    dtype = {BF16: torch.bfloat16, FP16: torch.float16}.get(target, torch.bfloat16)
    x = every_value(dtype).double()
    if target in (E4M3, E5M2):
        codes = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}[target]
        x = torch.arange(256).to(torch.uint8).view(codes).double()
        x = x[~x.isinf()]
    assert identical(round_to(x, target), x)


@pytest.mark.parametrize("target", [*NARROW, E4M3, E5M2], ids=lambda f: f.name)
@given(seed=seeds)
def test_it_is_round_to_nearest_even_in_exact_arithmetic(target, seed):
    """Rationals decide at midpoints, a 2^-27th beside them, at subnormals and at overflow."""
    x = torch.cat([near_boundaries(target, 48, seed), any_bits(16, seed)])
    x = x[x.isfinite()]
    if target.saturates:
        x = x.clamp(-target.max_value, target.max_value)
    expected = torch.tensor([nearest_even(v, target) for v in x.tolist()], dtype=torch.float64)
    assert torch.equal(round_to(x, target), expected)


@pytest.mark.parametrize("target", [BF16, FP16], ids=lambda f: f.name)
def test_it_does_not_round_twice(target):
    """A value just above a midpoint goes up, although its fp32 rounding is the midpoint."""
    above = 1 + target.unit + 2.0**-40
    x = torch.tensor([above, -above, 1 + target.unit, 1 + 3 * target.unit], dtype=torch.float64)
    up = 1 + 2 * target.unit
    assert round_to(x, target).tolist() == [up, -up, 1.0, 1 + 4 * target.unit]


@pytest.mark.parametrize("target", NARROW, ids=lambda f: f.name)
def test_overflow_begins_half_a_unit_above_the_largest_number(target):
    """Below the threshold the largest number, from the threshold on infinity, by sign."""
    largest = torch.tensor(target.max_value, dtype=torch.float64)
    threshold = largest + ulp(largest, target) / 2
    below = torch.nextafter(threshold, largest)
    x = torch.stack([below, threshold, -below, -threshold])
    assert round_to(x, target).tolist() == [
        target.max_value,
        torch.inf,
        -target.max_value,
        -torch.inf,
    ]


@pytest.mark.parametrize("target", [E4M3, E5M2], ids=lambda f: f.name)
def test_a_saturating_format_never_overflows(target):
    """Everything beyond the largest number, infinity included, becomes it; NaN stays."""
    x = torch.tensor([1e9, -1e9, torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
    rounded = round_to(x, target)
    assert rounded[:4].tolist() == [target.max_value, -target.max_value] * 2
    assert rounded[4].isnan()


@given(seed=seeds)
def test_truncation_goes_to_the_neighbour_toward_zero(seed):
    """The truncated value is a number of the format, less than a unit below, never above."""
    truncating = Format("bf16 toward zero", 8, -126, BF16.max_value, truncates=True)
    x = torch.cat([near_boundaries(BF16, 512, seed), any_bits(512, seed)])
    x = x[x.isfinite()]
    kept = round_to(x, truncating)
    assert torch.equal(round_to(kept, BF16), kept)
    assert (kept.abs() <= x.abs()).all()
    close = x.abs() <= BF16.max_value
    assert ((x - kept).abs() < ulp(kept, BF16))[close].all()
    assert (kept.abs() == BF16.max_value)[~close].all()


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_the_unit_in_the_last_place_is_the_gap_to_the_next_number(dtype):
    """For every finite value of a 16-bit format, zero and subnormals included."""
    x = every_value(dtype)[: 2**15]
    x = x[x.isfinite()].double()
    gap = torch.diff(x)
    assert torch.equal(ulp(x[:-1], FORMATS[dtype]), gap)
    assert torch.equal(ulp(-x[:-1], FORMATS[dtype]), gap)
    assert ulp(x[-1], FORMATS[dtype]) == gap[-1]


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("toward", [-torch.inf, 0.0, torch.inf])
def test_the_midpoint_bounds_what_rounds_to_a_number(dtype, toward):
    """The fp64 value just inside the boundary rounds to the number, the one outside does not.

    Shown for every value of a 16-bit format but NaN, infinities included.
    """
    target = FORMATS[dtype]
    seen = every_value(dtype).double()
    seen = seen[~seen.isnan() & (seen != toward)]
    boundary = midpoint_toward(seen, torch.full_like(seen, toward), target)
    inside = torch.nextafter(boundary, seen)
    outside = torch.nextafter(boundary, torch.full_like(seen, toward))
    assert torch.equal(round_to(inside, target), seen)
    assert (round_to(outside, target) != seen).all()


@example(value=2.0**-1074)
@example(value=-3.0)
@given(value=st.floats(allow_nan=False, allow_infinity=False).filter(bool))
def test_the_lowest_bit_is_exact(value):
    """The value is an odd multiple of two to its lowest bit."""
    bit = int(lowest_bit(torch.tensor([value], dtype=torch.float64)))
    multiple = Fraction(value) / Fraction(2) ** bit
    assert multiple.denominator == 1
    assert multiple.numerator % 2 == 1


def test_zero_has_no_lowest_bit():
    """Zeros never limit the common grid of a sum: their bit is above every number's."""
    bits = lowest_bit(torch.tensor([0.0, -0.0, 1.0], dtype=torch.float64)).tolist()
    assert bits[0] == bits[1] > 1024
    assert bits[2] == 0


def test_powers_of_two_are_exact_over_the_normal_range():
    """Each exponent of a normal fp64 number gives exactly its power."""
    exponents = torch.arange(-1022, 1024)
    assert power_of_two(exponents).tolist() == [2.0 ** int(e) for e in exponents]
