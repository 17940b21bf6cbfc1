"""Memory that every rank of a group can address: what a kernel needs to know of it.

Allocation and rendezvous are two steps, so that a rank whose allocation failed can say so
before its peers wait for it in the rendezvous.
"""

from typing import Protocol

import torch
import torch.distributed as dist

from twinmoe.optimized.communication.patience import Patience


class SymmetricMemory(Protocol):
    """One buffer and one signal pad per rank, all mapped into this process."""

    rank: int
    world_size: int
    #: This rank's buffer, uint8.
    buffer: torch.Tensor
    #: Base addresses of all ranks' buffers, int64 [R], on the device.
    buffer_ptrs: torch.Tensor
    #: This rank's signal pad, int32; zero at first.
    signal_pad: torch.Tensor
    #: How long its kernels wait for peers, and whether they gave up.
    patience: Patience
    #: Base addresses of all ranks' signal pads, and ``patience``'s, int64 [R + 3], on the device.
    signal_pad_ptrs: torch.Tensor
    #: Address at which a multicast store reaches all buffers; 0 if there is none.
    multicast_ptr: int

    def close(self) -> None:
        """Let go of the mapping; memory is freed with the last tensor that views it."""


class SymmetricAllocation(Protocol):
    """One rank's share of a symmetric memory, not yet known to its peers."""

    def rendezvous(self, group: dist.ProcessGroup | None) -> SymmetricMemory:
        """Map all ranks' shares; a collective over ``group``, called once, by all ranks."""

    def seal(self) -> None:
        """Nobody else will map this share: called once all ranks have, or have given up."""
