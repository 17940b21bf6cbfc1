"""Making, growing, finding and releasing pools: by all ranks of a group together."""

import weakref
from collections.abc import Set
from dataclasses import dataclass

import torch
import torch.distributed as dist

from twinmoe.optimized.communication import cpu_symmetric_memory, cuda_symmetric_memory
from twinmoe.optimized.communication.agreement import attempt, exchange, group_size, vote
from twinmoe.optimized.communication.barrier import signal_pad_bytes
from twinmoe.optimized.communication.eligibility import INJECTABLE, Refusal
from twinmoe.optimized.communication.errors import SymmetricBufferOverflow
from twinmoe.optimized.communication.pool import Capacity, SymmetricPool
from twinmoe.optimized.communication.symmetric_memory import SymmetricAllocation, SymmetricMemory
from twinmoe.optimized.triton_runtime import kernels_run_on


class _SingleRank:
    """Stands for "no group" among the keys."""


_SINGLE_RANK = _SingleRank()

#: Keyed by the group itself, weakly: an id or a name may be reused after a group's death.
_pools: weakref.WeakKeyDictionary[dist.ProcessGroup | _SingleRank, dict[str, SymmetricPool]] = (
    weakref.WeakKeyDictionary()
)


@dataclass(frozen=True)
class PoolRequest:
    """What a rank asks for; equal on all ranks."""

    name: str
    capacity: Capacity
    num_ctas: int


def acquire_pool(
    request: PoolRequest,
    group: dist.ProcessGroup | None,
    device: torch.device,
    inject: Set[str] = frozenset(),
) -> tuple[SymmetricPool | None, dict[int, Refusal]]:
    """Find or make a pool that serves ``request``: all ranks get one, or all get the refusals.

    A collective over ``group``.  A pool that is too small is replaced by one that serves old and
    new needs; if a captured graph holds its addresses, `SymmetricBufferOverflow` is raised on all
    ranks instead.
    """
    pools = _pools.setdefault(_SINGLE_RANK if group is None else group, {})
    pool = pools.get(request.name)
    wanted, grow = _agree_on_size(request, pool, group)
    refusals = vote(_refused_locally(wanted, group, device, inject, allocate=grow), group)
    memory = None
    if grow and not refusals:
        memory, refusals = _allocate(wanted, group, device)
    if not refusals:
        staged = INJECTABLE["rendezvous"] if "rendezvous" in inject else None
        refusals = vote(staged, group)
    if refusals:
        if memory is not None:
            memory.close()
        return None, refusals
    if pool is None:
        pool = pools[wanted.name] = SymmetricPool(wanted.name)
    if memory is not None:
        pool.install(memory, wanted.capacity, wanted.num_ctas)
    return pool, {}


def pools_of(group: dist.ProcessGroup | None) -> list[SymmetricPool]:
    """Return the pools that this rank holds of ``group`` (None: of a single rank)."""
    return list(_pools.get(_SINGLE_RANK if group is None else group, {}).values())


def release_pools(group: dist.ProcessGroup | None) -> None:
    """Free all symmetric memory of ``group`` on this rank.

    Not a collective, so that a failed run can release too.  Call it when no rank has a collective
    in flight; captured graphs that used the pools must not be replayed.
    """
    for pool in _pools.pop(_SINGLE_RANK if group is None else group, {}).values():
        pool.close()


def _agree_on_size(
    request: PoolRequest, pool: SymmetricPool | None, group: dist.ProcessGroup | None
) -> tuple[PoolRequest, bool]:
    """Widen ``request`` to what any rank's pool already serves; say whether memory must be made.

    Offsets follow from the size, so all ranks need the same one, even if one of them has
    released its pool.  Raises on all ranks if a graph forbids the move.
    """
    served = PoolRequest(request.name, pool.capacity, pool.num_ctas) if pool else None
    answers = exchange((served, pool is not None and pool.captured), group)
    wanted = request
    for other, _ in answers:
        if other is not None:
            wanted = PoolRequest(
                request.name,
                wanted.capacity.union(other.capacity),
                max(wanted.num_ctas, other.num_ctas),
            )
    grow = any(other != wanted for other, _ in answers)
    if grow and any(captured for _, captured in answers):
        available = pool.capacity.total_bytes if pool else 0
        raise SymmetricBufferOverflow(
            f"pool {wanted.name!r} needs {wanted.capacity.total_bytes} bytes but has {available}, "
            "and may not grow: captured graphs hold its addresses; select the transports of all "
            "layers before capturing, or release_pools() and capture again"
        )
    return wanted, grow


def _refused_locally(
    request: PoolRequest,
    group: dist.ProcessGroup | None,
    device: torch.device,
    inject: Set[str],
    *,
    allocate: bool,
) -> Refusal | None:
    for step in ("symmetric_memory", "buffer", "signal_pad"):
        if step in inject:
            return INJECTABLE[step]
    if not kernels_run_on(device):
        return Refusal.SYMMETRIC_MEMORY_UNAVAILABLE
    if not allocate:
        return None
    pad_bytes = signal_pad_bytes(request.num_ctas, group_size(group))

    def check() -> Refusal | None:
        if device.type == "cpu":
            # The pad is allocated along with the buffer, as large as it has to be.
            fits = (
                request.capacity.total_bytes + pad_bytes <= cpu_symmetric_memory.available_bytes()
            )
            return None if fits else Refusal.BUFFER_TOO_SMALL
        if request.capacity.total_bytes > cuda_symmetric_memory.available_bytes(device):
            return Refusal.BUFFER_TOO_SMALL
        if pad_bytes > cuda_symmetric_memory.available_signal_pad_bytes():
            return Refusal.SIGNAL_PAD_TOO_SMALL
        return None

    refusal, failure = attempt(check, Refusal.SYMMETRIC_MEMORY_UNAVAILABLE, group)
    return failure or refusal


def _allocate(
    request: PoolRequest, group: dist.ProcessGroup | None, device: torch.device
) -> tuple[SymmetricMemory | None, dict[int, Refusal]]:
    def allocate() -> SymmetricAllocation:
        num_bytes = request.capacity.total_bytes
        if device.type == "cpu":
            pad_bytes = signal_pad_bytes(request.num_ctas, group_size(group))
            return cpu_symmetric_memory.CpuSymmetricAllocation(num_bytes, pad_bytes)
        return cuda_symmetric_memory.CudaSymmetricAllocation(num_bytes, device)

    allocation, failure = attempt(allocate, Refusal.SYMMETRIC_MEMORY_UNAVAILABLE, group)
    try:
        refusals = vote(failure, group)
        if refusals or allocation is None:
            return None, refusals
        memory, failure = attempt(
            lambda: allocation.rendezvous(group), Refusal.RENDEZVOUS_FAILED, group
        )
        refusals = vote(failure, group)
    finally:
        if allocation is not None:
            allocation.seal()
    if refusals and memory is not None:
        memory.close()
    return (None if refusals else memory), refusals
