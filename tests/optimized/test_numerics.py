"""The kernels' leaf arithmetic: exact casts, accurate functions."""

import pytest
import torch
from torch import Tensor

from twinmoe.optimized import numerics
from twinmoe.optimized.interpreter import prepare
from twinmoe.optimized.triton_runtime import tl, triton

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

#: Largest relative error of the elementary functions, in units of 2^-24.
UNITS = 6


@triton.jit
def widen(x_ptr, out_ptr, N: tl.constexpr):
    """Store to_fp32 of every element."""
    i = tl.arange(0, N)
    tl.store(out_ptr + i, numerics.to_fp32(tl.load(x_ptr + i)))


@triton.jit
def narrow(x_ptr, out_ptr, N: tl.constexpr):
    """Store round_to(element type of out) of every element."""
    i = tl.arange(0, N)
    tl.store(out_ptr + i, numerics.round_to(tl.load(x_ptr + i), out_ptr.dtype.element_ty))


@triton.jit
def elementary(x_ptr, out_ptr, NAME: tl.constexpr, N: tl.constexpr):
    """Store one elementary function of every element."""
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    if NAME == "exp":
        y = numerics.exp_nonpositive(x)
    elif NAME == "sigmoid":
        y = numerics.sigmoid(x)
    else:
        y = numerics.softplus(x)
    tl.store(out_ptr + i, y)


def bits(values: Tensor) -> Tensor:
    """Return the bit patterns, all NaN alike."""
    values = torch.where(values.isnan(), torch.nan, values)
    return values.view(torch.int16 if values.itemsize == 2 else torch.int32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widening_is_exact_for_every_value(dtype):
    """All 65536 bit patterns, subnormals, infinities and NaN included."""
    x = torch.arange(2**16).to(torch.int32).to(torch.int16).view(dtype)
    out = torch.empty(2**16)
    widen[(1,)](x, out, 2**16)
    assert torch.equal(bits(out), bits(x.float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrowing_rounds_to_nearest_even(dtype):
    """Every bfloat16 value, its neighbours and midpoints, and both infinities and NaN."""
    coarse = torch.arange(2**16).to(torch.int32) << 16
    x = torch.cat([coarse + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    x = torch.cat([x, x[: 2**19 - len(x)]]).view(torch.float32)
    out = torch.empty(2**19, dtype=dtype)
    narrow[(1,)](x, out, 2**19)
    assert torch.equal(bits(out), bits(x.to(dtype)))


@pytest.mark.parametrize(
    ("name", "truth", "least", "most"),
    [
        ("exp", torch.exp, -87.0, 0.0),
        ("sigmoid", torch.sigmoid, -87.0, 87.0),
        ("softplus", lambda x: x.exp().log1p(), -87.0, 87.0),
    ],
)
def test_elementary_functions_are_accurate_to_a_few_units(name, truth, least, most):
    """The relative error stays small out to where fp32 runs out of normal numbers."""
    x = torch.linspace(least, most, 2**13)
    out = torch.empty_like(x)
    elementary[(1,)](x, out, name, 2**13)
    error = (out.double() / truth(x.double()) - 1).abs().max()
    assert error <= UNITS * 2.0**-24


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        ("exp", [0.0, 1.0, torch.nan]),
        ("sigmoid", [0.0, 0.5, 1.0]),
        ("softplus", [0.0, None, torch.inf]),
    ],
)
def test_elementary_functions_meet_their_limits(name, limits):
    """-inf, 0 and what lies at the far end (+inf, or NaN for exp) come out exactly."""
    x = torch.tensor([-torch.inf, 0.0, torch.nan if name == "exp" else torch.inf, torch.nan])
    out = torch.empty_like(x)
    elementary[(1,)](x, out, name, 4)
    for value, limit in zip(out[:3].tolist(), limits, strict=True):
        if limit is not None:
            torch.testing.assert_close(value, limit, rtol=0, atol=0, equal_nan=True)
    assert out[3].isnan()


def test_speeding_up_the_interpreter_twice_changes_nothing():
    """The second call finds the first one's work done."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    prepare()
    patched = interpreter._patch_lang
    prepare()
    assert interpreter._patch_lang is patched
