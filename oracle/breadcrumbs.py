"""What every rank is doing, readable from outside even while the rank hangs.

Each worker writes a small structure in memory that it shares with the driver:
how many operations its task has started, the last one's name, and how often each
name occurred.  Operations are the launches reported by ``twinmoe.optimized.launch``
and the data collectives of ``torch.distributed``, which a worker wraps, so that a
layer which knows nothing of this package is followed as well.

Collectives are also kept whole, in :data:`journal`: name, sizes and order must be the
same on all ranks, and a task may send its journal home to be compared.
"""

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist

from twinmoe.optimized import launch

#: Collectives that move data between ranks, hence in which a rank can wait for others.
COLLECTIVES = (
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "monitored_barrier",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
)
_NAME_BYTES = 64
_ON_BYTES = 192
_MAX_NAMES = 64
#: Counts the operations whose names came too late for the table.
_OTHER_NAMES = "(other operations)"


class Phase(IntEnum):
    """Where a rank stands relative to its last operation."""

    #: The operation was started; whether it has ended is not known.
    STARTED = 0
    #: The operation has not returned.
    INSIDE = 1
    #: The operation has returned.
    PAST = 2


class _Count(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char * _NAME_BYTES), ("count", ctypes.c_uint64))


class Trail(ctypes.Structure):
    """The shared memory of one rank; written by the worker, read by the driver."""

    _fields_ = (
        ("sequence", ctypes.c_uint64),
        ("phase", ctypes.c_int32),
        ("last", ctypes.c_char * _NAME_BYTES),
        ("on", ctypes.c_char * _ON_BYTES),
        ("counts", _Count * _MAX_NAMES),
    )


@dataclass(frozen=True)
class Footprint:
    """One rank's trail at one moment."""

    #: Operations that the current task has started.
    sequence: int
    phase: Phase
    #: The last operation's name; empty before the first.
    last: str
    #: Operations started so far, by name.
    counts: dict[str, int]
    #: What the last operation works on, in words; empty where nothing is known.
    on: str = ""

    @classmethod
    def read(cls, trail: Trail) -> "Footprint":
        """Copy ``trail``; exact when its rank stands still, as a hanging rank does."""
        counts = {entry.name.decode(): int(entry.count) for entry in trail.counts if entry.name}
        last, on = trail.last.decode(), trail.on.decode()
        return cls(int(trail.sequence), Phase(trail.phase), last, counts, on)


@dataclass(frozen=True)
class Issued:
    """One collective as a rank issued it.

    ``on`` says what it works on, the same on every rank; ``sent`` and ``received`` are an
    all-to-all's split sizes, which are a rank's own.
    """

    name: str
    on: str
    sent: tuple[int, ...] = ()
    received: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}({self.on})"


#: The current task's collectives, in order.
journal: list[Issued] = []


class Recorder:
    """Writes this process's trail, from its main thread."""

    def __init__(self, trail: Trail) -> None:
        self._trail = trail
        self._entries: dict[str, _Count] = {}
        self._inside = False

    def install(self) -> None:
        """Follow all launches and collectives of this process from now on."""
        launch.observers.append(self._launched)
        wrapped = {name: self._followed(name) for name in COLLECTIVES if hasattr(dist, name)}
        originals = {name: getattr(dist, name) for name in wrapped}
        # A module that was imported before may hold a collective under its own name.
        for module in list(sys.modules.values()):
            for name, original in originals.items():
                if getattr(module, "__dict__", {}).get(name) is original:
                    setattr(module, name, wrapped[name])

    def begin_task(self) -> None:
        """Forget the task before, whose trail the driver has erased."""
        self._entries.clear()
        journal.clear()

    def _launched(self, name: str, on: str) -> None:
        self._record(name, Phase.STARTED, on)
        if on:  # a kernel of this rank alone has no sizes to agree on
            journal.append(Issued(name, on))

    def _record(self, name: str, phase: Phase, on: str) -> None:
        trail = self._trail
        if name not in self._entries and len(self._entries) >= _MAX_NAMES - 1:
            name = _OTHER_NAMES
        entry = self._entries.get(name)
        if entry is None:
            entry = self._entries[name] = trail.counts[len(self._entries)]
            # Room for the terminating zero, and no half of a multi-byte character.
            entry.name = name.encode("ascii", "replace")[: _NAME_BYTES - 1]
        entry.count += 1
        trail.last = entry.name
        trail.on = on.encode("ascii", "replace")[: _ON_BYTES - 1]
        trail.phase = phase
        trail.sequence += 1

    def _followed(self, name: str) -> Callable[..., Any]:
        collective = getattr(dist, name)

        @functools.wraps(collective)
        def follow(*args: Any, **kwargs: Any) -> Any:
            # Object collectives are made of tensor collectives: one entry for both.
            if self._inside:
                return collective(*args, **kwargs)
            issued = _issued(name, args, kwargs)
            journal.append(issued)
            self._record(name, Phase.INSIDE, issued.on)
            self._inside = True
            try:
                return collective(*args, **kwargs)
            finally:
                self._inside = False
                self._trail.phase = Phase.PAST

        return follow


def _issued(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Issued:
    """Describe a call of ``torch.distributed``; an all-to-all by one row, since counts differ."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    if name != "all_to_all_single":
        return Issued(name, launch.sizes(*tensors))
    splits = [value for value in (*args, *kwargs.values()) if isinstance(value, list)]
    received, sent = (tuple(split) for split in splits) if len(splits) == 2 else ((), ())
    return Issued(
        name, "rows of " + launch.sizes(*(tensor[:0] for tensor in tensors)), sent, received
    )
