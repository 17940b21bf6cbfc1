"""A world: one rank per process, driven from here, which outlives its ranks' failures.

One driver owns the search (Hypothesis); persistent workers hold the process group and
all run the same task at the same time.  Letting each rank draw its own cases would hang
as soon as one of them fails.  A failure of any kind ends the workers, names the rank
that caused it, and the next task starts new ones.
"""

import pickle
import time
import warnings
from collections.abc import Callable
from multiprocessing import connection
from typing import Any, Self, TypeVar

from twinmoe.oracle import wire
from twinmoe.oracle.crew import Crew
from twinmoe.oracle.failures import (
    Raised,
    WorkerDied,
    WorkerError,
    WorkerHang,
    is_secondary,
    name_ranks,
    suspects,
    tell,
)

T = TypeVar("T")

#: A function of the rank's context, importable at module level, and its further arguments.
Task = tuple[Callable[..., object], tuple[Any, ...]]

#: Least time without progress that counts as a hang while workers import and join.
_START_S = 120.0
#: How long the other ranks may still answer after one of them failed.
_GRACE_S = 1.0
#: How often trails are looked at.
_POLL_S = 0.2


class World:
    """``size`` persistent worker processes in one ``torch.distributed`` group.

    ``device`` is ``"cpu"`` (gloo) or ``"cuda"`` (gloo and nccl, rank r on device r).
    A task hangs when for ``timeout_s`` seconds no rank starts an operation or answers.
    Workers start with the first task, and again with the first task after a failure; what they
    have to import is best done by ``opening``, which has the patience of a start.
    """

    def __init__(
        self,
        size: int,
        device: str = "cpu",
        timeout_s: float = 15.0,
        opening: Task | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"size ({size}) must be positive: a world has at least one rank")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s ({timeout_s}) must be positive: it is a time in seconds")
        self.size = size
        self.device = device
        self.timeout_s = timeout_s
        #: Seconds that each start of the workers took, the first one's fork server included.
        self.spawn_seconds: list[float] = []
        self._opening = opening
        self._crew: Crew | None = None

    @property
    def respawns(self) -> int:
        """How often workers were started again, after a failure or ``close``."""
        return max(0, len(self.spawn_seconds) - 1)

    @property
    def pids(self) -> list[int]:
        """The living workers' process ids in rank order; empty between failure and respawn."""
        return [process.pid or 0 for process in self._crew.processes] if self._crew else []

    def run(self, function: Callable[..., T], *args: Any) -> list[T]:
        """Call ``function(rank_context, *args)`` on every rank; return one result per rank.

        ``function`` is importable at module level.  Tensors arrive as contiguous CPU
        tensors, in ``args`` and in results; both should stay below a megabyte.

        Raises ``WorkerDied``, ``WorkerError`` or ``WorkerHang``, after which all workers are gone.
        """
        task = wire.dump_task((function, args))
        return self._answers(self._ready(), self.timeout_s, task)

    def close(self) -> None:
        """End the workers in good order; a later ``run`` starts new ones."""
        if self._crew is not None:
            crew, self._crew = self._crew, None
            crew.dismiss()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ready(self) -> Crew:
        if self._crew is not None:
            gone = self._crew.departed()
            if not gone:
                return self._crew
            self._kill()
            # The coming task is innocent of a death between tasks, which yet must be told.
            warnings.warn(f"{name_ranks(gone)} died between two tasks; respawning", stacklevel=3)
        start = time.monotonic()
        self._crew = Crew(self.size, self.device)
        patience_s = max(_START_S, self.timeout_s)
        self._answers(self._crew, patience_s)
        if self._opening is not None:
            self._answers(self._crew, patience_s, wire.dump_task(self._opening))
        self.spawn_seconds.append(time.monotonic() - start)
        return self._crew

    def _kill(self) -> None:
        if self._crew is not None:
            crew, self._crew = self._crew, None
            crew.kill()

    def _answers(self, crew: Crew, timeout_s: float, task: bytes | None = None) -> list[Any]:
        watch = _Watch(crew, timeout_s)
        try:
            if task is not None:
                crew.start_task(task)
            watch.wait()
            watch.check()
        except BaseException:
            self._kill()
            raise
        return [watch.answers[rank] for rank in range(self.size)]


class _Watch:
    """One task in flight: collects answers and deaths, and looks for progress."""

    def __init__(self, crew: Crew, timeout_s: float) -> None:
        self._crew = crew
        self._timeout_s = timeout_s
        self._ranks = range(len(crew.processes))
        #: By rank, in order of arrival.
        self.answers: dict[int, Any] = {}
        self._deaths: dict[int, int | None] = {}
        self._hung = False

    def wait(self) -> None:
        """Return once every rank answered or died, or others failed to after a failure."""
        last_progress, progress = time.monotonic(), -1
        failed_at: float | None = None
        while len(self.answers.keys() | self._deaths.keys()) < len(self._ranks):
            heard = self._listen()
            now = time.monotonic()
            if heard or progress != self._crew.progress():
                last_progress, progress = now, self._crew.progress()
            if failed_at is None and (self._deaths or self._raised()):
                failed_at = now
            if failed_at is not None and now - failed_at > _GRACE_S:
                return
            if failed_at is None and now - last_progress > self._timeout_s:
                self._hung = True
                return

    def check(self) -> None:
        """Raise the first cause of what went wrong: a death before an error before a hang."""
        prints = self._crew.footprints()
        returned = [rank for rank, x in self.answers.items() if not isinstance(x, Raised)]
        if self._deaths:
            rank, code = next(iter(self._deaths.items()))
            raise WorkerDied(rank, code, prints, tell(prints, returned))
        if raised := self._raised():
            causes = {r: e for r, e in raised.items() if not is_secondary(e.text)} or raised
            first = next(iter(causes.values()))
            ranks = sorted(rank for rank, cause in causes.items() if str(cause) == str(first))
            raise WorkerError(ranks, first, prints, tell(prints, returned))
        if self._hung:
            open_ranks = [rank for rank in self._ranks if rank not in self.answers]
            places = self._crew.places(open_ranks)
            told = tell(prints, returned, places)
            raise WorkerHang(suspects(prints, returned), self._timeout_s, prints, told)

    def _raised(self) -> dict[int, Raised]:
        return {rank: x for rank, x in self.answers.items() if isinstance(x, Raised)}

    def _listen(self) -> bool:
        """Wait a moment for answers and deaths; whether there were any."""
        pipes: dict[Any, int] = {
            self._crew.pipes[rank]: rank
            for rank in self._ranks
            if rank not in self.answers and rank not in self._deaths
        }
        sentinels: dict[Any, int] = {
            self._crew.processes[rank].sentinel: rank
            for rank in self._ranks
            if rank not in self._deaths
        }
        ready = connection.wait([*pipes, *sentinels], timeout=min(_POLL_S, self._timeout_s / 4))
        for pipe in ready:
            if pipe in pipes:
                self._receive(pipes[pipe])
        for sentinel in ready:
            # A worker may have answered and then died: the answer is on the pipe, and was read.
            if sentinel in sentinels and sentinels[sentinel] not in self._deaths:
                rank = sentinels[sentinel]
                self._deaths[rank] = self._crew.exit_code(rank)
        return bool(ready)

    def _receive(self, rank: int) -> None:
        try:
            data = self._crew.pipes[rank].recv_bytes()
        except (EOFError, OSError):
            self._deaths[rank] = self._crew.exit_code(rank)
        else:
            self.answers[rank] = pickle.loads(data)
