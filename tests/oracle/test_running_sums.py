"""Sums that are stored after every addition: what overflows on the way, in some order."""

from __future__ import annotations

import math

import pytest
import torch

from twinmoe.oracle.envelope import Enclosure, total
from twinmoe.oracle.rounding import FP16, FP32
from twinmoe.oracle.running_sums import running_sums

BIG = 4e4  # twice as much is beyond fp16


@pytest.mark.parametrize(
    ("shares", "allowed"),
    [
        # BIG + BIG is infinity, and infinity less infinity NaN; the other order stays at -infinity.
        ((-math.inf, BIG, BIG), None),
        ((math.inf, -BIG, -BIG), None),
        ((-math.inf, BIG, -BIG), -math.inf),
        ((-math.inf, -BIG, -BIG), -math.inf),
        ((math.inf, BIG, BIG), math.inf),
        ((math.inf, -math.inf, BIG), math.nan),
        ((BIG, BIG, -BIG), None),
        ((BIG, 1.0, -BIG), 1.0),
    ],
    ids=str,
)
def test_an_overflow_on_the_way_frees_the_sum(
    shares: tuple[float, ...], allowed: float | None
) -> None:
    """None: anything may come of it.  What every order makes is demanded."""
    parts = Enclosure.exact(torch.tensor(shares)[:, None, None])
    result = running_sums(total(parts, 0, FP32), parts, 0, FP16, 1)
    value, radius = result.value.item(), result.radius.item()
    if allowed is None:
        assert radius == math.inf
    elif math.isfinite(allowed):
        assert abs(value - allowed) <= radius < BIG
    else:
        assert radius == 0
        assert value == allowed or (math.isnan(value) and math.isnan(allowed))
