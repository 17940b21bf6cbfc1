"""The processes below a rank: seen, whatever they do to hide, and ended with the run.

Three means, since none suffices alone.  A rank is a *subreaper* (prctl): whoever daemonises below
it, by ``setsid`` or a second fork, becomes its child again and is seen beside the others.  All
processes of a run carry a *mark* in the environment that they were started with, by which the
driver finds those whose rank has died; a process group or session would lose whoever leaves it.
And an *undertaker* in a session of its own waits for the driver's end, SIGKILL included, and then
ends whatever carries the mark, were it stopped or stuck in native code, where the signal of
PR_SET_PDEATHSIG would leave a rank no time to remove its files.  A process that both clears its
environment and outlives its rank escapes.
"""

import ctypes
import os
import re
import select
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from twinmoe.optimized.communication.cpu_symmetric_memory import remove_leftovers

#: The variable of the mark.
MARK = "TWINMOE_RUN"

_PR_SET_CHILD_SUBREAPER = 36

#: Helpers that Python and torch start once and keep for the life of a process.
_HELPERS = re.compile(
    r"multiprocessing[./](resource_tracker|forkserver)|torch/_inductor/compile_worker"
)

#: How long a process may take to be gone after its end was asked for.
_ENDING_S = 2.0
#: How long workers may clean up after their driver, before the undertaker ends what is left.
_CLEANUP_S = 1.0


def mark_of(driver: int) -> str:
    """The mark of everything that the process ``driver`` starts."""
    return f"{driver}-{_stat(driver)[19]}"  # with the time of its start, since ids come again


def adopt_orphans() -> None:
    """Make this process the parent of whoever loses his own below it, where Linux allows it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def children(pid: int) -> set[int]:
    """The child processes of all threads of ``pid``, those that ended unheeded included."""
    found: set[int] = set()
    with suppress(OSError):  # the process, or a thread of it, has ended
        for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208 - quick: it runs with each forward
            with suppress(OSError), open(f"/proc/{pid}/task/{thread}/children", "rb") as file:  # noqa: PTH123
                found.update(map(int, file.read().split()))
    return found


def below(pid: int) -> set[int]:
    """All descendants of ``pid``."""
    found: set[int] = set()
    waiting = children(pid)
    while waiting:
        found |= waiting
        waiting = set().union(*map(children, waiting)) - found
    return found


def is_helper(pid: int) -> bool:
    """Whether ``pid`` is a helper of Python's or torch's own, which stays as long as its parent.

    A forked copy of this process, which a fork server may have started, has its command.
    """
    command = _command(pid)
    return _HELPERS.search(command) is not None and command != _command(os.getpid())


def described(pid: int) -> str:
    """The process's id and command; an ended one has none."""
    return f"process {pid} ({_command(pid)[:80] or 'ended, and nobody waited for it'})"


def marked(mark: str) -> set[int]:
    """The processes, this one excepted, that were started with ``mark``."""
    sought, found = f"{MARK}={mark}".encode(), set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if sought in (folder / "environ").read_bytes().split(b"\0"):
                found.add(int(folder.name))
    return found - {os.getpid()}


def orphans(mark: str, known: Iterable[int]) -> set[int]:
    """Marked processes whose parent is not marked, but for the ``known``."""
    ours = marked(mark)
    return {pid for pid in ours - set(known) if _parent(pid) not in ours}


def end(pids: Iterable[int]) -> None:
    """End processes and all below them; return when they are gone, or it takes too long."""
    left, patience = set(pids), time.monotonic() + _ENDING_S
    while left and time.monotonic() < patience:
        # An undertaker is below the fork server that it ends.
        for pid in left.union(*map(below, left)) - {os.getpid()}:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        left = {pid for pid in left if _is_alive(pid)}
        time.sleep(0.005)


def bury(driver: int, mark: str) -> None:
    """Wait for the end of the process ``driver``; then end all that carries ``mark``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setsid()  # whoever kills the driver's group or terminal does not reach this one
    with suppress(ProcessLookupError):
        watched = os.pidfd_open(driver)
        select.select([watched], [], [])
    time.sleep(_CLEANUP_S)
    left = marked(mark)
    end(left)
    for pid in left:
        remove_leftovers(pid)
    os._exit(0)


def _stat(pid: int) -> list[str]:
    """Fields of ``/proc/PID/stat`` behind the command, which may contain anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _parent(pid: int) -> int:
    try:
        return int(_stat(pid)[1])
    except OSError:
        return 0


def _is_alive(pid: int) -> bool:
    try:
        return _stat(pid)[0] != "Z" or _parent(pid) == os.getpid()
    except OSError:
        return False


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""
