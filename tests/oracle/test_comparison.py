"""One tensor against one enclosure, element by element."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twinmoe.oracle.comparison import compare
from twinmoe.oracle.envelope import Enclosure
from twinmoe.oracle.rounding import BF16, FORMATS, FP16, FP32, round_to, ulp

INF, NAN = math.inf, math.nan
STORED = {torch.bfloat16: BF16, torch.float16: FP16, torch.float32: FP32}
seeds = st.integers(0, 2**32)


def enclosure(value: list[float], radius: list[float]) -> Enclosure:
    """Return an enclosure of a few elements."""
    return Enclosure(
        torch.tensor(value, dtype=torch.float64), torch.tensor(radius, dtype=torch.float64)
    )


def intervals(shape: tuple[int, ...], exponent: int, g: torch.Generator) -> Enclosure:
    """Return intervals around values of one magnitude, a tenth of them points, some at zero."""
    value = torch.randn(shape, generator=g, dtype=torch.float64) * 2.0**exponent
    value = torch.where(torch.rand(shape, generator=g) < 0.05, 0.0, value)
    width = 2.0 ** (exponent + torch.randint(-20, 0, shape, generator=g).double())
    return Enclosure(value, torch.where(torch.rand(shape, generator=g) < 0.1, 0.0, width))


# --- inside and outside ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STORED)
@given(seed=seeds, exponent=st.integers(-20, 10))
def test_the_rounding_of_every_point_of_the_interval_is_inside(dtype, seed, exponent):
    """Both ends and points between, once rounded, are accepted, with a ratio of at most 1."""
    g = torch.Generator().manual_seed(seed)
    truth = intervals((256,), exponent, g)
    for share in (-1.0, -0.5, 0.0, 0.7, 1.0):
        seen = round_to(truth.value + share * truth.radius, STORED[dtype]).to(dtype)
        result = compare(seen, truth, STORED[dtype])
        assert not result.outside.any()
        assert (result.ratio <= 1).all()
        assert torch.equal(result.centre, round_to(truth.value, STORED[dtype]))


@pytest.mark.parametrize("dtype", STORED)
@given(seed=seeds, exponent=st.integers(-20, 10))
def test_outside_begins_at_the_next_number(dtype, seed, exponent):
    """One unit beyond either rounded end is outside, with a ratio of at least 1."""
    g = torch.Generator().manual_seed(seed)
    truth, target = intervals((256,), exponent, g), STORED[dtype]
    for direction in (-1.0, 1.0):
        end = round_to(truth.value + direction * truth.radius, target)
        seen = (end + direction * ulp(end, target)).to(dtype)
        result = compare(seen, truth, target)
        assert result.outside.all()
        assert (result.ratio >= 1).all()


@given(seed=seeds, exponent=st.integers(-20, 10))
def test_the_ratio_says_how_many_radii_the_error_needs(seed, exponent):
    """Without a rounding it is the distance over the radius, infinite where no error is allowed."""
    g = torch.Generator().manual_seed(seed)
    truth = intervals((256,), exponent, g)
    share = torch.rand(256, generator=g, dtype=torch.float64) * 3
    seen = truth.value + share * truth.radius
    result = compare(seen, truth)
    wide = truth.radius > 0
    torch.testing.assert_close(result.ratio[wide], share[wide], rtol=1e-3, atol=1e-3)
    assert (result.ratio[~wide] == 0).all()
    off = compare(truth.value + 1.0, Enclosure(truth.value, truth.radius * 0))
    assert (off.ratio == INF).all()
    assert off.outside.all()


def test_what_rounding_alone_explains_costs_nothing():
    """An element that is the rounding of the exact value has ratio 0, also beside a zero."""
    value = torch.tensor([1 + 2.0**-8, 3.0, 1e-3, 0.0], dtype=torch.float64)
    truth = Enclosure(value, torch.full((4,), 1e-12, dtype=torch.float64))
    assert (compare(value.bfloat16(), truth, BF16).ratio == 0).all()


def test_zero_in_place_of_a_small_number_needs_that_number():
    """A lost 1e-3 is a billion radii of 1e-12 away, although it is near zero."""
    result = compare(torch.zeros(1, dtype=torch.bfloat16), enclosure([1e-3], [1e-12]), BF16)
    assert result.outside.all()
    assert result.worst_ratio > 1e8


def test_the_allowed_interval_is_shown_as_stored():
    """``low`` and ``high`` are the rounded ends, ``centre`` the rounded truth."""
    result = compare(torch.tensor([1.0]).bfloat16(), enclosure([1.001], [0.01]), BF16)
    assert (result.low[0], result.centre[0], result.high[0]) == (0.9921875, 1.0, 1.0078125)


def test_an_empty_tensor_is_inside():
    """No elements, no error."""
    result = compare(torch.empty(0, 3), Enclosure.exact(torch.empty(0, 3)))
    assert (result.elements, result.worst_ratio, bool(result.outside.any())) == (0, 0.0, False)


# --- classes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [None, FP16], ids=["kept", "stored"])
@pytest.mark.parametrize(
    ("value", "radius", "seen", "accepted"),
    [
        (NAN, 0.0, NAN, True),
        (NAN, NAN, NAN, True),
        (NAN, 0.0, 1.0, False),
        (NAN, 0.0, INF, False),
        (1.0, 0.5, NAN, False),
        (1.0, 0.5, INF, False),
        (INF, 0.0, INF, True),
        (INF, NAN, INF, True),
        (INF, 0.0, -INF, False),
        (INF, 0.0, NAN, False),
        (INF, 0.0, 65504.0, False),
        (-INF, 0.0, -INF, True),
        (1.0, INF, -7.0, True),
        (1.0, INF, INF, True),
        (1.0, INF, NAN, True),
        (0.0, 0.0, -0.0, True),
    ],
)
def test_classes_come_before_arithmetic(stored, value, radius, seen, accepted):
    """NaN where the truth is NaN and nowhere else, infinities by sign, zeros of either sign."""
    result = compare(torch.tensor([seen]), enclosure([value], [radius]), stored)
    assert bool(result.outside[0]) is not accepted
    assert float(result.ratio[0]) == 0.0 if accepted else float(result.ratio[0]) > 1.0


def test_an_interval_across_overflow_accepts_both_sides():
    """65519 +- 2 rounds to the largest fp16 number or to infinity, and to nothing else."""
    truth = enclosure([65519.0] * 4, [2.0] * 4)
    seen = torch.tensor([65504.0, INF, 65472.0, -INF]).half()
    assert compare(seen, truth, FP16).outside.tolist() == [False, False, True, True]


def test_every_storage_dtype_has_a_format():
    """What a layer may store can be compared."""
    assert set(STORED) | {torch.float64} == set(FORMATS)
