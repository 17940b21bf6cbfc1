"""Symmetric memory between processes of one host: POSIX shared memory.

The file under /dev/shm has a name only until all ranks have mapped it.  From then on the
kernel frees it with its last process, however that one ends.
"""

import mmap
import os
import uuid
from pathlib import Path

import torch
import torch.distributed as dist

from twinmoe.optimized.communication.agreement import exchange, group_rank, group_size
from twinmoe.optimized.communication.packing import round_up
from twinmoe.optimized.communication.patience import Patience
from twinmoe.optimized.communication.setups import set_up

_FOLDER = Path("/dev/shm")


def available_bytes() -> int:
    """Shared memory that is free on this host."""
    stats = os.statvfs(_FOLDER)
    return stats.f_bavail * stats.f_frsize


class CpuSymmetricAllocation:
    """A named shared-memory file of this rank, created with all its pages reserved."""

    def __init__(self, num_bytes: int, signal_pad_bytes: int) -> None:
        set_up("symmetric allocation")
        self._num_bytes = num_bytes
        self._signal_pad_bytes = signal_pad_bytes
        self._pad_offset = round_up(num_bytes, mmap.PAGESIZE)
        self._path = _FOLDER / f"twinmoe-{os.getpid()}-{uuid.uuid4().hex}"
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            # Reserved now: a full /dev/shm is an error here, not a SIGBUS in a kernel later.
            os.posix_fallocate(descriptor, 0, self._pad_offset + signal_pad_bytes)
        except OSError:
            self.seal()
            raise
        finally:
            os.close(descriptor)

    def rendezvous(self, group: dist.ProcessGroup | None) -> "CpuSymmetricMemory":
        """Tell the peers this file's name, and map all of theirs."""
        if group is not None:
            set_up("rendezvous")
        paths = exchange(self._path, group)
        buffers, pads = zip(*(self._map(path) for path in paths), strict=True)
        return CpuSymmetricMemory(group_rank(group), group_size(group), buffers, pads)

    def seal(self) -> None:
        """Remove the name; mappings stay."""
        self._path.unlink(missing_ok=True)

    def _map(self, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
        with path.open("r+b") as file:
            mapping = mmap.mmap(file.fileno(), self._pad_offset + self._signal_pad_bytes)
        buffer = torch.frombuffer(mapping, dtype=torch.uint8, count=self._num_bytes)
        pad = torch.frombuffer(
            mapping,
            dtype=torch.int32,
            offset=self._pad_offset,
            count=self._signal_pad_bytes // 4,
        )
        return buffer, pad


class CpuSymmetricMemory:
    """The files of all ranks, mapped; see `SymmetricMemory`."""

    multicast_ptr = 0

    def __init__(
        self,
        rank: int,
        world_size: int,
        buffers: tuple[torch.Tensor, ...],
        signal_pads: tuple[torch.Tensor, ...],
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.buffer = buffers[rank]
        self.signal_pad = signal_pads[rank]
        self.buffer_ptrs = torch.tensor([buffer.data_ptr() for buffer in buffers])
        self.patience = Patience(self.buffer.device)
        self.signal_pad_ptrs = self.patience.table([pad.data_ptr() for pad in signal_pads])
        # The peers' tensors keep their mappings alive while kernels use the bare addresses.
        self._mapped = (buffers, signal_pads)

    def close(self) -> None:
        """Let go of all mappings but those that a tensor still views."""
        self._mapped = ((), ())
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self.signal_pad = torch.empty(0, dtype=torch.int32)


def remove_leftovers(pid: int) -> None:
    """Remove the names that process ``pid`` left behind when it was killed during a rendezvous."""
    for path in _FOLDER.glob(f"twinmoe-{pid}-*"):
        path.unlink(missing_ok=True)
