"""How many roundings correct arithmetic is expected to flip: never fewer than it does.

Legend: M rows, N terms of a dot product, F columns.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from twinmoe.oracle.emulation import KINDS, draw_inputs
from twinmoe.oracle.emulation.correct import GEMMS
from twinmoe.oracle.emulation.gemm import truncating
from twinmoe.oracle.envelope import Enclosure, Grade, matmul, product, rounded, total
from twinmoe.oracle.rounding import BF16, FP32, TENSOR_CORE, Format, round_to
from twinmoe.oracle.spread import Spread
from twinmoe.reference.config import MoEConfig, dtype_name

by_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
seeds = st.integers(0, 2**32)


def operands(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of a batch [M, N], and one expert's w13 [F, N]."""
    config = MoEConfig(
        hidden_size=256,
        moe_intermediate_size=48,
        num_experts=8,
        num_experts_per_tok=2,
        dtype=dtype,
    )
    inputs = draw_inputs(kind, config, (16,), 0)
    return inputs.hidden_by_rank[0], inputs.weights.w13_LFH[3]


def rms_over_expected(seen_MF: Tensor, expected: Spread) -> float:
    """Root mean square of error over expected size, where an error is expected."""
    error, quiet = seen_MF.double() - expected.value, expected.radius[0]
    return float((error[quiet > 0] / quiet[quiet > 0]).square().mean().sqrt())


@by_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_no_order_of_summation_errs_more_than_expected(kind: str, dtype: torch.dtype) -> None:
    """For every kind of input, on average over elements; the worst order comes near."""
    x_MN, w_FN = operands(kind, dtype)
    expected = matmul(Spread.exact(x_MN), w_FN, FP32, KINDS[kind].grade)
    ratios = [
        rms_over_expected(gemm(x_MN.float(), w_FN.float()), expected) for gemm in GEMMS.values()
    ]
    assert max(ratios) < 1
    assert kind != "positive" or max(ratios) > 0.3
    cores = matmul(Spread.exact(x_MN), w_FN, TENSOR_CORE, KINDS[kind].grade)
    assert rms_over_expected(truncating(x_MN.float(), w_FN.float()), cores) < 1


def flipped(value: Tensor, error: Tensor, target: Format) -> Tensor:
    """Which roundings an error moves."""
    return round_to(value + error, target) != round_to(value, target)


@given(seed=seeds, size=st.integers(-14, -7), rare=st.sampled_from([0.02, 0.3, 1.0]))
def test_errors_flip_as_often_as_expected(seed: int, size: int, rare: float) -> None:
    """A normal error, and a rare one that a stored rounding made: the share that flips."""
    g = torch.Generator().manual_seed(seed)
    value = 1 + torch.rand(1, 1 << 14, generator=g, dtype=torch.float64)
    scale = torch.full_like(value, 2.0**size / 8)
    normal = torch.randn(value.shape, generator=g, dtype=torch.float64) * scale
    jump = (torch.rand(value.shape, generator=g) < rare) * 2.0**size
    quiet = Spread.of(value, scale)
    loud = rounded(Spread.exact(value), FP32)
    parts = torch.stack([jump * 0, jump * 0 + rare * 2.0**size, jump * 0 + rare**0.5 * 2.0**size])
    loud = Spread(value, torch.cat([parts, parts[2:] * 0]))
    for spread, error in ((quiet, normal), (loud, jump)):
        chance, _ = spread.flips(round_to(value, BF16), BF16)
        share = float(flipped(value, error, BF16).double().mean())
        assert share <= float(chance.mean()) + 5 * (float(chance.mean()) / value.numel()) ** 0.5
        assert share >= float(chance.mean()) / 2 - 1e-3


@given(seed=seeds)
def test_a_rounding_keeps_the_mean_size_of_an_error(seed: int) -> None:
    """After a stored rounding, errors are whole ulps, seldom: as large as before on average."""
    g = torch.Generator().manual_seed(seed)
    value = 1 + torch.rand(1 << 15, generator=g, dtype=torch.float64)
    scale = torch.full_like(value, 2.0**-11)
    error = torch.randn(value.shape, generator=g, dtype=torch.float64) * scale
    stored = rounded(Spread.of(value, scale), BF16)
    seen = (round_to(value + error, BF16) - round_to(value, BF16)).abs()
    quiet, mean, rms, shared = stored.radius
    assert not quiet.any()
    assert not shared.any()
    assert float(mean.mean()) == pytest.approx(float(seen.mean()), rel=0.1)
    assert float(rms.square().mean()) == pytest.approx(float(seen.square().mean()), rel=0.1)


def test_the_value_on_a_boundary_is_expected_to_flip() -> None:
    """All such values go the same way, whichever it is; without any error they stay."""
    value = torch.full((1, 4), 1 + 2.0**-8, dtype=torch.float64)
    centre = round_to(value, BF16)
    assert (Spread.of(value, torch.full_like(value, 1e-9)).flips(centre, BF16)[0] == 1).all()
    away = value + 1e-6
    tiny = Spread.of(away, torch.full_like(value, 1e-9)).flips(round_to(away, BF16), BF16)[0]
    assert (tiny == 0).all()


def test_what_comes_through_a_gemm_is_shared_by_its_row() -> None:
    """Variance of a row's flips: its elements' own before, and their common error's after."""
    g = torch.Generator().manual_seed(2)
    value = torch.randn(4, 64, generator=g, dtype=torch.float64)
    weight = torch.randn(64, 64, generator=g, dtype=torch.float64) / 8
    stored = rounded(Spread.of(value, torch.full_like(value, 1e-5)), BF16)
    passed = matmul(stored, weight, FP32, Grade.SHARP)
    assert not stored.radius[3].any()
    assert torch.equal(passed.radius[3], passed.radius[2])
    own, common = (
        spread.flips(round_to(spread.value, BF16), BF16)[1].mean() for spread in (stored, passed)
    )
    assert common > 3 * own


def test_an_expectation_is_far_inside_what_is_allowed() -> None:
    """The same rules with either carry: same values, and errors of another size."""
    x_MN, w_FN = operands("normal", torch.bfloat16)
    values, sizes = [], []
    for carry in (Enclosure, Spread):
        y = rounded(matmul(carry.exact(x_MN), w_FN, FP32, Grade.SHARP), None)
        halves = product(y[:, :48], y[:, 48:], FP32)
        summed = total(halves, 1, FP32)
        values.append(summed.value)
        sizes.append(summed.error())
    assert torch.equal(*values)
    assert (sizes[1] * 8 < sizes[0]).all()
