"""What the commands share: one console, progress, and options that mean the same everywhere."""

import io
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from twinmoe.oracle.exit_codes import EQUIVALENT, NOT_WRITTEN
from twinmoe.reference.config import ConfigError

#: Columns of a log, which has none of its own: as wide as tables want to be.
_LOG_COLUMNS = 120

#: More processes than any host of ours has devices: a typing mistake, not a group.
_MOST_RANKS = 64

#: One step done, and what is being done now, if that is to be shown.
Advance = Callable[..., None]


class _Output(io.TextIOBase):
    """Standard output that outlives its reader and its disk.

    ``lost`` is what the system said when something could not be written; the rest is dropped, so
    that a command still comes to its verdict, its files and its exit code.
    """

    lost = ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """What the terminal, or file, wants its text in."""
        return sys.stdout.encoding

    def isatty(self) -> bool:
        """Whether a person may be looking."""
        return sys.stdout.isatty()

    def fileno(self) -> int:
        """The file's number, for its size in columns."""
        return sys.stdout.fileno()

    def write(self, text: str, /) -> int:
        """Write, or remember why not."""
        self._attempt(lambda: sys.stdout.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, or remember why not."""
        self._attempt(sys.stdout.flush)

    def _attempt(self, what: Callable[[], object]) -> None:
        if self.lost:
            return
        try:
            what()
        except OSError as error:
            self.lost = error.strerror or str(error)
            # What is still buffered would fail once more when the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_output = _Output()
console = Console(
    file=_output,  # type: ignore[arg-type]  # rich asks for no more than this
    width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _LOG_COLUMNS,
)


@dataclass(frozen=True)
class Report:
    """A file that a command owes: the option that named it, its path, and what writes it there."""

    option: str
    path: Path | None
    save: Callable[[Path], object]

    def write(self) -> str:
        """Write the file, whole or not at all; return what the system says if it cannot."""
        if self.path is None:
            return ""
        # In front, since some formats are chosen by how a name ends.
        part = self.path.with_name(f".{os.getpid()}.{self.path.name}")
        try:
            if self.path.exists() and not self.path.is_file():  # a device, a pipe
                self.save(self.path)
                return ""
            try:
                self.save(part)
                part.replace(self.path)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            return f"{self.option} ({self.path}) could not be written: {error.strerror or error}"
        return ""


def finish(code: int, *reports: Report, incomplete: str = "") -> NoReturn:
    """Exit with ``code``, after the verdict was shown, and write the reports.

    One that cannot be written is named, as is what is ``incomplete`` already, and costs neither the
    verdict nor the other reports: the exit code is then NOT_WRITTEN, unless ``code`` says more.
    """
    lost = f"the output could not be written: {_output.lost}" if _output.lost else ""
    missing = list(filter(None, [lost, incomplete, *(report.write() for report in reports)]))
    for each in missing:
        click.echo(f"twinmoe: {each}", err=True)
    sys.exit(NOT_WRITTEN if missing and code == EQUIVALENT else code)


def say(text: str) -> None:
    """Print a line as it is, however long."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def say_what_was_ended(cut_off: Iterable[tuple[object, str]]) -> None:
    """Name the cases in which something ended a rank from outside, and what it was."""
    for case, what in cut_off:
        say(f"ended from outside in '{case}', and asked again: {what}")


@contextmanager
def progress(what: str, total: int, columns: int = 0) -> Iterator[Advance]:
    """A bar that is gone when the body is done; call what is given for each step.

    ``columns`` keeps that many for what is being done, so that the bar stands still.
    """
    shown = (
        TextColumn(f"{{task.description:{columns or len(what)}}}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*shown, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)

        def advance(now: str | None = None, steps: int = 1) -> None:
            bar.update(task, advance=steps, description=now)

        yield advance


class Finite(click.FloatRange):
    """A number in a range, which NaN passes everywhere: nothing is less than it, or more."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read a number that can be counted to."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number", param, ctx)
        return number


def timeout_option(default: float) -> Callable[[Any], Any]:
    """``--timeout``: how patient the watchdog is."""
    return click.option(
        "--timeout", type=Finite(min=1), default=default, show_default=True,
        help="Seconds without progress that count as a hang.",
    )  # fmt: skip


device_option = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
    help="Where layers run.",
)  # fmt: skip

json_option = click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Write a report for programs."
)


def ranks_of(text: str, option: str) -> list[int]:
    """Group sizes from ``1,2,4``; raises ConfigError for what is none."""
    parts = [part.strip() for part in text.split(",")]
    sizes = [int(part) for part in parts if part.isdecimal()]
    if len(sizes) < len(parts) or not all(1 <= size <= _MOST_RANKS for size in sizes):
        raise ConfigError(
            f"{option} ({text!r}) is not a list of group sizes from 1 to {_MOST_RANKS}: each rank "
            "is a process; write 1,2,4"
        )
    return sizes


def check_writable(path: Path | None, option: str) -> None:
    """Raise ConfigError, before anything runs, unless a file can be written there."""
    if path is None:
        return
    if path.is_dir():  # as the empty path is
        raise ConfigError(f"{option} ({path}) is a folder: name a file in it")
    if not path.parent.is_dir():
        raise ConfigError(
            f"{option} ({path}) cannot be written: {path.parent} is not a folder; create it first"
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{option} ({path}) cannot be written: no permission; choose another")
