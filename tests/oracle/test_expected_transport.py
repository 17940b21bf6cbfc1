"""What must run, by the oracle's own account, against what a transport reports."""

from __future__ import annotations

import pytest
import torch

from tests.oracle.faults.planting import assert_does_not_reach, assert_names_its_stage
from twinmoe.optimized.communication.eligibility import Refusal, Refusals, Tier
from twinmoe.optimized.communication.report import TransportReport
from twinmoe.optimized.communication.setups import SETUPS, set_up
from twinmoe.oracle.expected_transport import SetupWatch, unexpected_backend, unexpected_transport

CPU = torch.device("cpu")
FORCED, KILLED = {0: Refusal.FORCED_LOWER_TIER}, {0: Refusal.KILL_SWITCH}
NO_MULTICAST = {0: Refusal.MULTICAST_UNAVAILABLE}


def report(tier: Tier, refusals: Refusals) -> TransportReport:
    """What a transport of one rank says."""
    return TransportReport(tier, tier.value, 0, 1, refusals, {}, {}, 0)


@pytest.mark.parametrize(
    ("demanded", "killed", "tier", "refusals"),
    [
        (Tier.P2P, False, Tier.P2P, {Tier.NVLS: FORCED}),
        (Tier.NVLS, False, Tier.NVLS, {}),
        (Tier.COLLECTIVE, False, Tier.COLLECTIVE, {Tier.NVLS: FORCED, Tier.P2P: FORCED}),
        (Tier.P2P, True, Tier.COLLECTIVE, {Tier.NVLS: KILLED, Tier.P2P: KILLED}),
        (None, False, Tier.P2P, {Tier.NVLS: NO_MULTICAST}),
    ],
)
def test_what_was_asked_for_is_as_expected(
    demanded: Tier | None, killed: bool, tier: Tier, refusals: Refusals
) -> None:
    """A named tier runs, the switch leaves plain collectives, an open choice takes the best."""
    assert unexpected_transport(demanded, killed, report(tier, refusals), CPU) == ""


@pytest.mark.parametrize(
    ("demanded", "killed", "tier", "refusals", "words"),
    [
        (Tier.P2P, False, Tier.COLLECTIVE, {}, "p2p is asked, but collective runs"),
        (Tier.P2P, False, Tier.COLLECTIVE, {Tier.P2P: FORCED}, "p2p is refused (rank 0: forced"),
        (Tier.P2P, True, Tier.P2P, {}, "the kill switch is on, but p2p runs"),
        (None, False, Tier.COLLECTIVE, {Tier.P2P: KILLED}, "p2p is refused (rank 0: kill_switch)"),
        (None, False, Tier.P2P, {}, "open, but p2p runs, not nvls"),
    ],
)
def test_less_than_was_asked_for_is_said(
    demanded: Tier | None, killed: bool, tier: Tier, refusals: Refusals, words: str
) -> None:
    """However honest the report is, with reasons that hold or without any."""
    assert words in unexpected_transport(demanded, killed, report(tier, refusals), CPU)


def test_a_named_backend_runs_or_is_missed() -> None:
    """Only "auto" may become another."""
    assert unexpected_backend("auto", "triton") == unexpected_backend("triton", "triton") == ""
    assert "triton is asked, but grouped_mm runs" in unexpected_backend("triton", "grouped_mm")


def test_set_ups_are_watched_while_the_switch_is_on() -> None:
    """From before it was turned on, whether or not it is turned on twice, until it is off."""
    watch, before = SetupWatch(), SETUPS.copy()
    try:
        set_up("rendezvous")
        assert watch.told() == ""
        watch.turn(True)
        set_up("rendezvous")
        watch.turn(True)
        assert watch.told().endswith("symmetric memory was set up: rendezvous x1")
        watch.turn(False)
        assert watch.told() == ""
    finally:
        SETUPS.clear()
        SETUPS.update(before)


LAYER = "T=4,H=32,I=16,E=4,k=2,dtype=bf16"


@pytest.mark.parametrize(
    ("name", "there", "elsewhere"),
    [
        ("needless_fallback", "mode=graphed", "transport=gloo"),
        ("false_refusal", "transport=alltoall", "mode=eager"),
        ("set_up_regardless", "history=k1.f0.k0.f0", "history=f0.k1.f0"),
    ],
)
def test_a_downgrade_is_found(name: str, there: str, elsewhere: str) -> None:
    """Though every number is right, and the report is honest about what runs."""
    assert_names_its_stage(name, f"{LAYER},{there}")
    assert_does_not_reach(name, f"{LAYER},{elsewhere}")
