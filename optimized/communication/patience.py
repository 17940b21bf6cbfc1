"""How long kernels wait for peers, and how the host hears of a wait in vain.

A kernel that waits for a rank that has died would wait for ever, and keep its GPU.  So after
``PATIENCE_SECONDS`` it gives up: it says so in two words of memory and ends, with garbage for a
result.  One word is the device's own; every later wait of this rank sees it and ends at once, so
that a graph of many collectives does not wait many times.  The other is the host's, which reads it
without waiting for the device: before the next collective or replay, and after a synchronisation.
Every rank that waits for the missing one gives up by itself, and those that wait for them likewise.
"""

import ctypes
from collections.abc import Sequence

import torch

from twinmoe.optimized.communication.errors import PeerTimeout

#: As long as NCCL and gloo may wait where nobody says otherwise, and longer than compiling takes.
PATIENCE_SECONDS = 600.0


class Patience:
    """What the waiting kernels of one rank and its host share."""

    def __init__(self, device: torch.device) -> None:
        self._seconds = PATIENCE_SECONDS
        #: 0, or 1 + the first rank that did not arrive: for kernels, and for the host.
        self._given_up = torch.zeros(1, dtype=torch.int32, device=device)
        self._missing = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        # Read past PyTorch, for which a read by the host has no place in a capture.
        self._host_word = ctypes.c_int32.from_address(self._missing.data_ptr())

    def table(self, signal_pads: Sequence[int]) -> torch.Tensor:
        """Addresses of all ranks' pads and of both words, and nanoseconds: int64 [R + 3]."""
        words = (self._given_up, self._missing)
        entries = [*signal_pads, *(word.data_ptr() for word in words), int(self._seconds * 1e9)]
        return torch.tensor(entries, device=self._given_up.device)

    def check(self, rank: int) -> None:
        """Raise `PeerTimeout` if a kernel of this ``rank`` has given up; never waits."""
        if missing := self._host_word.value:
            raise PeerTimeout(
                f"rank {rank} timed out waiting for rank {missing - 1}, which did not arrive at a "
                f"barrier within {self._seconds:g} s: it died, hangs or went another way, and what "
                "came out since is garbage; end all ranks, or release the pools and build the "
                "layers again"
            )
