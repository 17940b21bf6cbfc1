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

from twinmoe.optimized.communication.barrier import load_pads, meet
from twinmoe.optimized.communication.multimem import Leaf, fence_aliases, load_bases, store_to_all
from twinmoe.optimized.communication.packing import LaunchShape, PackedTensor, as_words
from twinmoe.optimized.communication.symmetric_memory import SymmetricMemory
from twinmoe.optimized.launch import run, sizes
from twinmoe.optimized.triton_runtime import INTERPRETED, tl, triton

#: Warps of a CTA that has much to move, and most lanes of its threads at once.
_WARPS, _LANES_PER_THREAD = 8, 4

#: Least and most lanes of a step in the interpreter, which pays by the operation: few steps.
_BLOCK_BOUNDS = (1, 8192)


@triton.jit
def all_gather_kernel(
    sources, offsets, num_lanes, first_ctas, buffer_ptrs, signal_pad_ptrs, multicast_ptr, rank,
    WORDS: tl.constexpr, BLOCKS: tl.constexpr, WORLD: tl.constexpr, THREADS: tl.constexpr,
    LEAF: tl.constexpr, LEADING_BARRIER: tl.constexpr,
):  # fmt: skip
    """Push lanes of ``sources[i]`` to byte ``offsets[i]`` of all buffers, for every tensor i.

    CTA ``first_ctas[i]`` starts with tensor i: small tensors travel side by side.
    """
    bases = load_bases(buffer_ptrs, WORLD, THREADS)
    pads, own_pad, epoch = load_pads(signal_pad_ptrs, rank, WORLD, THREADS)
    if LEADING_BARRIER:
        meet(pads, own_pad, epoch, signal_pad_ptrs, rank, WORLD, THREADS)
        epoch += 1
    for i in tl.static_range(len(sources)):
        _push(
            sources[i], offsets[i], num_lanes[i], first_ctas[i], bases, multicast_ptr, rank,
            WORDS[i], BLOCKS[i], WORLD, LEAF,
        )  # fmt: skip
    fence_aliases(LEAF)  # peers read the rows at their own addresses
    meet(pads, own_pad, epoch, signal_pad_ptrs, rank, WORLD, THREADS)


@triton.jit
def _push(
    source, offset, num_lanes, first_cta, bases, multicast_ptr, rank,
    WORDS: tl.constexpr, BLOCK: tl.constexpr, WORLD: tl.constexpr, LEAF: tl.constexpr,
):  # fmt: skip
    turn = (tl.program_id(0) + tl.num_programs(0) - first_cta) % tl.num_programs(0)
    for start in range(turn * BLOCK, num_lanes, tl.num_programs(0) * BLOCK):
        lane = start + tl.arange(0, BLOCK)
        live = lane < num_lanes
        word = lane[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
        value = tl.load(source + word, mask=live[:, None], other=0)
        store_to_all(value, offset, lane, word, live, bases, multicast_ptr, rank, WORLD, LEAF)


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
    shape = LaunchShape(num_ctas, 1, _BLOCK_BOUNDS)
    if not INTERPRETED:
        shape = LaunchShape.choose(sum(lanes), num_ctas, _WARPS, _LANES_PER_THREAD)
    blocks = tuple(shape.block_lanes(count) for count in lanes)
    constants = {
        "WORDS": tuple(slot.words_per_lane for slot in packed),
        "BLOCKS": blocks,
        "WORLD": memory.world_size,
        "THREADS": triton.next_power_of_2(memory.world_size),
        "LEAF": int(leaf),
        "LEADING_BARRIER": leading_barrier,
        "num_warps": shape.num_warps,
    }
    run(
        name,
        lambda: all_gather_kernel[(shape.num_ctas,)](
            words,
            offsets,
            lanes,
            _first_ctas(lanes, blocks, shape.num_ctas),
            memory.buffer_ptrs,
            memory.signal_pad_ptrs,
            memory.multicast_ptr,
            memory.rank,
            **constants,
        ),
        f"{sizes(*sources)} on {shape.num_ctas} programs",
    )


def _first_ctas(lanes: Sequence[int], blocks: Sequence[int], num_ctas: int) -> tuple[int, ...]:
    """The CTA behind the last one that the tensors before keep busy."""
    firsts, taken = [], 0
    for count, block in zip(lanes, blocks, strict=True):
        firsts.append(taken % num_ctas)
        taken += -(-count // block)
    return tuple(firsts)
