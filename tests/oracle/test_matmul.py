"""Enclosures of matrix products hold every order of summation, and invent no exactness.

Legend: T rows, M columns, N terms of a sum.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracle.arithmetic import (
    ADVERSARIAL,
    RANDOM,
    assert_holds,
    fp32_matmuls,
    generator,
    interval,
    points_of,
    stored,
)
from twinmoe.oracle.envelope import Enclosure, Grade, matmul
from twinmoe.oracle.rounding import CPU_BF16, FP32, FP64, HOPPER_FP16

T, M = 4, 5
seeds = st.integers(0, 2**32)
terms = st.sampled_from((1, 2, 3, 7, 16, 33, 64))
dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


@pytest.mark.parametrize("kind", [*RANDOM, *ADVERSARIAL])
@given(seed=seeds, count=terms, dtype=dtypes)
def test_hard_holds_every_order_of_any_data(kind, seed, count, dtype):
    """HARD is a proof: no order of fp32 additions leaves it, whatever the numbers."""
    g = generator(seed)
    draw = (RANDOM | ADVERSARIAL)[kind]
    x_TN, w_MN = (stored(draw((size, count), g), dtype) for size in (T, M))
    enclosure = matmul(Enclosure.exact(x_TN), w_MN.double(), FP32, Grade.HARD)
    for actual in fp32_matmuls(x_TN, w_MN, g):
        assert_holds(enclosure, actual)


@pytest.mark.parametrize("grade", [Grade.SHARP, Grade.MED], ids=lambda g: g.name)
@pytest.mark.parametrize("kind", RANDOM)
@given(seed=seeds, count=terms, dtype=dtypes)
def test_the_probable_grades_hold_every_order_of_random_data(kind, grade, seed, count, dtype):
    """SHARP and MED hold random data in every order, adversarially sorted ones included."""
    g = generator(seed)
    x_TN, w_MN = (stored(RANDOM[kind]((size, count), g), dtype) for size in (T, M))
    enclosure = matmul(Enclosure.exact(x_TN), w_MN.double(), FP32, grade)
    for actual in fp32_matmuls(x_TN, w_MN, g):
        assert_holds(enclosure, actual)


@given(seed=seeds, count=terms, kind=st.sampled_from(sorted(RANDOM | ADVERSARIAL)))
def test_each_grade_is_at_least_as_wide_as_the_sharper_one(seed, count, kind):
    """SHARP lies within MED and MED within HARD, so that a finding's grade means something."""
    g = generator(seed)
    x_TN, w_MN = ((RANDOM | ADVERSARIAL)[kind]((size, count), g).double() for size in (T, M))
    sharp, med, hard = (
        matmul(Enclosure.exact(x_TN), w_MN, FP32, grade).radius
        for grade in (Grade.SHARP, Grade.MED, Grade.HARD)
    )
    assert (sharp <= hard).all()
    assert (med <= hard).all()


@given(seed=seeds, count=terms, grade=st.sampled_from(Grade))
def test_a_matmul_holds_every_point_of_its_inputs(seed, count, grade):
    """Input radii propagate: products of points inside the intervals stay inside."""
    g = generator(seed)
    x_TN = interval((T, count), 1.0, g)
    w_MN = torch.randn(M, count, generator=g, dtype=torch.float64)
    enclosure = matmul(x_TN, w_MN, FP32, grade)
    for point in points_of(x_TN, g):
        assert_holds(enclosure, point @ w_MN.T)


@given(seed=seeds, count=terms)
def test_hard_holds_fp32_orders_of_uncertain_inputs(seed, count):
    """fp32 sums of fp32 points inside the intervals stay inside, both errors at once."""
    g = generator(seed)
    points = torch.randn(3, T, count, generator=g)
    low, high = points.double().amin(dim=0), points.double().amax(dim=0)
    x_TN = Enclosure((low + high) / 2, (high - low) / 2 * (1 + 2.0**-50))
    w_MN = torch.randn(M, count, generator=g)
    enclosure = matmul(x_TN, w_MN.double(), FP32, Grade.HARD)
    for point in points:
        for actual in fp32_matmuls(point, w_MN, g):
            assert_holds(enclosure, actual)


