"""Enclosures of block-scaled quantisation hold every point of their intervals."""

import pytest
import torch

from twinmoe.oracle.envelope import Enclosure
from twinmoe.oracle.quantise import Quantiser, quantised
from twinmoe.oracle.rounding import E4M3, FP32, round_to
from twinmoe.oracle.spread import Spread

BLOCKED = Quantiser(8, E4M3, FP32)


def dequantised(x: torch.Tensor, quantiser: Quantiser) -> torch.Tensor:
    """Quantise and dequantise exact values [T, n], n a multiple of the block, in fp64."""
    blocks = x.unflatten(-1, (-1, quantiser.block))
    scale = round_to(blocks.abs().amax(dim=-1, keepdim=True) / 448, quantiser.scales)
    if quantiser.power_of_two:
        scale = torch.exp2(scale.log2().ceil())
    return (round_to(blocks / scale, quantiser.codes) * scale).flatten(-2)


def normal(seed: int) -> torch.Tensor:
    """Return seeded fp64 rows of three blocks."""
    return torch.randn(64, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_certain_values_quantise_almost_without_a_radius() -> None:
    """Both sides commit the same rounding; left are those of the scale, and codes that tie."""
    x = normal(0)
    enclosure = quantised(Enclosure.exact(x), BLOCKED, FP32)
    torch.testing.assert_close(enclosure.value, dequantised(x, BLOCKED), rtol=2e-7, atol=0)
    certain = enclosure.radius <= enclosure.value.abs() * 2.0**-20
    assert certain.double().mean() > 0.99


@pytest.mark.parametrize("width", [2.0**-12, 2.0**-8, 2.0**-4])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_every_point_of_the_interval_lands_inside(width: float, power_of_two: bool) -> None:
    """Points drawn from the interval quantise into the enclosure, whichever scale they meet."""
    quantiser = Quantiser(8, E4M3, FP32, power_of_two)
    x = normal(1)
    enclosure = quantised(Enclosure(x, torch.full_like(x, width)), quantiser, FP32)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        offset = torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1
        seen = dequantised(x + width * offset, quantiser)
        outside = (seen - enclosure.value).abs() > enclosure.radius * (1 + 2.0**-40)
        assert not outside.any()


@pytest.mark.parametrize("by_reciprocal", [False, True])
def test_fp32_arithmetic_lands_inside(by_reciprocal: bool) -> None:
    """Dividing by the scale, and multiplying by a rounded reciprocal, are both correct."""
    for seed in range(20):
        x = normal(seed).bfloat16()
        blocks = x.float().unflatten(-1, (-1, 8))
        amax = blocks.abs().amax(dim=-1, keepdim=True)
        scale = amax * torch.tensor(1 / 448) if by_reciprocal else amax / 448
        codes = blocks * (1 / scale) if by_reciprocal else blocks / scale
        seen = (round_to(codes.double(), E4M3).float() * scale).flatten(-2).double()
        enclosure = quantised(Enclosure.exact(x), BLOCKED, FP32)
        assert not ((seen - enclosure.value).abs() > enclosure.radius).any()


def test_a_scale_without_a_reciprocal_allows_any_code() -> None:
    """1 / 2**-130 overflows, which who divides does not notice; other blocks stay sharp."""
    x = torch.tensor([[1.0, -0.5] * 4, [0.0] * 8, [1.0, -0.5] * 4]).double()
    x[0] *= 448 * 2.0**-130
    enclosure = quantised(Enclosure.exact(x), BLOCKED, FP32)
    assert (enclosure.radius[0] >= 448 * 2.0**-130).all()
    assert not enclosure.value[1].any()
    assert not enclosure.radius[1].any()
    assert (enclosure.radius[2] < 2.0**-20).all()


@pytest.mark.parametrize("width", [2.0**-12, 2.0**-8])
def test_codes_move_no_more_than_expected(width: float) -> None:
    """The mean size of what a normal error does to dequantised values is bounded."""
    x = normal(3)
    spread = quantised(Spread.of(x, torch.full_like(x, width)), BLOCKED, FP32)
    moved = torch.zeros_like(x)
    for seed in range(50):
        error = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).double() * width
        moved += (dequantised(x + error, BLOCKED) - spread.value).abs() / 50
    expected = torch.hypot(spread.radius[0], spread.radius[1])
    assert float(moved.mean()) < 1.1 * float(expected.mean())
    assert float(moved.mean()) > 0.3 * float(expected.mean())


def test_power_of_two_scales_round_up() -> None:
    """The largest value of a block fits the codes: scales are rounded up to a power of two."""
    quantiser = Quantiser(8, E4M3, FP32, power_of_two=True)
    amax = Enclosure.exact(torch.tensor([447.0, 449.0, 223.0, 0.0]))
    assert quantiser.scale(amax, FP32).value.tolist() == [1.0, 2.0, 0.5, 0.0]


def test_a_scale_at_a_power_of_two_may_go_either_way() -> None:
    """448 / 448 is 1 or a hair more, which rounds up to 2."""
    quantiser = Quantiser(8, E4M3, FP32, power_of_two=True)
    scale = quantiser.scale(Enclosure.exact(torch.tensor([448.0])), FP32)
    assert float(scale.value - scale.radius) <= 1.0
    assert float(scale.value + scale.radius) >= 2.0


def test_zeros_stay_zeros() -> None:
    """A block of zeros has no scale, and needs none; nor does one of zeros that may be less."""
    nothing = torch.zeros(2, 16, dtype=torch.float64)
    assert not quantised(Enclosure.exact(nothing), BLOCKED, FP32).magnitude().any()
    hair = quantised(Enclosure(nothing, nothing + 1e-20), BLOCKED, FP32)
    assert float(hair.magnitude().max()) < 1e-18


def test_a_short_last_block_is_a_block() -> None:
    """Sizes that are no multiple of the block keep their shape and their own last scale."""
    x = normal(2)[:, :21]
    enclosure = quantised(Enclosure.exact(x), BLOCKED, FP32)
    assert enclosure.value.shape == x.shape
    last = dequantised(x[:, 16:], Quantiser(5, E4M3, FP32))
    torch.testing.assert_close(enclosure.value[:, 16:], last, rtol=2e-7, atol=0)
