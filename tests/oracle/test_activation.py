"""Enclosures of the activations hold what PyTorch and our kernels compute in fp32."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from twinmoe.optimized.experts.activation import gate_times_up
from twinmoe.optimized.triton_runtime import tl, triton
from twinmoe.oracle.activation import ACTIVATIONS, activate, clamp
from twinmoe.oracle.comparison import compare
from twinmoe.oracle.envelope import Enclosure, rounded
from twinmoe.oracle.rounding import FP32, FP64
from twinmoe.reference.experts import ACTIVATIONS as REFERENCE

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

NAMES = sorted(ACTIVATIONS)
seeds = st.integers(0, 2**32)
by_name = pytest.mark.parametrize("name", NAMES)


@triton.jit
def plain_activation(x_ptr, out_ptr, ACT: tl.constexpr, N: tl.constexpr):
    """Store act(x) of every element, as the fused experts compute it."""
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, gate_times_up(x, x, ACT, False, None))


def kernel(name: str, x: Tensor) -> Tensor:
    """Evaluate an activation by our kernel, in one block of a power of two."""
    block = triton.next_power_of_2(len(x))
    padded = torch.nn.functional.pad(x, (0, block - len(x)))
    out = torch.empty(block)
    plain_activation[(1,)](padded, out, name, block)
    return out[: len(x)]


def implementations(name: str, x: Tensor) -> Iterator[Tensor]:
    """Evaluate in fp32 by PyTorch, vectorised and element by element, and by our kernel."""
    yield REFERENCE[name](x)
    yield (
        REFERENCE[name](x[::3].contiguous())
        .repeat_interleave(3)[: len(x)]
        .where(torch.arange(len(x)) % 3 == 0, REFERENCE[name](x))
    )
    yield kernel(name, x)


def extremes() -> Tensor:
    """Return zeros, both ends of the subnormals, powers of two, and where exp ends, signed."""
    # beyond 2^126, PyTorch's gelu overflows on its way to a finite result, which is allowed
    powers = 2.0 ** torch.arange(-149, 128, dtype=torch.float64)
    around = torch.linspace(80, 110, 301, dtype=torch.float64)
    special = torch.tensor([0.0, 90.0, 1e10, 1e20, 1e-45, 1e-40])
    positive = torch.cat([powers, 1.37 * powers[:-1], around, special.double()]).float()
    return torch.cat([positive, -positive])


def arguments(seed: int) -> Tensor:
    """Return random fp32 arguments: moderate, wide, and of random bit patterns."""
    g = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (256,), generator=g).to(torch.int32).view(torch.float32)
    normal = torch.randn(768, generator=g)
    x = torch.cat([normal[:256], normal[256:512] * 6, normal[512:] * 60, bits])
    return x[x.isfinite()]


def assert_inside(actual: Tensor, allowed: Enclosure) -> None:
    """No element is outside; the message shows the worst one."""
    result = compare(actual, allowed)
    worst = int(result.ratio.argmax())
    assert not result.outside.any(), (
        f"{float(actual[worst])} instead of {float(allowed.value[worst])}, "
        f"{float(result.ratio[worst]):.3g} times the radius {float(allowed.radius[worst]):.3g}"
    )


@by_name
@given(seed=seeds)
def test_fp32_evaluation_is_inside(name, seed):
    """PyTorch's and our kernels' fp32 functions, from random arguments that are exact."""
    x = arguments(seed)
    allowed = rounded(activate(name, Enclosure.exact(x), FP32).held(), FP32)
    for actual in implementations(name, x):
        assert_inside(actual, allowed)


@by_name
def test_extreme_arguments_are_inside(name):
    """Subnormals, +-0, every power of two, and arguments at which exp under- or overflows."""
    x = extremes()
    allowed = rounded(activate(name, Enclosure.exact(x), FP32).held(), FP32)
    for actual in implementations(name, x):
        assert_inside(actual, allowed)


@by_name
def test_infinite_and_nan_arguments_keep_their_class(name):
    """Where fp32 gives an infinity or NaN, so does the truth."""
    x = torch.tensor([torch.inf, -torch.inf, torch.nan])
    allowed = rounded(activate(name, Enclosure.exact(x), FP32).held(), FP32)
    assert_inside(kernel(name, x), allowed)
    # not all three at once: PyTorch's vectorised gelu turns +inf into NaN, its scalar one does not
    assert_inside(torch.cat([REFERENCE[name](one) for one in x.split(1)]), allowed)


@by_name
@given(seed=seeds, width=st.integers(-24, 3))
def test_every_point_of_an_interval_is_inside(name, seed, width):
    """The function of both ends and of points between, in fp64, at any width of the interval."""
    g = torch.Generator().manual_seed(seed)
    value = torch.randn(512, generator=g, dtype=torch.float64) * 4
    value[:3] = torch.tensor([0.0, 20.0, -20.0])
    radius = torch.rand(512, generator=g, dtype=torch.float64) * 2.0**width
    allowed = activate(name, Enclosure(value, radius), FP32).held()
    # the ends but for a hair: the bound is so tight at 0 that fp64's own rounding shows there
    for share in (2.0**-30 - 1, -0.6, -0.1, 0.3, 0.8, 1 - 2.0**-30):
        assert_inside(ACTIVATIONS[name].value(value + share * radius), allowed)


@by_name
@given(seed=seeds)
def test_fp32_evaluation_of_every_point_is_inside(name, seed):
    """Input error and evaluation error at once: fp32 functions of fp32 points."""
    g = torch.Generator().manual_seed(seed)
    points = torch.randn(256, generator=g)[:, None] * 4 + torch.randn(256, 3, generator=g) * 0.01
    low, high = points.double().amin(dim=1), points.double().amax(dim=1)
    interval = Enclosure((low + high) / 2, (high - low) / 2 * (1 + 2.0**-50))
    allowed = activate(name, interval, FP32).held()
    for actual in implementations(name, points.T.flatten()):
        for point in actual.chunk(3):
            assert_inside(point, allowed)


@by_name
@given(seed=seeds)
def test_fp64_evaluation_is_inside(name, seed):
    """A layer in fp64 is held to fp64: PyTorch's function is inside, the fp32 one is not."""
    x = arguments(seed)[:768].double()
    allowed = activate(name, Enclosure.exact(x), FP64).held()
    assert_inside(REFERENCE[name](x), allowed)
    if name not in ("relu", "relu2"):
        single = compare(REFERENCE[name](x.float()).double(), allowed)
        assert single.outside.double().mean() > 0.5


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_evaluation_in_bf16_is_outside(name):
    """The allowance is fp32's: most results rounded to bf16 along the way do not fit."""
    x = torch.linspace(-6, 6, 1001).bfloat16()
    allowed = activate(name, Enclosure.exact(x), FP32).held()
    result = compare(REFERENCE[name](x), allowed)
    assert result.outside.double().mean() > 0.6


