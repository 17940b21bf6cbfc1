"""Padding rows: what may stand in them, and where a leak is seen."""

import pytest
import torch

from twinmoe.oracle.observation import Taps
from twinmoe.oracle.padding import leaks

TOKENS = (2, 0)  # of two ranks, padded to 3 rows each


def taps(**changes: torch.Tensor) -> Taps:
    """Return taps with clean padding, except for ``changes``."""
    ids = torch.tensor([[1, 0], [0, 2], [-1, -1], [-1, -1], [-1, -1], [-1, -1]])
    valid = (ids[:, :1] >= 0).float()
    clean = {
        "gathered_ids": ids,
        "gathered_weights": valid.expand(-1, 2).clone(),
        "partial": valid.expand(-1, 4).clone(),
    }
    return Taps(**{**clean, **changes})


def test_clean_padding_passes() -> None:
    """Valid rows hold anything; padding rows hold -1 and zeros."""
    assert not list(leaks(0, taps(), TOKENS))
    assert not list(leaks(0, Taps(), TOKENS))


@pytest.mark.parametrize(
    ("name", "value", "stage"),
    [
        ("gathered_ids", 3, "router"),
        ("gathered_weights", 0.5, "router"),
        ("partial", 1e-30, "experts"),
        ("partial", float("nan"), "experts"),
    ],
)
def test_a_leak_is_told_with_value_and_stage(name: str, value: float, stage: str) -> None:
    """Whether a padding row was routed or computed."""
    tap = getattr(taps(), name).clone()
    tap[4, 1] = value
    (finding,) = leaks(1, taps(**{name: tap}), TOKENS)
    assert (finding.stage, finding.rank) == (stage, 1)
    assert name in finding.message
    assert f"(1 of {4 * tap.shape[1]} values)" in finding.message