@given(seed=seeds, count=terms, grade=st.sampled_from(Grade), grid=st.integers(-40, 40))
def test_sums_of_small_integers_are_exact(seed, count, grade, grid):
    """Products on one grid that cannot fill 24 bits get no radius, in every grade."""
    g = generator(seed)
    x_TN = torch.randint(-8, 9, (T, count), generator=g).float() * 2.0**grid
    w_MN = torch.randint(-8, 9, (M, count), generator=g).float()
    enclosure = matmul(Enclosure.exact(x_TN), w_MN.double(), FP32, grade)
    assert (enclosure.radius == 0).all()
    for actual in fp32_matmuls(x_TN, w_MN, g):
        assert torch.equal(actual.double(), enclosure.value)


@given(seed=seeds, count=terms, kind=st.sampled_from(["near 2^24", "tiny", "bits"]))
def test_what_is_called_exact_is_exact_in_every_order(seed, count, kind):
    """Around 2^24 terms, and where products underflow, a radius of 0 is never wrong."""
    g = generator(seed)
    if kind == "bits":
        width = int(torch.randint(1, 15, (), generator=g))
        shift = int(torch.randint(-75, 10, (), generator=g))
        x_TN, w_MN = (
            torch.randint(-(2**width), 2**width + 1, (size, count), generator=g) * 2.0**shift
            for size in (T, M)
        )
    else:
        x_TN, w_MN = ADVERSARIAL[kind]((T, count), g), torch.ones(M, count)
    enclosure = matmul(Enclosure.exact(x_TN), w_MN.double(), FP32, Grade.HARD)
    exact = enclosure.radius == 0
    for actual in fp32_matmuls(x_TN.float(), w_MN.float(), g):
        assert torch.equal(actual.double()[exact], enclosure.value[exact])


@pytest.mark.parametrize(
    ("values", "accumulator", "exact"),
    [
        ([2.0**24 - 2, 1.0], FP32, True),
        ([2.0**24 - 2, -1.0], FP32, True),
        ([2.0**24, 1.0], FP32, False),
        ([2.0**24, 1.0, 1.0], FP32, False),
        ([2.0**24 - 1, 1.0, 1.0], FP32, False),
        ([2.0**53, 1.0], FP64, False),
        ([2.0**53, 1.0, 1.0], FP64, False),
    ],
)
def test_exactness_ends_where_the_significand_is_full(values, accumulator, exact):
    """At 2^24 in fp32 and 2^53 in fp64: one more unit in any partial sum and it may round."""
    x_1N = torch.tensor([values], dtype=torch.float64)
    radius = matmul(Enclosure.exact(x_1N), torch.ones_like(x_1N), accumulator, Grade.HARD).radius
    assert bool(radius == 0) is exact


def test_a_product_below_the_format_is_not_exact():
    """2^-100 times 2^-100 is 0 in fp32, not 2^-200: the interval has to reach it."""
    x_11 = torch.tensor([[2.0**-100]], dtype=torch.float64)
    assert_holds(matmul(Enclosure.exact(x_11), x_11, FP32, Grade.HARD), torch.zeros(1, 1))


def test_an_accumulator_that_may_overflow_promises_nothing():
    """Partial sums beyond the largest fp32 number may be infinite or NaN in some order."""
    x_1N = torch.tensor([[2.0**100, -(2.0**100)]], dtype=torch.float64)
    w_MN = torch.full((1, 2), 2.0**100, dtype=torch.float64)
    assert matmul(Enclosure.exact(x_1N), w_MN, FP32, Grade.HARD).radius.isinf().all()


@pytest.mark.parametrize("grade", Grade, ids=lambda g: g.name)
def test_nan_reaches_only_the_sums_that_contain_it(grade):
    """A NaN row is NaN, every other row keeps a finite value and radius."""
    x_TN = torch.ones(2, 3, dtype=torch.float64)
    x_TN[0, 1] = torch.nan
    enclosure = matmul(Enclosure.exact(x_TN), torch.full((4, 3), 0.1).double(), FP32, grade)
    assert enclosure.value[0].isnan().all()
    assert enclosure.value[1].isfinite().all()
    assert enclosure.radius[1].isfinite().all()


