"""What ranks print: out of the report, read as it comes, and kept within bounds.

Each worker has a pipe as its standard output and error, so that native code is heard as well.
One thread of the driver empties all pipes: a print never waits for long, whoever holds the
worker's interpreter, and a layer that prints for ever costs no memory.  Of each rank its end is
kept, for the account of a case; of a whole run its beginning and its end.

Under torchrun the launcher owns the streams, and none of this applies.
"""

import io
import os
import selectors
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection

from twinmoe.oracle.visible import printed_text

#: Bytes of each rank's end, and of a run's beginning and its end.
_RANK, _RUN = 64 << 10, 256 << 10
#: Characters of a run's that are shown, and written into a file: escapes are longer than bytes.
_SHOWN, _WRITTEN = 20_000, 500_000
#: Lines of a case's account, of all ranks together, and characters of each rank's.
_LINES, _CHARACTERS = 20, 2_000

#: What a read asks for, and how many of them empty the largest pipe that Linux gives.
_PIECE, _PIECES = 64 << 10, 16


class RunRecord:
    """The beginning and the end of what the layers of a run have printed, and how much it was."""

    def __init__(self) -> None:
        self.bytes = 0
        self._head, self._tail, self._cut = bytearray(), bytearray(), 0
        self._from = ""

    def add(self, who: str, data: bytes) -> None:
        """Keep what ``who`` has printed."""
        self.bytes += len(data)
        if who != self._from:
            begun = self._tail or self._head
            newline = b"" if not begun or begun.endswith(b"\n") else b"\n"
            self._from, data = who, newline + f"--- {who} ---\n".encode() + data
        room = _RUN - len(self._head)
        self._head += data[:room]
        self._cut += _keep_end(self._tail, data[room:], _RUN)

    def shown(self) -> str:
        """What is kept, for a terminal."""
        return self._text(_SHOWN)

    def written(self) -> str:
        """What is kept, for a file of at most 1 MiB."""
        return self._text(_WRITTEN)

    def _text(self, longest: int) -> str:
        head, tail = bytes(self._head), bytes(self._tail)
        if not self._cut:
            return printed_text(head + tail, longest)
        halves = [printed_text(half, longest // 2) for half in (head, tail)]
        return f"\n[... {self._cut} bytes left out ...]\n".join(halves)


#: Of the command that runs, or of this process.
run = RunRecord()


def start_run() -> None:
    """Forget what was printed before."""
    global run  # noqa: PLW0603 - standard output is one for each process, and so is what it was
    run = RunRecord()


class _Source:
    """The driver's end of a rank's pipe, and the end of what came through it."""

    def __init__(self, reader: Connection) -> None:
        self._reader = reader
        self.count, self._mark, self._tail = 0, 0, bytearray()
        os.set_blocking(reader.fileno(), False)

    def fileno(self) -> int:
        return self._reader.fileno()

    @property
    def open(self) -> bool:
        return not self._reader.closed

    def close(self) -> None:
        self._reader.close()

    def mark(self) -> None:
        self._mark = self.count

    def read(self) -> bytes | None:
        """Read a piece; empty if there is none, None if there will never be one again."""
        try:
            data = os.read(self.fileno(), _PIECE)
        except BlockingIOError:
            return b""
        self.count += len(data)
        _keep_end(self._tail, data, _RANK)
        return data or None

    def since_mark(self) -> tuple[int, bytes]:
        """How many bytes came since the mark, and the last of them."""
        count = self.count - self._mark
        return count, bytes(self._tail[-min(count, _RANK) :]) if count else b""


class Streams:
    """What the ranks of one world print.  Each gets one of ``writers``, to be closed here then."""

    def __init__(self, pipes: Sequence[tuple[Connection, Connection]]) -> None:
        self.writers = [writer for _, writer in pipes]
        self._sources = [_Source(reader) for reader, _ in pipes]
        #: Whether layers print: before and after it is torch that does.
        self._counts = False
        for rank, source in enumerate(self._sources):
            _drain.add(source, partial(self._keep, rank))

    def begin(self) -> None:
        """A task starts: what ranks print from here on is its own."""
        _drain.empty(self._sources)
        for source in self._sources:
            source.mark()
        self._counts = True

    def end(self) -> None:
        """No task will come: what ranks print from here on is nobody's."""
        _drain.empty(self._sources)
        self._counts = False

    def close(self) -> None:
        """Let go of the pipes, whoever still holds their other ends."""
        _drain.remove(self._sources)
        for writer in self.writers:
            writer.close()

    def tail(self) -> str:
        """The last lines that each rank has printed in this task, as text; empty if none has."""
        _drain.empty(self._sources)
        told = [(rank, *source.since_mark()) for rank, source in enumerate(self._sources)]
        told = [(rank, count, data) for rank, count, data in told if count]
        lines = max(2, _LINES // max(1, len(told)))
        return "\n".join(_account(rank, count, data, lines) for rank, count, data in told)

    def _keep(self, rank: int, data: bytes) -> None:
        if self._counts:
            run.add(f"rank {rank} of {len(self._sources)}", data)


class _Drain:
    """The thread that empties all pipes of this process; it starts with the first one."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, source: _Source, keep: Callable[[bytes], None]) -> None:
        with self._lock:
            self._selector.register(source, selectors.EVENT_READ, (source, keep))
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="twinmoe-drain", daemon=True)
            self._thread.start()

    def empty(self, sources: Sequence[_Source]) -> None:
        """Read all that was printed before this call."""
        with self._lock:
            for source in sources:
                for _ in range(_PIECES):
                    if not self._read(source):
                        break

    def remove(self, sources: Sequence[_Source]) -> None:
        self.empty(sources)
        with self._lock:
            for source in sources:
                self._forget(source)
                source.close()

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # the main thread's
        while True:
            for key, _ in self._selector.select():
                source, _keep = key.data
                with self._lock:
                    if source.open:  # it may have been closed while this thread was about to read
                        self._read(source)

    def _read(self, source: _Source) -> bool:
        """Read and keep a piece; whether there was one."""
        if not source.open or source.fileno() not in self._selector.get_map():
            return False
        _, keep = self._selector.get_key(source).data
        data = source.read()
        if data is None:
            self._forget(source)
        elif data:
            keep(data)
        return bool(data)

    def _forget(self, source: _Source) -> None:
        if source.open and source.fileno() in self._selector.get_map():
            self._selector.unregister(source)


_drain = _Drain()


def take_over(writer: Connection) -> None:
    """Make ``writer`` this process's standard output and error, and close it.

    Python's own are replaced: what is printed is on its way when the print returns, whatever
    becomes of the process, and no character fails for want of an encoding.
    """
    for number in (1, 2):
        os.dup2(writer.fileno(), number)
    writer.close()
    sys.stdout = sys.__stdout__ = _text_stream(1)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _text_stream(2)  # type: ignore[misc]


def _text_stream(number: int) -> io.TextIOWrapper:
    raw = io.FileIO(number, "w", closefd=False)
    return io.TextIOWrapper(raw, "utf-8", "backslashreplace", write_through=True)


def _keep_end(kept: bytearray, data: bytes, most: int) -> int:
    """Append ``data`` and drop from the front what is too much; return how much that was."""
    kept += data
    cut = max(0, len(kept) - most)
    del kept[:cut]
    return cut


def _account(rank: int, count: int, data: bytes, lines: int) -> str:
    last = b"\n".join(data.rstrip(b"\n").split(b"\n")[-lines:])
    shown = printed_text(last, _CHARACTERS).replace("\n", "\n    | ")
    return f"  rank {rank} printed {count} bytes, at last:\n    | {shown}"
