"""One symmetric allocation per group and kind of parallelism, shared by all layers.

Layers run one after another, so one buffer of the largest layer's size serves them all.
It holds two disjoint regions, because all-gather and reduce-scatter protect each other's
region, never their own (see ``order.py``); a few unused bytes lie around each, so that a stray
store is found by a test instead of corrupting the neighbour.
"""

import itertools
from dataclasses import dataclass

import torch

from twinmoe.optimized.communication.errors import SymmetricBufferOverflow, TransportError
from twinmoe.optimized.communication.order import CollectiveOrder
from twinmoe.optimized.communication.packing import pack, round_up
from twinmoe.optimized.communication.symmetric_memory import SymmetricMemory

#: Unused bytes before, between and after the regions.
GUARD_BYTES = 256

#: What guards hold; a store of zeros or of NaN changes it.
_GUARD_PATTERN = 0xA5

#: Every byte of a NaN, in all floating-point formats that travel.
_POISON = 0xFF

#: No two memories of a process have one number, those of released pools included.
_generations = itertools.count(1)


@dataclass(frozen=True)
class Capacity:
    """Bytes per rank that a pool must offer."""

    all_gather_bytes: int
    reduce_scatter_bytes: int

    @classmethod
    def for_moe(
        cls,
        *,
        tokens_per_rank: int,
        hidden_size: int,
        num_experts_per_tok: int,
        world_size: int,
        dtype: torch.dtype,
        wire_dtype: torch.dtype = torch.float32,
    ) -> "Capacity":
        """Size a layer's needs: int32 ids, fp32 weights and ``dtype`` rows in, partial sums out."""
        routing = 4 * tokens_per_rank * num_experts_per_tok
        hidden = tokens_per_rank * hidden_size
        _, gathered = pack([routing, routing, hidden * dtype.itemsize], world_size)
        return cls(gathered, round_up(hidden * wire_dtype.itemsize * world_size))

    def union(self, other: "Capacity") -> "Capacity":
        """Return the smallest capacity that serves both."""
        return Capacity(
            max(self.all_gather_bytes, other.all_gather_bytes),
            max(self.reduce_scatter_bytes, other.reduce_scatter_bytes),
        )

    @property
    def all_gather_offset(self) -> int:
        """Where the all-gather region starts in the buffer."""
        return GUARD_BYTES

    @property
    def reduce_scatter_offset(self) -> int:
        """Where the reduce-scatter region starts in the buffer."""
        return 2 * GUARD_BYTES + round_up(self.all_gather_bytes, GUARD_BYTES)

    @property
    def total_bytes(self) -> int:
        """Size of the buffer, guards included."""
        return self.reduce_scatter_offset + round_up(self.reduce_scatter_bytes) + GUARD_BYTES


class SymmetricPool:
    """The regions of one group's symmetric memory, and what was last done with them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._memory: SymmetricMemory | None = None

    def install(self, memory: SymmetricMemory, capacity: Capacity, num_ctas: int) -> None:
        """Move to ``memory``: layers that hold this pool use it from their next call on."""
        self._memory = memory
        #: Which memory this is: a graph captured on another one must not be replayed.
        self.generation = next(_generations)
        self.capacity = capacity
        self.num_ctas = num_ctas
        self.order = CollectiveOrder()
        for guard in self._guards():
            guard.fill_(_GUARD_PATTERN)
        #: Whether a captured graph holds addresses of this memory.
        self.captured = False

    @property
    def memory(self) -> SymmetricMemory:
        """The symmetric memory; raises `TransportError` once the pool is released."""
        if self._memory is None:
            raise TransportError(
                f"pool {self.name!r} was released: its memory is gone; select the transport again"
            )
        return self._memory

    def all_gather_region(self, num_bytes: int) -> int:
        """Offset of ``num_bytes`` to gather into; raises `SymmetricBufferOverflow`."""
        self._require("all-gather", num_bytes, self.capacity.all_gather_bytes)
        return self.capacity.all_gather_offset

    def reduce_scatter_region(self, num_bytes: int) -> int:
        """Offset of ``num_bytes`` of partial results; raises `SymmetricBufferOverflow`."""
        self._require("reduce-scatter", num_bytes, self.capacity.reduce_scatter_bytes)
        return self.capacity.reduce_scatter_offset

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """View this rank's buffer from ``offset`` on as a tensor."""
        num_bytes = dtype.itemsize * torch.Size(shape).numel()
        return self.memory.buffer[offset : offset + num_bytes].view(dtype).view(shape)

    def poison(self) -> None:
        """Fill both regions with NaN, whatever the dtype; no collective may be in flight."""
        capacity = self.capacity
        for start, size in (
            (capacity.all_gather_offset, capacity.all_gather_bytes),
            (capacity.reduce_scatter_offset, capacity.reduce_scatter_bytes),
        ):
            self.memory.buffer[start : start + size].fill_(_POISON)

    def trespassed(self) -> bool:
        """Whether a store has hit the bytes around the regions; waits for the device."""
        return any(bool((guard != _GUARD_PATTERN).any()) for guard in self._guards())

    def _guards(self) -> list[torch.Tensor]:
        capacity = self.capacity
        gathered_end = capacity.all_gather_offset + round_up(capacity.all_gather_bytes, GUARD_BYTES)
        summed_end = capacity.reduce_scatter_offset + round_up(capacity.reduce_scatter_bytes)
        buffer = self.memory.buffer
        return [
            buffer[: capacity.all_gather_offset],
            buffer[gathered_end : capacity.reduce_scatter_offset],
            buffer[summed_end : capacity.total_bytes],
        ]

    def close(self) -> None:
        """Release the memory; transports of this pool raise from now on."""
        if self._memory is not None:
            self._memory.close()
        self._memory = None
        self.generation = next(_generations)

    def _require(self, region: str, needed: int, available: int) -> None:
        if needed > available:
            raise SymmetricBufferOverflow(
                f"{region} needs {needed} bytes of symmetric memory but pool {self.name!r} has "
                f"{available}: it was sized for fewer tokens per rank or a smaller hidden size; "
                "select the transport with a larger capacity before capturing graphs"
            )
