"""Symmetric memory between GPUs: a thin wrapper of ``torch.distributed._symmetric_memory``."""

import os
from typing import Any

import torch
import torch.distributed as dist

from twinmoe.optimized.communication.packing import round_up
from twinmoe.optimized.communication.patience import Patience
from twinmoe.optimized.communication.setups import set_up


def multicast_disabled() -> bool:
    """Whether the environment forbids multicast; this package never lifts that."""
    return os.environ.get("TORCH_SYMM_MEM_DISABLE_MULTICAST", "0") not in ("", "0")


def available_bytes(device: torch.device) -> int:
    """Memory that is free on ``device``."""
    return torch.cuda.mem_get_info(device)[0]


def available_signal_pad_bytes() -> int:
    """Size of the signal pad that comes with every symmetric allocation."""
    # Imported where it is needed: CPU builds of torch may lack it.
    from torch.distributed import _symmetric_memory as symm_mem  # noqa: PLC0415

    return int(symm_mem.get_signal_pad_size())


class CudaSymmetricAllocation:
    """A buffer on this rank's GPU that peers can map."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        from torch.distributed import _symmetric_memory as symm_mem  # noqa: PLC0415

        self._rendezvous = symm_mem.rendezvous
        set_up("symmetric allocation")
        self._tensor = symm_mem.empty(round_up(num_bytes), dtype=torch.uint8, device=device)

    def rendezvous(
        self, group: dist.ProcessGroup | None
    ) -> "CudaSymmetricMemory | SingleGpuMemory":
        """Exchange handles with the peers; without a group there are none."""
        if group is None:
            return SingleGpuMemory(self._tensor)
        set_up("rendezvous")
        return CudaSymmetricMemory(self._tensor, self._rendezvous(self._tensor, group))

    def seal(self) -> None:
        """Nothing to remove: handles have no names."""


class CudaSymmetricMemory:
    """The buffers of all GPUs, mapped; see `SymmetricMemory`."""

    def __init__(self, tensor: torch.Tensor, handle: Any) -> None:
        if handle.buffer_ptrs[handle.rank] != tensor.data_ptr():
            raise RuntimeError(
                f"the allocation starts {tensor.data_ptr() - handle.buffer_ptrs[handle.rank]} "
                "bytes into its segment: peers' addresses would be off by as much"
            )
        self.rank: int = handle.rank
        self.world_size: int = handle.world_size
        self.buffer = tensor
        pad_words = handle.signal_pad_size // 4
        self.signal_pad: torch.Tensor = handle.get_signal_pad(self.rank, (pad_words,), torch.int32)
        self.buffer_ptrs = torch.tensor(handle.buffer_ptrs, device=tensor.device)
        self.patience = Patience(tensor.device)
        self.signal_pad_ptrs = self.patience.table(handle.signal_pad_ptrs)
        self.multicast_ptr: int = 0 if multicast_disabled() else int(handle.multicast_ptr or 0)
        self._handle = handle
        # A segment from torch's pool may carry the epochs of its previous life.
        self.signal_pad.zero_()
        torch.cuda.synchronize(tensor.device)

    def close(self) -> None:
        """Return the buffer to torch's pool once no view of it is left."""
        self._handle = None
        self.buffer = self.buffer.new_empty(0)
        self.signal_pad = self.signal_pad.new_empty(0)


class SingleGpuMemory:
    """The memory of a rank that is its own only peer; see `SymmetricMemory`."""

    rank = 0
    world_size = 1
    multicast_ptr = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self.buffer = tensor
        words = available_signal_pad_bytes() // 4
        self.signal_pad = torch.zeros(words, dtype=torch.int32, device=tensor.device)
        self.buffer_ptrs = torch.tensor([tensor.data_ptr()], device=tensor.device)
        self.patience = Patience(tensor.device)
        self.signal_pad_ptrs = self.patience.table([self.signal_pad.data_ptr()])

    def close(self) -> None:
        """Let go of the memory."""
        self.buffer = self.buffer.new_empty(0)
        self.signal_pad = self.signal_pad.new_empty(0)