@pytest.mark.parametrize("rows", [0, 3])
def test_a_matmul_of_no_rows_has_no_rows(rows):
    """An empty batch goes through like any other."""
    enclosure = matmul(Enclosure.exact(torch.ones(rows, 2)), torch.ones(4, 2).double(), FP32, 0)
    assert enclosure.value.shape == enclosure.radius.shape == (rows, 4)


def test_subnormal_operands_may_lose_bits_where_exponents_are_read_as_stored() -> None:
    """Exact sums get a radius where an operand is below fp16's normal range, and only there."""
    weight = torch.tensor([[1.0, 2.0**-10]])
    normal = Enclosure.exact(torch.tensor([[2.0**-14, 1.0]]))
    subnormal = Enclosure.exact(torch.tensor([[2.0**-20, 1.0]]))
    for x in (normal, subnormal):
        assert matmul(x, weight, FP32, Grade.SHARP).radius == 0
    assert matmul(normal, weight, HOPPER_FP16, Grade.SHARP).radius == 0
    radius = matmul(subnormal, weight, HOPPER_FP16, Grade.SHARP).radius
    assert radius == 2.0**-24 * (2.0**-14 - 2.0**-20)
    zeros = Enclosure.exact(torch.zeros(1, 2))
    assert matmul(zeros, weight, HOPPER_FP16, Grade.SHARP).radius == 0


@pytest.mark.parametrize("scale", [2.0**20, 1.0])
@pytest.mark.parametrize(("x", "weight"), [(2.0**-130, 1.0), (1.0, 2.0**-130)])
def test_subnormal_operands_may_count_as_zeros(x: float, weight: float, scale: float) -> None:
    """Where dot products drop them, the enclosure reaches to zero, however large the product is."""
    x, weight = (value if value < 1 else value * scale for value in (x, weight))
    factors = Enclosure.exact(torch.tensor([[x, 0.0]])), torch.tensor([[weight, 1.0]])
    assert matmul(*factors, FP32, Grade.SHARP).radius < x * weight
    assert matmul(*factors, CPU_BF16, Grade.SHARP).radius >= x * weight


def test_subnormal_sums_may_count_as_zeros() -> None:
    """Also those of normal operands; what is normal all the way stays exact."""
    for exponent, exact in ((-66, False), (-62, True)):
        x, weight = torch.tensor([[2.0**-64]]), torch.tensor([[2.0**exponent]])
        radius = matmul(Enclosure.exact(x), weight, CPU_BF16, Grade.SHARP).radius
        assert radius == 0 if exact else radius >= 2.0 ** (exponent - 64)
    zeros = Enclosure.exact(torch.zeros(1, 1))
    assert matmul(zeros, torch.ones(1, 1), CPU_BF16, Grade.SHARP).radius == 0


def test_what_only_may_be_subnormal_loses_no_more_than_that() -> None:
    """An operand known to be near zero, as behind a ReLU, is not given away whole."""
    near_zero = Enclosure(torch.zeros(2, 8).double(), torch.full((2, 8), 1e-3).double())
    weight = torch.ones(3, 8).double()
    usual = matmul(near_zero, weight, FP32, Grade.SHARP).radius
    assert (matmul(near_zero, weight, CPU_BF16, Grade.SHARP).radius <= 1.001 * usual).all()


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_bf16_dot_products_of_this_cpu_stay_inside(rows: int) -> None:
    """Subnormal operands and products through torch's own GEMM, whatever it makes of them."""
    generator = torch.Generator().manual_seed(rows)
    size = torch.randint(-70, -54, (rows, 32), generator=generator)
    x = torch.ldexp(torch.randn(rows, 32, generator=generator), size).to(torch.bfloat16)
    x[:, ::3] *= 2.0**-66
    weight = torch.ldexp(torch.randn(16, 32, generator=generator), size[:1] + 8).to(torch.bfloat16)
    weight[:, ::5] *= 2.0**70
    enclosure = matmul(Enclosure.exact(x), weight.double(), CPU_BF16, Grade.HARD)
    rounding = 2.0**-8 * enclosure.value.abs() + 2.0**-133
    seen = (x @ weight.T).double()
    assert ((seen - enclosure.value).abs() <= enclosure.radius * 1.01 + rounding).all()
