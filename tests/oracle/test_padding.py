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
        ("gathered_ids", 3, "dispatch"),
        ("gathered_weights", 0.5, "dispatch"),
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


@pytest.mark.parametrize(("name", "value"), [("routed_ids", 0), ("routed_weights", 0.25)])
def test_a_router_answers_for_its_own_padding_rows(name: str, value: float) -> None:
    """What a rank's router makes of its padding is the router's, before it is sent."""
    clean = taps()
    assert clean.gathered_ids is not None
    assert clean.gathered_weights is not None
    own = {"routed_ids": clean.gathered_ids[:3], "routed_weights": clean.gathered_weights[:3]}
    assert not list(leaks(0, taps(**own), TOKENS))
    own[name] = own[name].clone()
    own[name][2, 0] = value
    (finding,) = leaks(0, taps(**own), TOKENS)
    assert finding.stage == "router"
    assert name in finding.message
