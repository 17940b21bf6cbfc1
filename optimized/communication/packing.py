"""How bytes are cut into lanes, and how tensors lie next to each other in a region.

A *lane* is what one thread moves at once: 16, 8, 4, 2 or 1 bytes.  Everything here
is a pure function of shapes, hence the same on all ranks: a layout that depended on
one rank's pointers would send its peers to another address.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

#: Region starts and tensors inside a region are aligned to the widest lane.
ALIGNMENT = 16

#: The narrowest lane that the multicast instructions are used with (64 bits).
MIN_MULTICAST_LANE_BYTES = 8

#: Below this many CTAs there is nothing left to win: their barriers run side by side.
MIN_CTAS = 8

#: The integer whose copies move a lane's bits; 16-byte lanes are two 8-byte words.
_WORD_DTYPES = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def round_up(num_bytes: int, alignment: int = ALIGNMENT) -> int:
    """Smallest multiple of ``alignment`` that holds ``num_bytes``."""
    return -(-num_bytes // alignment) * alignment


def lane_bytes(num_bytes: int) -> int:
    """Widest lane that cuts slices of ``num_bytes``, laid end to end, without a remainder."""
    return next(width for width in (16, 8, 4, 2, 1) if num_bytes % width == 0)


@dataclass(frozen=True)
class PackedTensor:
    """Where one gathered tensor lies: R slices of ``slice_bytes``, end to end, from ``offset``."""

    offset: int
    slice_bytes: int

    @property
    def lane_bytes(self) -> int:
        """Width of a lane."""
        return lane_bytes(self.slice_bytes)

    @property
    def num_lanes(self) -> int:
        """Lanes in one rank's slice."""
        return self.slice_bytes // self.lane_bytes

    @property
    def words_per_lane(self) -> int:
        """Words (of at most 64 bits) in a lane."""
        return max(1, self.lane_bytes // 8)

    @property
    def word_dtype(self) -> torch.dtype:
        """Integer type of a word."""
        return _WORD_DTYPES[min(8, self.lane_bytes)]


def pack(slice_bytes: Sequence[int], world_size: int) -> tuple[tuple[PackedTensor, ...], int]:
    """Lay gathered tensors side by side, each 16-byte aligned; return them and the total bytes."""
    packed, offset = [], 0
    for num_bytes in slice_bytes:
        packed.append(PackedTensor(offset, num_bytes))
        offset += round_up(num_bytes * world_size)
    return tuple(packed), offset


@dataclass(frozen=True)
class LaunchShape:
    """How a collective of some size is spread over a GPU: the same on all ranks, by shapes alone.

    ``bounds``: least and most lanes that a CTA moves at once.
    """

    num_ctas: int
    num_warps: int
    bounds: tuple[int, int]

    @classmethod
    def choose(
        cls, num_lanes: int, most_ctas: int, num_warps: int, lanes_per_thread: int
    ) -> "LaunchShape":
        """A few CTAs for a decode step, whose cost is the barrier; all of them for much data.

        Links are filled by bytes in flight: wide CTAs of ``num_warps`` with several lanes in
        every thread, the best of a sweep on four H200s (docs/h200.md).
        """
        if num_lanes <= most_ctas * 128:
            num_warps = 4
        threads = 32 * num_warps
        num_ctas = min(most_ctas, max(MIN_CTAS, -(-num_lanes // threads)))
        return cls(num_ctas, num_warps, (threads, threads * lanes_per_thread))

    def block_lanes(self, num_lanes: int) -> int:
        """Lanes that a CTA takes at once: a power of two in bounds that keeps all CTAs busy."""
        share = -(-num_lanes // self.num_ctas)
        narrowest, widest = self.bounds
        return max(narrowest, min(widest, 1 << max(0, share - 1).bit_length()))


def as_words(tensor: torch.Tensor, packed: PackedTensor) -> torch.Tensor:
    """View a contiguous tensor as flat words, by way of a copy where it starts off a lane boundary.

    An offset view (a slice of a larger tensor) may start anywhere.  The copy is this
    rank's own affair: lanes and addresses in symmetric memory stay those of the shape.
    """
    start = tensor.storage_offset() * tensor.element_size()
    if start % packed.lane_bytes or tensor.data_ptr() % packed.lane_bytes:
        tensor = tensor.clone()
    return tensor.view(-1).view(torch.uint8).view(packed.word_dtype)
