"""Drawn values: the same bits on every machine, and of the distribution described."""

import hashlib
import math

import pytest
import torch

from twinmoe.reference import draws
from twinmoe.reference.config import DTYPES

#: SHA-256 of 40000 values (three chunks), of seed 7 and key ("w2", 3), scaled by 0.3.
PINNED = {
    "bf16": "fe68217a1f3ece3e5af2cebb809233bece0c6f8abddd1762593c4d0b1e7173fd",
    "fp16": "dd64b82f60e249bcfb6a1819e3eb8de8ddebbddca5f835bf1e776034bcbbb782",
    "fp32": "524bcd970a063c609a0e6df4dce17e43166e0b6c8a9e8c356cf5eb9cded0ea16",
    "fp64": "f15ae38990fcdbc61a906ddeb66d5d600cf311fc239a0c5344d6d5b394e28a58",
}


def drawn(dtype: torch.dtype = torch.float64, *key: object, seed: int = 0) -> torch.Tensor:
    """Return 2**18 values of standard deviation 1."""
    return draws.normal((2**18,), dtype, seed, *key)


@pytest.mark.parametrize("name", DTYPES)
def test_values_are_those_of_record(name: str) -> None:
    """Old replay lines and golden files mean something only while these bits stay."""
    values = draws.normal((40, 1000), DTYPES[name], 7, "w2", 3, scale=0.3)
    content = values.flatten().view(torch.uint8).numpy().tobytes()
    assert hashlib.sha256(content).hexdigest() == PINNED[name]


def test_moments_are_those_of_the_docstring() -> None:
    """Mean 0, deviation 1, no skew, kurtosis 2.85: each within five of its standard errors."""
    values = drawn()
    error = len(values) ** -0.5
    assert abs(values.mean()) < 5 * error
    assert abs(values.square().mean() - 1) < 5 * 1.37 * error
    assert abs(values.pow(3).mean()) < 5 * 3.7 * error
    assert abs(values.pow(4).mean() - 2.85) < 5 * 9 * error
    assert values.abs().max() < 4.9


def test_neighbours_and_streams_know_nothing_of_each_other() -> None:
    """Values of one stream, of two seeds and of two keys are uncorrelated."""
    values, limit = drawn(), 5 * 2**-9
    for other in (values.roll(1), values.roll(2), drawn(seed=1), drawn(torch.float64, "gate")):
        assert abs((values * other).mean()) < limit


def test_a_longer_tensor_begins_with_a_shorter_one() -> None:
    """Chunks leave no mark: neither the length nor the shape decides what a value is."""
    whole = draws.normal((3 * 2**14 + 5,), torch.float32, 1, "rows")
    for count in (0, 1, 2**14 - 1, 2**14, 2**14 + 1):
        assert torch.equal(draws.normal((count,), torch.float32, 1, "rows"), whole[:count])
    assert torch.equal(draws.normal((3, 5), torch.float32, 1, "rows").flatten(), whole[:15])


@pytest.mark.parametrize("name", DTYPES)
def test_each_value_is_a_whole_number_over_one_constant(name: str) -> None:
    """Any dtype holds the same draw, rounded: through fp32 for those narrower than it."""
    wide, deviation = drawn(), math.sqrt(2 * (2**32 - 1) / 3)
    whole = (wide * deviation).round()
    assert whole.abs().max() <= 8 * 32767.5
    assert torch.equal(whole * (1 / deviation), wide)
    expected = wide if name == "fp64" else wide.float().to(DTYPES[name])
    assert torch.equal(drawn(DTYPES[name]), expected)
