"""Which transport and expert backend must run, and with which refusals: the oracle's own account.

A layer that runs less than it was asked for and says so honestly is still not what was asked for.
A tier that is named runs or is refused by an error; only where the choice is open may a layer
choose, and then by its stated order.
"""

from collections import Counter
from collections.abc import Mapping

import torch

from twinmoe.optimized.communication.eligibility import Refusal, Tier
from twinmoe.optimized.communication.report import TransportReport, describe_refusals
from twinmoe.optimized.communication.setups import SETUPS
from twinmoe.optimized.experts.choice import AUTO

#: What a machine without working symmetric memory, or without the room for it, may answer.
_OF_A_MACHINE = frozenset(
    {
        Refusal.SYMMETRIC_MEMORY_UNAVAILABLE,
        Refusal.RENDEZVOUS_FAILED,
        Refusal.BUFFER_TOO_SMALL,
        Refusal.SIGNAL_PAD_TOO_SMALL,
    }
)

#: First compute capability with multicast.
_MULTICAST_CAPABILITY = (9, 0)


def unexpected_transport(
    demanded: Tier | None, killed: bool, report: TransportReport, device: torch.device
) -> str:
    """Say what is wrong with the choice that ``report`` tells of; empty if it is as expected.

    ``demanded`` None: the choice is open.  ``killed``: the kill switch is on.
    """
    allowed = _allowed(demanded, killed, device)
    for tier, by_rank in report.refusals.items():
        wrong = {rank: why for rank, why in by_rank.items() if why not in allowed.get(tier, ())}
        if wrong:
            return (
                f"{_asked(demanded, killed)}, but {tier.value} is refused "
                f"({describe_refusals(wrong)}), for which there is no reason here"
            )
    best = next(tier for tier in Tier if not report.refusals.get(tier))
    wanted = Tier.COLLECTIVE if killed else demanded or best
    if report.tier is not wanted:
        return f"{_asked(demanded, killed)}, but {report.label} runs, not {wanted.value}"
    return ""


def _allowed(
    demanded: Tier | None, killed: bool, device: torch.device
) -> Mapping[Tier, frozenset[Refusal]]:
    """The reasons for which each tier may be refused."""
    if killed:
        return dict.fromkeys((Tier.NVLS, Tier.P2P), frozenset({Refusal.KILL_SWITCH}))
    if demanded is not None:
        tiers = list(Tier)
        above = tiers[: tiers.index(demanded)]
        return dict.fromkeys(above, frozenset({Refusal.FORCED_LOWER_TIER}))
    if device.type == "cpu":
        return {Tier.NVLS: frozenset({Refusal.MULTICAST_UNAVAILABLE})}
    return {Tier.NVLS: _without_multicast(device) | _OF_A_MACHINE, Tier.P2P: _OF_A_MACHINE}


def _without_multicast(device: torch.device) -> frozenset[Refusal]:
    if torch.cuda.get_device_capability(device) < _MULTICAST_CAPABILITY:
        return frozenset({Refusal.COMPUTE_CAPABILITY})
    # Whether this machine's switches have multicast, only an allocation tells.
    return frozenset({Refusal.MULTICAST_UNAVAILABLE})


def _asked(demanded: Tier | None, killed: bool) -> str:
    if killed:
        return "the kill switch is on"
    return "the choice of transport is open" if demanded is None else f"{demanded.value} is asked"


def unexpected_backend(asked: str, runs: str) -> str:
    """Say that another expert backend runs than was asked for by name; empty if it does not."""
    return "" if asked in (AUTO, runs) else f"expert backend {asked} is asked, but {runs} runs"


class SetupWatch:
    """Watches what is set up for symmetric memory while the kill switch is on."""

    def __init__(self) -> None:
        self._before: Counter[str] | None = None

    def turn(self, killed: bool) -> None:
        """Call it before the switch is turned: begin, unless it was on already, or end."""
        if not killed:
            self._before = None
        elif self._before is None:
            self._before = SETUPS.copy()

    def told(self) -> str:
        """Say what was set up since; empty for nothing.  What there was before may stay."""
        new = Counter[str]() if self._before is None else SETUPS - self._before
        told = ", ".join(f"{name} x{count}" for name, count in sorted(new.items()))
        return f"with the kill switch on, symmetric memory was set up: {told}" if told else ""
