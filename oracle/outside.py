"""What ends or stops a rank from outside its code, told from its own end as far as Linux tells.

A process that sends itself a signal has written its stack first (``last_words``); one that is
killed from outside has not.  The kernel counts whom it killed for want of memory.  What remains
undecided, a second run decides: an end of the layer's own comes again, in a fresh world too.
"""

import re
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

#: Signals that one process sends another; the rest are raised by what a process itself does.
_SENT = frozenset(
    (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU, signal.SIGPWR)
)

#: How CUDA and NCCL say that a device, and not a kernel, has failed.
_LOST_DEVICE = re.compile(
    r"GPU is lost|fallen off the bus|no CUDA-capable device|devices? (\w+ )?(busy or )?unavailable"
    r"|uncorrectable (NVLink|ECC) error|hardware stack error",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Outside:
    """What came from outside, in words; ``proven`` where the system itself says so."""

    words: str
    proven: bool = False


def killed(exit_code: int | None, stack: str, kills_before: int | None) -> Outside | None:
    """What killed a process from outside; None for an end of its own making.

    ``stack`` is what it wrote before its end, ``kills_before`` an earlier :func:`memory_kills`.
    """
    if exit_code is None or exit_code >= 0 or -exit_code not in _SENT or stack:
        return None
    kills = memory_kills()
    if exit_code == -signal.SIGKILL and kills_before is not None and (kills or 0) > kills_before:
        return Outside(
            f"the kernel killed it for want of memory (oom_kill {kills_before} -> {kills}, limit "
            f"{_limit()}): use fewer ranks or more memory",
            proven=True,
        )
    return Outside("the signal came from outside: the rank did not send it itself")


def stopped(pid: int, stack: str) -> Outside | None:
    """Whether a process stands stopped, and did not stop itself."""
    with suppress(OSError, IndexError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state in "tT" and not stack:
            return Outside(f"process {pid} stands stopped (state {state}): somebody sent SIGSTOP")
    return None


def lost_device(text: str) -> Outside | None:
    """Whether an exception says that the device has gone."""
    found = _LOST_DEVICE.search(text)
    return Outside(f"the device has gone: {found[0]}", proven=True) if found else None


def memory_kills() -> int | None:
    """Processes of this one's control group that the kernel killed for want of memory, so far."""
    for file in (*_group_files("memory.events", "memory.oom_control"), Path("/proc/vmstat")):
        with suppress(OSError):
            if found := re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE):
                return int(found[1])
    return None


def _limit() -> str:
    for file in _group_files("memory.max", "memory.limit_in_bytes"):
        with suppress(OSError):
            text = file.read_text().strip()
            # without a limit, an older kernel writes the largest number of pages
            return f"{int(text) / 2**30:.1f} GiB" if text.isdigit() and len(text) < 16 else "none"
    return "unknown"


def _group_files(unified: str, older: str) -> list[Path]:
    """Where a file of this process's control group may lie; inside a container, at the root."""
    root, files = Path("/sys/fs/cgroup"), []
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                files += [root / path.lstrip("/") / unified, root / unified]
            elif "memory" in controllers.split(","):
                files += [root / "memory" / path.lstrip("/") / older, root / "memory" / older]
    return files
