"""Numbers beside each other differ in print where they differ at all."""

import pytest
import torch

from twinmoe.oracle.comparison import compare
from twinmoe.oracle.digits import apart
from twinmoe.oracle.envelope import Enclosure


@pytest.mark.parametrize(
    ("numbers", "texts"),
    [
        ((2.5, 2.0), ["2.5", "2"]),
        ((2.5, 2.5000002384185791, 2.5), ["2.5", "2.5000002", "2.5"]),
        ((1.0, 1 + 2.0**-52), ["1", "1.0000000000000002"]),
        ((0.0, -0.0), ["0", "-0"]),
        ((float("nan"), 1.0, float("inf")), ["nan", "1", "inf"]),
        ((1 / 3, 1 / 3), ["0.333333", "0.333333"]),
    ],
)
def test_digits_suffice_to_tell_numbers_apart(numbers: tuple[float, ...], texts: list[str]) -> None:
    """Six of them, or more if different numbers would look alike."""
    assert apart(*numbers) == texts


def test_an_observed_value_never_looks_like_the_bound_it_breaks() -> None:
    """One unit in the last place of an fp32 weight outside an interval of no width."""
    weight = torch.tensor([2.5], dtype=torch.float32)
    seen = torch.nextafter(weight, torch.tensor(3.0))
    result = compare(seen, Enclosure.exact(weight))
    assert result.outside.all()
    assert result.beside(seen, (0,)) == "2.5000002, allowed 2.5 .. 2.5"
