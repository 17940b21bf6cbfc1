"""Reduce-scatter: each rank sums its own rows over all ranks' partial results, in fp32.

Every rank pulls its rows of every rank's buffer.  With ``multimem.ld_reduce`` the switch
adds on the way and one sum arrives; peer-to-peer reads R times and adds in rank order 0..R-1,
so that its result is the same bits on every call.

The barrier stands at the START, and acquires: rows may be read once their writers have
arrived.  Nothing stands at the end; see ``order.py`` for when that is safe.
"""

import torch

from twinmoe.optimized.communication.barrier import signal_pad_barrier
from twinmoe.optimized.communication.multimem import Leaf, fence_aliases, load_bases, sum_from_all
from twinmoe.optimized.communication.packing import LaunchShape, PackedTensor
from twinmoe.optimized.communication.symmetric_memory import SymmetricMemory
from twinmoe.optimized.launch import run, sizes
from twinmoe.optimized.triton_runtime import INTERPRETED, tl, triton

#: What a partial result may be stored as; all are summed in fp32.
WIRE_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

#: Warps of a CTA that has much to sum, by the bytes of an element: a 16-byte lane is 4 or 8 sums
#: held in registers.
_WARPS = {4: 16, 2: 8}
_LANES_PER_THREAD = 2

#: Least and most lanes of a step in the interpreter, which pays by the operation: few steps.
_BLOCK_BOUNDS = (1, 4096)


@triton.jit
def reduce_scatter_kernel(
    out, offset, num_lanes, buffer_ptrs, signal_pad_ptrs, multicast_ptr, rank,
    DTYPE: tl.constexpr, ELEMENTS: tl.constexpr, BLOCK: tl.constexpr,
    WORLD: tl.constexpr, THREADS: tl.constexpr, LEAF: tl.constexpr,
):  # fmt: skip
    """Sum ``num_lanes`` lanes at byte ``offset`` of all buffers into fp32 ``out``."""
    # Before the wait, not after it: addresses never change, and loading them takes its time.
    bases = load_bases(buffer_ptrs, WORLD, THREADS)
    fence_aliases(LEAF)  # partial results were written at this rank's own address
    signal_pad_barrier(signal_pad_ptrs, rank, WORLD, THREADS)
    fence_aliases(LEAF)  # and are read through the switch
    for start in range(tl.program_id(0) * BLOCK, num_lanes, tl.num_programs(0) * BLOCK):
        lane = start + tl.arange(0, BLOCK)
        live = lane < num_lanes
        element = lane[:, None] * ELEMENTS + tl.arange(0, ELEMENTS)[None, :]
        total = sum_from_all(
            offset, lane, element, live, bases, multicast_ptr, rank, DTYPE, WORLD, LEAF
        )
        tl.store(out + element, total, mask=live[:, None])


def reduce_scatter(
    memory: SymmetricMemory,
    region_offset: int,
    out: torch.Tensor,
    packed: PackedTensor,
    dtype: torch.dtype,
    *,
    leaf: Leaf,
    num_ctas: int,
    name: str,
) -> None:
    """Sum this rank's slice of all ranks' partials of ``dtype`` into ``out``, fp32 [n, H].

    Partials lie at ``region_offset``, R slices of ``packed.slice_bytes`` each.
    """
    offset = region_offset + packed.offset + memory.rank * packed.slice_bytes
    shape = LaunchShape(num_ctas, 1, _BLOCK_BOUNDS)
    if not INTERPRETED:
        shape = LaunchShape.choose(
            packed.num_lanes, num_ctas, _WARPS[dtype.itemsize], _LANES_PER_THREAD
        )
    constants = {
        "DTYPE": WIRE_DTYPES[dtype],
        "ELEMENTS": packed.lane_bytes // dtype.itemsize,
        "BLOCK": shape.block_lanes(packed.num_lanes),
        "WORLD": memory.world_size,
        "THREADS": triton.next_power_of_2(memory.world_size),
        "LEAF": int(leaf),
        "num_warps": shape.num_warps,
    }
    run(
        name,
        lambda: reduce_scatter_kernel[(shape.num_ctas,)](
            out,
            offset,
            packed.num_lanes,
            memory.buffer_ptrs,
            memory.signal_pad_ptrs,
            memory.multicast_ptr,
            memory.rank,
            **constants,
        ),
        f"{sizes(out)} from {str(dtype)[6:]} on {shape.num_ctas} programs",
    )
