"""What a command says of what its layers printed: one line, and the file that keeps it."""

import tempfile
from contextlib import suppress
from pathlib import Path

import click

from twinmoe.oracle import printed


def at_the_end() -> None:
    """Start a run; when the command that runs has ended, say how much its layers printed.

    ``replay`` shows it, too: people debug with it.
    """
    printed.start_run()
    context = click.get_current_context()
    context.call_on_close(say_printed)
    if context.invoked_subcommand == "replay":
        context.call_on_close(_show_printed)  # callbacks run in reverse: this one first


def say_printed() -> None:
    """Say how much was printed, and keep it in a file of its own; nothing of nothing."""
    if count := printed.run.bytes:
        click.echo(f"layers printed {count} bytes ({_keep(printed.run.written())})", err=True)


def _show_printed() -> None:
    if printed.run.bytes:
        click.echo(f"layers printed:\n{printed.run.shown()}", err=True)


def _keep(text: str) -> str:
    path = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", prefix="twinmoe-printed-", suffix=".txt", delete=False
        ) as file:
            path = Path(file.name)
            file.write(text)
    except OSError as error:
        if path is not None:
            with suppress(OSError):
                path.unlink()
        return f"not kept: {error.strerror or error}"
    return f"kept in {path}"
