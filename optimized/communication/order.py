"""Write-after-read safety: which collective may follow which, and when a barrier is due.

All-gather WRITES to peers' all-gather regions and has its barrier at the end;
reduce-scatter READS peers' reduce-scatter regions and has its barrier at the start; the
regions are disjoint.  So when the two alternate, each protects the other's region:

- A rank that has passed the reduce-scatter's barrier knows that all ranks have finished what
  stood before it in their streams, the readers of the gathered rows included.  Its next
  all-gather may overwrite them.
- A rank that has passed the all-gather's barrier knows that all ranks have finished their
  previous reduce-scatter.  It may write its next partial results.

Two equal collectives in a row have no such witness:

- The second all-gather starts with a leading barrier.
- Before the partial results of a second reduce-scatter are *written*, a barrier is launched:
  the one inside the kernel comes too late for that.

The regions belong to the pool, and so does this record: layers that share a pool share it.
It follows the order of launches on one stream.  A captured graph should therefore hold
all-gather and reduce-scatter in turns, the gather first, as a layer does: replays then keep
the order too.

The record is kept by every rank for itself, and also while a graph is captured, when nothing is
launched.  Where a capture fails on one rank, ranks may remember different things: then all of
them call it UNKNOWN, and take the barrier.
"""

from enum import Enum


class Collective(Enum):
    """What was launched last on a pool."""

    UNKNOWN = "unknown"
    BARRIER = "barrier"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"


class CollectiveOrder:
    """The last collective launched on a pool; a fresh pool is as good as a barrier."""

    def __init__(self) -> None:
        self._last = Collective.BARRIER

    def repeats(self, next_one: Collective) -> bool:
        """Whether ``next_one`` would, or might, directly follow its like, unprotected."""
        return self._last in (next_one, Collective.UNKNOWN)

    def record(self, launched: Collective) -> None:
        """Note a launch."""
        self._last = launched
