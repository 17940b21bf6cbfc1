"""All-gather of several tensors at once: one launch, one barrier.

Every rank pushes its slice of each tensor into all ranks' buffers, then meets its peers at a
barrier.  Pushing (rather than pulling) is what ``multimem.st`` does through the switch: one
store leaves the GPU, R arrive.  For the few rows of a decode step the launch and the barrier
are the whole cost, so the three tensors of a token dispatch travel together.

The barrier stands at the END: when the kernel is over, all slices of all ranks are there.
Nothing stands at the start; see ``order.py`` for when that is safe, and for
``leading_barrier``, which makes it safe otherwise.
"""

from collections.abc import Sequence

import torch

from twinmoe.optimized.communication.barrier import signal_pad_barrier
from twinmoe.optimized.communication.multimem import Leaf, store_to_all
from twinmoe.optimized.communication.packing import PackedTensor, as_words, block_lanes
from twinmoe.optimized.communication.symmetric_memory import SymmetricMemory
from twinmoe.optimized.launch import run
from twinmoe.optimized.triton_runtime import INTERPRETED, tl, triton

#: Least and most lanes that a CTA moves at once: one to four for each of 128 threads.  The
#: interpreter pays per operation, not per element: as few steps as possible, nothing idle.
_BLOCK_BOUNDS = (1, 8192) if INTERPRETED else (128, 512)


@triton.jit
def all_gather_kernel(
    sources, offsets, num_lanes, buffer_ptrs, signal_pad_ptrs, multicast_ptr, rank,
    WORDS: tl.constexpr, BLOCKS: tl.constexpr, WORLD: tl.constexpr, THREADS: tl.constexpr,
    LEAF: tl.constexpr, LEADING_BARRIER: tl.constexpr,
):  # fmt: skip
    """Push lanes of ``sources[i]`` to byte ``offsets[i]`` of all buffers, for every tensor i."""
    if LEADING_BARRIER:
        signal_pad_barrier(
            signal_pad_ptrs, rank, WORLD, THREADS,
            has_previous_access=True, has_subsequent_access=True,
        )  # fmt: skip
    for i in tl.static_range(len(sources)):
        _push(
            sources[i], offsets[i], num_lanes[i], buffer_ptrs, multicast_ptr, rank,
            WORDS[i], BLOCKS[i], WORLD, LEAF,
        )  # fmt: skip
    signal_pad_barrier(
        signal_pad_ptrs, rank, WORLD, THREADS, has_previous_access=True, has_subsequent_access=True
    )


@triton.jit
def _push(
    source, offset, num_lanes, buffer_ptrs, multicast_ptr, rank,
    WORDS: tl.constexpr, BLOCK: tl.constexpr, WORLD: tl.constexpr, LEAF: tl.constexpr,
):  # fmt: skip
    for start in range(tl.program_id(0) * BLOCK, num_lanes, tl.num_programs(0) * BLOCK):
        lane = start + tl.arange(0, BLOCK)
        live = lane < num_lanes
        word = lane[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
        value = tl.load(source + word, mask=live[:, None], other=0)
        store_to_all(value, offset, lane, word, live, buffer_ptrs, multicast_ptr, rank, WORLD, LEAF)


def all_gather(
    memory: SymmetricMemory,
    region_offset: int,
    sources: Sequence[torch.Tensor],
    packed: Sequence[PackedTensor],
    *,
    leaf: Leaf,
    num_ctas: int,
    leading_barrier: bool,
    name: str,
) -> None:
    """Gather ``sources`` into every rank's buffer, at ``region_offset`` plus their packed offsets.

    ``sources`` are contiguous [n, ...], the same shapes on every rank, in ``memory``'s device;
    afterwards rank r's slice of tensor i lies at ``packed[i].offset + r * slice_bytes``.
    """
    words = tuple(as_words(source, slot) for source, slot in zip(sources, packed, strict=True))
    offsets = tuple(region_offset + slot.offset + memory.rank * slot.slice_bytes for slot in packed)
    lanes = tuple(slot.num_lanes for slot in packed)
    constants = {
        "WORDS": tuple(slot.words_per_lane for slot in packed),
        "BLOCKS": tuple(block_lanes(count, num_ctas, _BLOCK_BOUNDS) for count in lanes),
        "WORLD": memory.world_size,
        "THREADS": triton.next_power_of_2(memory.world_size),
        "LEAF": int(leaf),
        "LEADING_BARRIER": leading_barrier,
    }
    run(
        name,
        lambda: all_gather_kernel[(num_ctas,)](
            words,
            offsets,
            lanes,
            memory.buffer_ptrs,
            memory.signal_pad_ptrs,
            memory.multicast_ptr,
            memory.rank,
            **constants,
        ),
    )