@by_name
def test_the_curvature_bounds_the_second_derivative(name):
    """The bound that Taylor's theorem needs holds on a fine grid, and is not idle."""
    x = torch.linspace(-30, 30, 120_001, dtype=torch.float64)
    slope = torch.diff(ACTIVATIONS[name].value(x)) / torch.diff(x)
    second = (torch.diff(slope) / torch.diff(x)[1:]).abs()
    if name == "relu":
        return  # the kink is carried by the slope, which is 1 everywhere
    assert second.max() <= ACTIVATIONS[name].curvature * (1 + 1e-6)
    assert second.max() >= ACTIVATIONS[name].curvature * 0.75


@given(seed=seeds, limit=st.sampled_from([0.5, 1.5, 7.0]))
def test_clamping_holds_every_point_and_adds_nothing(seed, limit):
    """The clamped points of an interval stay inside, and one clamped end is on its boundary."""
    g = torch.Generator().manual_seed(seed)
    value = torch.randn(256, generator=g, dtype=torch.float64) * limit
    x = Enclosure(value, torch.rand(256, generator=g, dtype=torch.float64) * limit / 4)
    for low in (-math.inf, -limit):
        allowed = clamp(x, low, limit)
        reach = torch.zeros_like(value)
        for share in (-1.0, -0.5, 0.0, 0.5, 1.0):
            point = (value + share * x.radius).clamp(low, limit)
            assert_inside(point, allowed)
            reach = torch.maximum(reach, (point - allowed.value).abs())
        assert torch.equal(reach, allowed.radius)
