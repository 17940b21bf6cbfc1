"""The choice of a transport: once per group, by all ranks together, and never silently.

Tiers are tried best first.  A tier that one rank cannot run is closed to all, with that
rank's reason in everybody's report.
"""

from collections.abc import Set
from dataclasses import dataclass

import torch
import torch.distributed as dist

from twinmoe.optimized.communication.agreement import exchange, group_size, vote
from twinmoe.optimized.communication.barrier import signal_pad_bytes
from twinmoe.optimized.communication.collective_transport import CollectiveTransport
from twinmoe.optimized.communication.cuda_symmetric_memory import available_signal_pad_bytes
from twinmoe.optimized.communication.eligibility import (
    INJECTABLE,
    Refusals,
    Tier,
    highest_open,
    refused_by_request,
    refused_multicast,
)
from twinmoe.optimized.communication.errors import AllocationDuringCapture, TransportError
from twinmoe.optimized.communication.interface import Transport
from twinmoe.optimized.communication.multimem import Leaf
from twinmoe.optimized.communication.pool import Capacity, SymmetricPool
from twinmoe.optimized.communication.pool_setup import PoolRequest, acquire_pool
from twinmoe.optimized.communication.report import describe_refusals
from twinmoe.optimized.communication.symmetric_transport import SymmetricTransport
from twinmoe.optimized.launch import capturing
from twinmoe.optimized.triton_runtime import INTERPRETED

#: Most CTAs of a collective.  The interpreter runs them one after another: more only cost there.
_MOST_CTAS = 1 if INTERPRETED else 56


@dataclass(frozen=True)
class _Request:
    """What must be the same on all ranks."""

    tier: Tier | None
    kill_switch: bool
    pool: PoolRequest


def select_transport(
    group: dist.ProcessGroup | None,
    *,
    device: torch.device,
    capacity: Capacity,
    tier: Tier | None = None,
    kill_switch: bool = False,
    pool: str = "ep",
    num_ctas: int | None = None,
    inject: Set[str] = frozenset(),
) -> Transport:
    """Choose the transport of ``group`` (None: a single rank); a collective over it.

    ``tier`` None takes the best that all ranks can run; a named tier is taken or refused.
    ``kill_switch`` leaves only the collective tier.  ``pool`` names the kind of parallelism whose
    memory is shared ("tp", "ep").  ``num_ctas`` None takes as many as serve, and as the signal pad
    has room for.  ``inject`` stages failures on this rank, see `eligibility.INJECTABLE`.

    Raises, on all ranks alike: `TransportError` if the ranks disagree on the request or the named
    tier is refused; `SymmetricBufferOverflow` if a pool would have to grow under captured graphs.
    Raises `AllocationDuringCapture` if called while a graph is captured.
    """
    if capturing():
        raise AllocationDuringCapture(
            "select_transport() while a graph is captured: it allocates and waits for peers, which "
            "a replay would not repeat; select the transport before the capture"
        )
    device = torch.empty(0, device=device).device  # "cuda" becomes the current "cuda:0"
    num_ctas = num_ctas or _ctas_for(group_size(group), device)
    request = _Request(tier, kill_switch, PoolRequest(pool, capacity, num_ctas))
    _agree(request, inject, group)
    symmetric_pool, refusals = _try_tiers(request, inject, group, device)
    chosen = highest_open(refusals)
    if tier is not None and chosen is not tier:
        raise TransportError(
            f"tier ({tier.value}) was demanded but is refused: "
            f"{describe_refusals(refusals[tier])}; leave the choice open or remove the cause"
        )
    if symmetric_pool is None:
        return CollectiveTransport(group, device, refusals)
    leaf = Leaf.P2P
    if chosen is Tier.NVLS:
        leaf = Leaf.MULTICAST_EMULATED if device.type == "cpu" else Leaf.MULTICAST
    return SymmetricTransport(symmetric_pool, leaf, device, refusals)


def _ctas_for(world_size: int, device: torch.device) -> int:
    """``_MOST_CTAS``, or as many of them as have a row on the signal pad: 56 at up to 8 ranks."""
    if device.type == "cpu":
        return _MOST_CTAS  # whose pads are as large as they have to be
    try:
        rows = available_signal_pad_bytes() // signal_pad_bytes(1, world_size)
    except Exception:  # no symmetric memory here: that is told when it is asked for
        return _MOST_CTAS
    return max(1, min(_MOST_CTAS, rows))


def _agree(request: _Request, inject: Set[str], group: dist.ProcessGroup | None) -> None:
    """Raise on all ranks unless all ask for the same; everybody's wish is known to everybody."""
    answers = exchange((request, inject - INJECTABLE.keys()), group)
    unknown = sorted(set().union(*(names for _, names in answers)))
    if unknown:
        raise ValueError(
            f"inject ({', '.join(unknown)}) names no known failure, and would test nothing; "
            f"use {', '.join(INJECTABLE)}"
        )
    for rank, (other, _) in enumerate(answers):
        if other != answers[0][0]:
            raise TransportError(
                f"rank 0 asks for {answers[0][0]}, rank {rank} for {other}: a group has one "
                "transport; pass the same tier, kill switch and pool on all ranks"
            )


def _try_tiers(
    request: _Request, inject: Set[str], group: dist.ProcessGroup | None, device: torch.device
) -> tuple[SymmetricPool | None, Refusals]:
    """Symmetric memory if any tier may use it, and why tiers are closed; the same on all ranks."""
    everyone = range(group_size(group))
    refusals: Refusals = {}
    for tier in Tier:
        refusal = refused_by_request(tier, request.tier, request.kill_switch)
        if refusal is not None:
            refusals[tier] = dict.fromkeys(everyone, refusal)
    if Tier.P2P in refusals:
        return None, refusals
    pool, by_rank = acquire_pool(request.pool, group, device, inject)
    if pool is None:
        return None, {Tier.NVLS: by_rank, Tier.P2P: by_rank} | refusals
    if Tier.NVLS not in refusals:
        multicast_ptr = 0 if "multicast" in inject else pool.memory.multicast_ptr
        emulate = request.tier is Tier.NVLS and "multicast" not in inject
        by_rank = vote(refused_multicast(device, multicast_ptr, emulate=emulate), group)
        if by_rank:
            refusals[Tier.NVLS] = by_rank
    return pool, refusals
