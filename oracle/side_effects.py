"""What a call of somebody's code leaves behind in its process: noticed, named and undone."""

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from twinmoe.oracle import descendants, global_state, places

#: How long a pool that the call has ended may take to be gone.
_GONE_S = 1.0

_STARTS = frozenset(("os.fork", "os.forkpty", "os.posix_spawn", "subprocess.Popen", "os.exec"))
#: Where this process has started others, latest last; a hook can never be removed.
_started_at: list[str] = []

_growth = global_state.Growth()


def watch_for_starts() -> None:
    """Remember from now on which lines start processes."""

    def audited(event: str, _arguments: tuple[Any, ...]) -> None:
        if event in _STARTS:
            _started_at.append(places.raised_at("".join(traceback.format_stack())))

    sys.addaudithook(audited)


@contextmanager
def noticed(what: str) -> Iterator[list[str]]:
    """Collect in a list what the body, called ``what``, left behind, in words.

    Processes that it has started are ended, and global state is put back.  A copy of this process
    that was forked in the body and comes back ends here: it must neither answer for the rank nor
    go on in its place.
    """
    owner, before = os.getpid(), descendants.children(os.getpid())
    _started_at.clear()
    states, resident = global_state.read(), global_state.resident_bytes()
    left: list[str] = []
    try:
        yield left
    finally:
        if os.getpid() != owner:
            os._exit(0)
        left += (
            f"{what} changed {change}: what later calls in this process mean; put it back"
            for change in global_state.put_back(states)
        )
        if leak := _growth.add(global_state.resident_bytes() - resident):
            left.append(leak)
        left += _processes_left(what, before)


def _processes_left(what: str, before: set[int]) -> list[str]:
    patience = time.monotonic() + _GONE_S
    while (new := _new(before)) and time.monotonic() < patience:
        time.sleep(0.01)
    if not new:
        return []
    told = ", ".join(map(descendants.described, sorted(new)))
    descendants.end(new)
    at = f", started at {_started_at[-1]}" if _started_at and _started_at[-1] else ""
    return [
        f"{what} left {told} behind{at}: what a forward starts must end with it, and be waited for"
    ]


def _new(before: set[int]) -> set[int]:
    now = descendants.children(os.getpid()) - before
    return {pid for pid in now if not descendants.is_helper(pid)}
