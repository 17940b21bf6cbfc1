"""The signal-pad barrier: every rank's CTA c waits for CTA c of all ranks.

Each rank owns a signal pad that its peers can write: row ``cta`` has a slot for every
rank, and one for the row's own epoch.  To pass, a rank writes its next epoch into its slot
on every peer's pad, one thread per peer, and waits until all slots of its own row have
reached that epoch.  Epochs only grow (and wrap), so nothing is reset, and a replayed graph
continues where the last launch stopped.  A wait in vain ends, see ``patience.py``.

Same grid on every rank: a CTA without work takes part all the same.
"""

import time
from typing import Any

from twinmoe.optimized.communication.symmetric_memory import SymmetricMemory
from twinmoe.optimized.launch import run
from twinmoe.optimized.triton_runtime import INTERPRETED, tl, triton


def signal_pad_bytes(num_ctas: int, world_size: int) -> int:
    """Bytes of signal pad that ``num_ctas`` CTAs need: int32 [num_ctas, world_size + 1]."""
    return 4 * num_ctas * (world_size + 1)


if INTERPRETED:
    #: With more ranks than cores, spinning takes its time from the very rank it waits for.  A look
    #: costs as much as the shortest pause, so pauses grow with the wait, up to the longest.
    _SHORTEST_S, _LONGEST_S = 3e-4, 4e-3

    def _pause(rounds: Any) -> None:
        """Let a peer have this core, after so many rounds in vain."""
        time.sleep(min(_LONGEST_S, _SHORTEST_S * (1 << min(int(rounds), 4))))

    def _nanoseconds() -> int:
        """A clock that never goes back."""
        return time.monotonic_ns()

else:

    @triton.jit
    def _pause(rounds) -> None:
        """On a GPU every rank has its own cores."""

    @triton.jit
    def _nanoseconds():
        """The GPU's wall clock."""
        return tl.extra.cuda.globaltimer()


#: Rounds of waiting between two looks at the clock: a wait that ends in good time has none.
_ROUNDS = tl.constexpr(16 if INTERPRETED else 1024)


@triton.jit
def signal_pad_barrier(signal_pad_ptrs, rank, WORLD: tl.constexpr, THREADS: tl.constexpr):
    """Meet this CTA's twins on all ranks; ``THREADS`` is WORLD rounded up to a power of two.

    What this rank wrote or read before, its earlier kernels included, is released to the peers;
    what they released may be read, and what they have finished reading may be overwritten, by all
    threads of this CTA.
    """
    pads, own_pad, epoch = load_pads(signal_pad_ptrs, rank, WORLD, THREADS)
    meet(pads, own_pad, epoch, signal_pad_ptrs, rank, WORLD, THREADS)


@triton.jit
def load_pads(signal_pad_ptrs, rank, WORLD: tl.constexpr, THREADS: tl.constexpr):
    """This CTA's row on all ranks' pads, [THREADS], on its own, and the last meeting's epoch.

    Two loads, one after the other: a kernel that has work before its barrier starts them first.
    """
    peer = tl.arange(0, THREADS)
    row = tl.program_id(0) * (WORLD + 1)
    pads = tl.load(signal_pad_ptrs + peer, mask=peer < WORLD, other=0)
    own_pad = tl.load(signal_pad_ptrs + rank).to(tl.pointer_type(tl.int32)) + row
    return pads.to(tl.pointer_type(tl.int32)) + row, own_pad, tl.load(own_pad + WORLD)


@triton.jit
def meet(
    pads, own_pad, epoch, signal_pad_ptrs, rank, WORLD: tl.constexpr, THREADS: tl.constexpr
):  # fmt: skip
    """`signal_pad_barrier` with what `load_pads` returned; the next epoch is one more."""
    peer = tl.arange(0, THREADS)
    is_peer = peer < WORLD
    epoch += 1
    # All threads have done their accesses, and have read the epoch that is overwritten below,
    # before the one thread per peer signals on behalf of all.
    tl.debug_barrier()
    tl.store(own_pad + WORLD, epoch)
    tl.atomic_xchg(pads + rank, epoch, mask=is_peer, sem="release", scope="sys")
    rounds = 0
    since = tl.full((), 0, tl.int64)
    given_up = 0
    while (tl.min(_ahead(own_pad + peer, epoch, is_peer)) < 0) & (given_up == 0):
        _pause(rounds)
        rounds += 1
        if rounds % _ROUNDS == 0:
            now = _nanoseconds()
            if rounds == _ROUNDS:
                since = now
            late = tl.where(_ahead(own_pad + peer, epoch, is_peer) < 0, peer, WORLD)
            given_up = _give_up(signal_pad_ptrs + WORLD, now - since, tl.min(late), WORLD)
    tl.debug_barrier()


@triton.jit
def _ahead(slots, epoch, is_peer):
    """By how many meetings each peer is ahead of this one; negative for those still awaited."""
    # An atomic: a plain load in a loop may be served from a cache forever.
    seen = tl.atomic_add(slots, 0, mask=is_peer, sem="acquire", scope="sys")
    # The difference is signed, so that epochs may wrap around.
    return tl.where(is_peer, seen - epoch, 0)


@triton.jit
def _give_up(patience_ptr, waited, late, WORLD: tl.constexpr):
    """Nonzero once this rank has given up; ``late`` is the first rank awaited, or WORLD.

    Threads read the clock one after another, and must not part over it: only what the atomic of
    one of them returns to all decides.
    """
    in_vain = (waited > tl.load(patience_ptr + 2)) & (late < WORLD)
    missing = tl.where(in_vain, late + 1, 0)
    word = tl.load(patience_ptr).to(tl.pointer_type(tl.int32))
    before = tl.atomic_max(word, missing, sem="relaxed", scope="gpu")
    on_host = tl.load(patience_ptr + 1).to(tl.pointer_type(tl.int32))
    tl.store(on_host, missing, mask=in_vain & (before == 0))
    return before


@triton.jit
def barrier_kernel(signal_pad_ptrs, rank, WORLD: tl.constexpr, THREADS: tl.constexpr):
    """Let no rank go on before all ranks have finished what they did before."""
    signal_pad_barrier(signal_pad_ptrs, rank, WORLD, THREADS)


def barrier(memory: SymmetricMemory, num_ctas: int) -> None:
    """Launch a barrier of all ranks of ``memory`` on the current stream."""
    constants: dict[str, Any] = {
        "WORLD": memory.world_size,
        "THREADS": triton.next_power_of_2(memory.world_size),
    }
    run(
        "barrier",
        lambda: barrier_kernel[(num_ctas,)](memory.signal_pad_ptrs, memory.rank, **constants),
        f"on {num_ctas} programs",
    )
