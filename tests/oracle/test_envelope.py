"""Enclosures hold what correct arithmetic may return, in any order, and no exactness is invented.

Legend: T rows, M columns, N terms of a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from twinmoe.oracle.envelope import Enclosure, Grade, matmul, product, rounded, total
from twinmoe.oracle.rounding import BF16, FP16, FP32, FP64, Format, round_to

T, M = 4, 5
TERMS = (1, 2, 3, 7, 16, 33, 64)
seeds = st.integers(0, 2**32)
terms = st.sampled_from(TERMS)
dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])

Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]


def _normal(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g)


def _positive(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g).abs()


def _outlier(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=g)
    values[..., 0] *= 30
    return values


def _heavy(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g) * 2.0 ** torch.randint(-12, 13, shape, generator=g)


def _cancelling(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=g) * 2.0 ** torch.randint(-6, 7, shape, generator=g)
    half = shape[-1] // 2
    values[..., half : 2 * half] = -values[..., :half]
    return values.sort(dim=-1).values


def _stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return fp32 values that ``dtype`` can hold, none of them infinite."""
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype).float()


def _near_2_24(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    large = torch.randint(2**22, 2**24 + 3, shape, generator=g)
    small = torch.randint(-3, 4, shape, generator=g)
    sign = torch.randint(2, shape, generator=g) * 2 - 1
    return (torch.where(torch.rand(shape, generator=g) < 0.2, large * sign, small)).float()


def _tiny(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g) * 2.0 ** torch.randint(-80, -60, shape, generator=g)


RANDOM: dict[str, Draw] = {
    "normal": _normal,
    "positive": _positive,
    "outlier": _outlier,
    "heavy": _heavy,
}
ADVERSARIAL: dict[str, Draw] = {
    "cancelling": _cancelling,
    "near 2^24": _near_2_24,
    "tiny": _tiny,
}


def generator(seed: int) -> torch.Generator:
    """Return a generator of its own for each seed."""
    return torch.Generator().manual_seed(seed)


def fp32_sums(terms_TMN: Tensor, g: torch.Generator) -> Iterator[Tensor]:
    """Sum fp32 terms over the last dimension in many orders, each addition rounded to fp32."""
    count = terms_TMN.shape[-1]
    yield _one_by_one(terms_TMN)
    yield _one_by_one(terms_TMN.flip(-1))
    yield _pairwise(terms_TMN)
    for _ in range(3):
        yield _one_by_one(terms_TMN[..., torch.randperm(count, generator=g)])
    yield _pairwise(terms_TMN[..., torch.randperm(count, generator=g)])
    yield _one_by_one(terms_TMN.sort(dim=-1).values)
    split = int(torch.randint(1, count + 1, (), generator=g))
    chunks = [_one_by_one(chunk) for chunk in terms_TMN.split(split, dim=-1)]
    yield _one_by_one(torch.stack(chunks, dim=-1))


def _one_by_one(terms_TMN: Tensor) -> Tensor:
    result = terms_TMN[..., 0]
    for n in range(1, terms_TMN.shape[-1]):
        result = result + terms_TMN[..., n]
    return result


def _pairwise(terms_TMN: Tensor) -> Tensor:
    while terms_TMN.shape[-1] > 1:
        if terms_TMN.shape[-1] % 2:
            terms_TMN = torch.nn.functional.pad(terms_TMN, (0, 1))
        terms_TMN = terms_TMN[..., ::2] + terms_TMN[..., 1::2]
    return terms_TMN[..., 0]


def fp32_matmuls(x_TN: Tensor, w_MN: Tensor, g: torch.Generator) -> Iterator[Tensor]:
    """Multiply in fp32 as different correct kernels would."""
    yield from fp32_sums(x_TN[:, None, :] * w_MN, g)
    yield x_TN @ w_MN.T
    yield torch.stack([w_MN @ row for row in x_TN])


def assert_holds(enclosure: Enclosure, actual: Tensor) -> None:
    """Every element of ``actual`` lies in its interval."""
    same = actual.double() == enclosure.value
    error = torch.where(same, 0.0, (actual.double() - enclosure.value).abs())
    excess = torch.where(error <= enclosure.radius, 0.0, error)
    worst = int(excess.nan_to_num(nan=torch.inf).argmax())
    assert (excess == 0).all(), (
        f"{float(actual.flatten()[worst])} is {float(error.flatten()[worst])} from "
        f"{float(enclosure.value.flatten()[worst])}, radius "
        f"{float(enclosure.radius.flatten()[worst])}"
    )


def interval(shape: tuple[int, ...], scale: Tensor | float, g: torch.Generator) -> Enclosure:
    """Return intervals of which about one in four is a point."""
    value = torch.randn(shape, generator=g, dtype=torch.float64) * scale
    width = 2.0 ** torch.randint(-30, 0, shape, generator=g)
    radius = torch.where(torch.rand(shape, generator=g) < 0.25, 0.0, width * value.abs())
    return Enclosure(value, radius)


def points_of(x: Enclosure, g: torch.Generator) -> Iterator[Tensor]:
    """Both ends of every interval, the ends in random combination, and points between."""
    yield x.value + x.radius
    yield x.value - x.radius
    for _ in range(2):
        share = torch.rand(x.value.shape, generator=g, dtype=torch.float64) * 2 - 1
        yield x.value + torch.sign(share) * x.radius
        yield x.value + share * x.radius


# --- matmul ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*RANDOM, *ADVERSARIAL])
@given(seed=seeds, count=terms, dtype=dtypes)
def test_hard_holds_every_order_of_any_data(kind, seed, count, dtype):
    """HARD is a proof: no order of fp32 additions leaves it, whatever the numbers."""
    g = generator(seed)
    draw = (RANDOM | ADVERSARIAL)[kind]
    x_TN, w_MN = (_stored(draw((size, count), g), dtype) for size in (T, M))
    enclosure = matmul(Enclosure.exact(x_TN), w_MN.double(), FP32, Grade.HARD)
    for actual in fp32_matmuls(x_TN, w_MN, g):
        assert_holds(enclosure, actual)


@pytest.mark.parametrize("grade", [Grade.SHARP, Grade.MED], ids=lambda g: g.name)
@pytest.mark.parametrize("kind", RANDOM)
@given(seed=seeds, count=terms, dtype=dtypes)
def test_the_probable_grades_hold_every_order_of_random_data(kind, grade, seed, count, dtype):
    """SHARP and MED hold random data in every order, adversarially sorted ones included."""
    g = generator(seed)
    x_TN, w_MN = (_stored(RANDOM[kind]((size, count), g), dtype) for size in (T, M))
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
    """65519 fits fp16 and 65521 does not: an interval with both admits both."""
    value = torch.tensor([65519.0, 65521.0, 70000.0], dtype=torch.float64) * sign
    result = rounded(Enclosure(value, torch.full((3,), 2.0, dtype=torch.float64)), FP16)
    assert result.radius.tolist() == [torch.inf, torch.inf, 0.0]
    assert result.value.tolist() == [65504.0 * sign, torch.inf * sign, torch.inf * sign]


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
