"""Which transport tiers are open to a group, and the closed set of reasons why one is not."""

from collections.abc import Mapping
from enum import Enum

import torch

#: First compute capability with ``multimem`` instructions.
_MULTICAST_CAPABILITY = (9, 0)


class Tier(Enum):
    """Transports, best first."""

    NVLS = "nvls"
    P2P = "p2p"
    #: torch.distributed: shown under its backend's name, "nccl" or "gloo".
    COLLECTIVE = "collective"


class Refusal(Enum):
    """Why a tier is not used: by a group, or (MISALIGNED) for one shape."""

    KILL_SWITCH = "kill_switch"
    FORCED_LOWER_TIER = "forced_lower_tier"
    MULTICAST_UNAVAILABLE = "multicast_unavailable"
    COMPUTE_CAPABILITY = "compute_capability"
    SYMMETRIC_MEMORY_UNAVAILABLE = "symmetric_memory_unavailable"
    RENDEZVOUS_FAILED = "rendezvous_failed"
    BUFFER_TOO_SMALL = "buffer_too_small"
    SIGNAL_PAD_TOO_SMALL = "signal_pad_too_small"
    MISALIGNED = "misaligned"


#: Failures that a test may stage on a rank, and the refusal that each must end in.
INJECTABLE = {
    "symmetric_memory": Refusal.SYMMETRIC_MEMORY_UNAVAILABLE,
    "rendezvous": Refusal.RENDEZVOUS_FAILED,
    "multicast": Refusal.MULTICAST_UNAVAILABLE,
    "buffer": Refusal.BUFFER_TOO_SMALL,
    "signal_pad": Refusal.SIGNAL_PAD_TOO_SMALL,
}

#: tier -> rank -> reason, of the ranks that refuse it.
Refusals = dict[Tier, dict[int, Refusal]]


def refused_by_request(tier: Tier, forced: Tier | None, kill_switch: bool) -> Refusal | None:
    """Whether the caller's wishes close ``tier``, before any hardware is asked."""
    if tier is Tier.COLLECTIVE:
        return None
    if kill_switch:
        return Refusal.KILL_SWITCH
    tiers = list(Tier)
    if forced is not None and tiers.index(tier) < tiers.index(forced):
        return Refusal.FORCED_LOWER_TIER
    return None


def refused_multicast(device: torch.device, multicast_ptr: int, *, emulate: bool) -> Refusal | None:
    """Whether this rank cannot run the nvls tier over memory with ``multicast_ptr``.

    On a CPU there is no multicast; ``emulate`` accepts its emulation.
    """
    if device.type == "cpu":
        return None if emulate else Refusal.MULTICAST_UNAVAILABLE
    if torch.cuda.get_device_capability(device) < _MULTICAST_CAPABILITY:
        return Refusal.COMPUTE_CAPABILITY
    return None if multicast_ptr else Refusal.MULTICAST_UNAVAILABLE


def highest_open(refusals: Mapping[Tier, Mapping[int, Refusal]]) -> Tier:
    """Return the best tier that no rank refuses."""
    return next(tier for tier in Tier if not refusals.get(tier))
