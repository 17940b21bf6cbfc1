"""Enclosures hold what rounding, products and sums of their points may return, and little more."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.oracle.arithmetic import (
    RANDOM,
    assert_holds,
    fp32_sums,
    generator,
    interval,
    points_of,
)
from twinmoe.oracle.envelope import Enclosure, product, rounded, total
from twinmoe.oracle.rounding import BF16, FP16, FP32, FP64, Format, round_to

seeds = st.integers(0, 2**32)


# --- rounded ---------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [BF16, FP16, FP32], ids=lambda f: f.name)
@given(seed=seeds, exponent=st.integers(-30, 17))
def test_rounding_holds_the_rounding_of_every_point_and_is_tight(target, seed, exponent):
    """Every rounded point is inside, and the farther rounded end lies on the boundary."""
    g = generator(seed)
    x = interval((64,), 2.0**exponent, g)
    result = rounded(x, target)
    assert torch.equal(result.value, round_to(x.value, target))
    reach = torch.zeros_like(x.value)
    for point in points_of(x, g):
        stored = round_to(point, target)
        finite = result.radius.isfinite()
        assert_holds(result[finite], stored[finite])
        reach = torch.maximum(reach, (stored - result.value).abs().nan_to_num(0.0, torch.inf))
    assert torch.equal(reach, result.radius)


def test_rounding_removes_errors_that_no_rounding_boundary_separates():
    """Two results 2^-20 apart round to one number, unless a midpoint lies between them."""
    value = torch.tensor([1.0, 1 + 2.0**-8 + 2.0**-30], dtype=torch.float64)
    result = rounded(Enclosure(value, torch.full((2,), 2.0**-20, dtype=torch.float64)), BF16)
    assert result.radius.tolist() == [0.0, 2.0**-7]


def test_rounding_to_nothing_changes_nothing():
    """None stands for a value that stays in the accumulator."""
    x = Enclosure(torch.tensor([0.1]).double(), torch.tensor([0.2]).double())
    assert rounded(x, None) is x


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rounding_an_interval_across_overflow_reaches_infinity(sign):
    """65519 fits fp16 and 65521 does not: around an interval with both nothing is known."""
    value = torch.tensor([65519.0, 65521.0, 70000.0], dtype=torch.float64) * sign
    result = rounded(Enclosure(value, torch.full((3,), 2.0, dtype=torch.float64)), FP16)
    assert result.radius.tolist() == [torch.inf, torch.inf, 0.0]
    assert result.value.tolist() == [0.0, 0.0, torch.inf * sign]


# --- product and total -----------------------------------------------------------------------


@given(seed=seeds, scale=st.sampled_from([0, -10, -60, -74, 60]))
@example(seed=0, scale=-74)
def test_a_product_holds_fp32_products_of_all_points(seed, scale):
    """One rounded multiplication of any two points, results below the normal range included."""
    g = generator(seed)
    points = torch.randn(2, 4, 64, generator=g) * 2.0**scale
    low, high = points.double().amin(dim=1), points.double().amax(dim=1)
    a, b = (
        Enclosure((lo + hi) / 2, (hi - lo) / 2 * (1 + 2.0**-50))
        for lo, hi in zip(low, high, strict=True)
    )
    enclosure = product(a, b, FP32)
    for left in points[0]:
        for right in points[1]:
            assert_holds(enclosure, left * right)


@given(seed=seeds, factor=st.sampled_from([0.0, 1.0]))
def test_a_product_with_one_or_zero_adds_no_error(seed, factor):
    """Multiplication by an exact 1 or 0 does not round: the radius is only scaled."""
    x = interval((16,), 1.0, generator(seed))
    one = Enclosure.exact(torch.tensor(factor))
    for result in (product(x, one, FP32), product(one, x, FP32)):
        assert torch.equal(result.value, x.value * factor)
        assert torch.equal(result.radius, x.radius * factor)


@pytest.mark.parametrize("accumulator", [FP32, BF16], ids=lambda f: f.name)
@given(seed=seeds, count=st.sampled_from([1, 2, 3, 6, 8]), kind=st.sampled_from(sorted(RANDOM)))
def test_a_total_holds_every_order_of_all_points(accumulator, seed, count, kind):
    """Terms inside their intervals, added in any order in the accumulator's format."""
    g = generator(seed)
    dtype = torch.float32 if accumulator is FP32 else torch.bfloat16
    points = RANDOM[kind]((3, 32, count), g).to(dtype)
    low, high = points.double().amin(dim=0), points.double().amax(dim=0)
    enclosure = total(
        Enclosure((low + high) / 2, (high - low) / 2 * (1 + 2.0**-50)), 1, accumulator
    )
    for point in points:
        for actual in fp32_sums(point[:, None], g):
            assert_holds(enclosure, actual[:, 0])


@pytest.mark.parametrize("accumulator", [FP32, BF16, FP64], ids=lambda f: f.name)
def test_adding_exact_zeros_costs_nothing(accumulator: Format):
    """A single nonzero term among zeros is its own sum; all zeros are zero."""
    value = torch.tensor([[0.0, 0.1, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    result = total(Enclosure.exact(value), 1, accumulator)
    assert result.value.tolist() == [0.1, 0.0]
    assert result.radius.tolist() == [0.0, 0.0]
