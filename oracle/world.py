"""A world: one rank per process, driven from here, which outlives its ranks' failures.

One driver owns the search (Hypothesis); persistent workers hold the process group and
all run the same task at the same time.  Letting each rank draw its own cases would hang
as soon as one of them fails.  A failure of any kind ends the workers, names the rank
that caused it, and the next task starts new ones.
"""

import pickle
import time
from collections.abc import Callable
from multiprocessing import connection
from typing import Any, Self, TypeVar

from twinmoe.oracle import wire
from twinmoe.oracle.crew import Crew
from twinmoe.oracle.failures import (
    Raised,
    SetUpError,
    WorkerDied,
    WorkerError,
    WorkerFailure,
    WorkerHang,
    WorkerLost,
    is_secondary,
    suspects,
    tell,
)
from twinmoe.oracle.outside import Outside, lost_device
from twinmoe.oracle.patience import Stopwatch
from twinmoe.oracle.places import standing_at

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
    A task hangs when for ``timeout_s`` seconds no rank starts an operation or answers; seconds in
    which a rank had to wait for a core do not count.
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
        #: The last lines that ranks printed in the last task, as text; empty if they did not.
        self.printed = ""
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

        Raises ``WorkerDied``, ``WorkerError`` or ``WorkerHang``, after which all workers are gone,
        ``WorkerLost``, before it runs anything, as ``require_alive`` does, and ``SetUpError``
        where workers did not start.
        """
        task = wire.dump_task((function, args))
        return self._answers(self._ready(), self.timeout_s, task)

    def require_alive(self) -> None:
        """Raise WorkerLost if a worker ended since its last answer; then all workers are gone."""
        gone = self._crew.departed() if self._crew is not None else []
        if self._crew is None or not gone:
            return
        crew, rank = self._crew, gone[0]
        code, stack = crew.exit_code(rank), crew.last_stack(rank)
        outside = crew.killed_from_outside(rank)
        told = "after its answer to the task before"
        prints, output = crew.footprints(), crew.printed()
        self._kill()
        told = _with_cause(told, outside)
        lost = WorkerLost(rank, code, prints, told, {rank: stack})
        lost.printed = output
        raise _from(outside, lost)

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
            self.require_alive()
            return self._crew
        start = time.monotonic()
        self._crew = Crew(self.size, self.device)
        patience_s = max(_START_S, self.timeout_s)
        try:
            self._answers(self._crew, patience_s)
            if self._opening is not None:
                self._answers(self._crew, patience_s, wire.dump_task(self._opening))
        except WorkerFailure as failure:
            raise SetUpError(failure) from failure
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
        except WorkerFailure as failure:
            failure.printed = crew.printed()
            self._kill()
            raise
        except BaseException:
            self._kill()
            raise
        self.printed = crew.printed()
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
        watch, progress = Stopwatch([process.pid or 0 for process in self._crew.processes]), -1
        failed = False
        while len(self.answers.keys() | self._deaths.keys()) < len(self._ranks):
            heard = self._listen()
            # After a failure what the others still do counts for nothing: their time is measured.
            if not failed and (heard or progress != self._crew.progress()):
                progress, failed = self._crew.progress(), bool(self._deaths or self._raised())
                watch.restart()
            if watch.look() > (_GRACE_S if failed else self._timeout_s):
                self._hung = not failed
                return

    def check(self) -> None:
        """Raise the first cause of what went wrong: a death before an error before a hang."""
        prints = self._crew.footprints()
        returned = [rank for rank, x in self.answers.items() if not isinstance(x, Raised)]
        if self._deaths:
            rank, code = next(iter(self._deaths.items()))
            stacks = {rank: self._crew.last_stack(rank)}
            outside = self._crew.killed_from_outside(rank)
            told = _with_cause(tell(prints, returned), outside)
            raise _from(outside, WorkerDied(rank, code, prints, told, stacks))
        if raised := self._raised():
            causes = {r: e for r, e in raised.items() if not is_secondary(e.text)} or raised
            first = next(iter(causes.values()))
            ranks = sorted(rank for rank, cause in causes.items() if str(cause) == str(first))
            told = tell(prints, returned)
            raise _from(lost_device(first.text), WorkerError(ranks, first, prints, told))
        if self._hung:
            open_ranks = [rank for rank in self._ranks if rank not in self.answers]
            outside = self._crew.stopped_from_outside(open_ranks)
            stacks = self._crew.stacks(open_ranks)
            places = {rank: at for rank, stack in stacks.items() if (at := standing_at(stack))}
            told = _with_cause(tell(prints, returned, places), outside)
            ranks = suspects(prints, returned)
            raise _from(outside, WorkerHang(ranks, self._timeout_s, prints, told, stacks))

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


def _with_cause(told: str, outside: Outside | None) -> str:
    return told if outside is None else f"{outside.words}\n  {told}"


def _from(outside: Outside | None, failure: WorkerFailure) -> WorkerFailure:
    failure.outside = outside
    return failure
