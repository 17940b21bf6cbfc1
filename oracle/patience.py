"""Time as a watched process could use it: a busy machine is no hang.

Seconds alone say nothing where more processes want to run than there are cores: a rank that
was given a tenth of one does in 150 seconds what it otherwise does in 15.  Linux counts, for each
thread, how long it was ready to run and had to wait for a core; those seconds are not charged.  A
rank that spins is charged in full, and so are ranks that all sleep and wait for each other.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

#: (process, thread) -> seconds that it waited for a core, since it started.
Delays = dict[tuple[int, str], float]


class Stopwatch:
    """Counts the seconds in which no process of ``pids`` had to wait for a core.

    Without the kernel's count, all seconds are charged.
    """

    def __init__(
        self,
        pids: Sequence[int],
        now: Callable[[], float] = time.monotonic,
        delays: Callable[[Sequence[int]], Delays] | None = None,
    ) -> None:
        self._pids, self._now, self._delays = pids, now, delays or waits_for_cores
        self.restart()

    def restart(self) -> None:
        """Count from here."""
        self.seconds = 0.0
        self._last, self._waited = self._now(), self._delays(self._pids)

    def look(self) -> float:
        """Return the seconds charged so far, those since the last look included."""
        now, waited = self._now(), self._delays(self._pids)
        longest = max(
            (delay - self._waited.get(thread, 0.0) for thread, delay in waited.items()), default=0.0
        )
        self.seconds += max(0.0, now - self._last - longest)
        self._last, self._waited = now, waited
        return self.seconds


def waits_for_cores(pids: Sequence[int]) -> Delays:
    """Read how long each thread of ``pids`` was ready to run and did not."""
    delays = {}
    for pid in pids:
        for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            try:
                nanoseconds = int(file.read_text().split()[1])
            except (OSError, IndexError, ValueError):  # the thread has ended
                continue
            delays[pid, file.parent.name] = nanoseconds / 1e9
    return delays
