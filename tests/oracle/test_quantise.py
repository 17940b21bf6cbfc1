"""Enclosures of block-scaled quantisation hold every point of their intervals."""

import pytest
import torch

from twinmoe.oracle.envelope import Enclosure
from twinmoe.oracle.quantise import Quantiser, quantised
from twinmoe.oracle.rounding import E4M3, FP32, round_to

BLOCKED = Quantiser(8, E4M3, FP32)


def dequantised(x: torch.Tensor, quantiser: Quantiser) -> torch.Tensor:
    """Quantise and dequantise exact values [T, n], n a multiple of the block, directly."""
    blocks = x.unflatten(-1, (-1, quantiser.block))
    scale = quantiser.scale(blocks.abs().amax(dim=-1, keepdim=True))
    return (round_to(blocks / scale, quantiser.codes) * scale).flatten(-2)


def normal(seed: int) -> torch.Tensor:
    """Return seeded fp64 rows of three blocks."""
    return torch.randn(64, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_certain_values_quantise_without_a_radius() -> None:
    """Known values have one scale and one code each: both sides commit the same rounding."""
    x = normal(0)
    enclosure = quantised(Enclosure.exact(x), BLOCKED)
    assert torch.equal(enclosure.value, dequantised(x, BLOCKED))
    assert not enclosure.radius.any()


@pytest.mark.parametrize("width", [2.0**-12, 2.0**-8, 2.0**-4])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_every_point_of_the_interval_lands_inside(width: float, power_of_two: bool) -> None:
    """Points drawn from the interval quantise into the enclosure, whichever scale they meet."""
    quantiser = Quantiser(8, E4M3, FP32, power_of_two)
    x = normal(1)
    enclosure = quantised(Enclosure(x, torch.full_like(x, width)), quantiser)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        offset = torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1
        seen = dequantised(x + width * offset, quantiser)
        outside = (seen - enclosure.value).abs() > enclosure.radius * (1 + 2.0**-40)
        assert not outside.any()


def test_power_of_two_scales_round_up() -> None:
    """The largest value of a block fits the codes: scales are rounded up to a power of two."""
    quantiser = Quantiser(8, E4M3, FP32, power_of_two=True)
    amax = torch.tensor([448.0, 449.0, 224.0, 0.0], dtype=torch.float64)
    assert quantiser.scale(amax).tolist() == [1.0, 2.0, 0.5, 1.0]


def test_a_short_last_block_is_a_block() -> None:
    """Sizes that are no multiple of the block keep their shape and their own last scale."""
    x = normal(2)[:, :21]
    enclosure = quantised(Enclosure.exact(x), BLOCKED)
    assert enclosure.value.shape == x.shape
    assert torch.equal(enclosure.value[:, 16:], dequantised(x[:, 16:], Quantiser(5, E4M3, FP32)))
