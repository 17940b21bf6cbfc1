"""Ctrl-C or SIGTERM, once: heard wherever Python stands, and not again while all is cleaned up."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from twinmoe.oracle.exit_codes import INTERRUPTED

#: Cleaning up takes no longer; an interrupt in the middle of it would leave workers behind.
_CLEANUP_S = 15.0
#: A callback returns sooner.
_SOON_S = 0.05


def is_program() -> bool:
    """Whether this process is the command itself, and no program that uses this package."""
    words = sys.orig_argv
    module = words[words.index("-m") + 1 :][:1] if "-m" in words else []
    return module == ["twinmoe.oracle"] or Path(sys.argv[0]).name == "twinmoe"


def end_in_one_line() -> None:
    """End this process quietly upon Ctrl-C, until :func:`heard_once` listens: imports are long."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(*_: object) -> NoReturn:
    os.write(2, b"twinmoe: interrupted; no verdict\n")
    os._exit(INTERRUPTED)  # nothing was started that would have to be ended


@contextmanager
def heard_once() -> Iterator[None]:
    """Raise KeyboardInterrupt in the body for the first Ctrl-C or SIGTERM, for none soon after.

    Python runs the handler wherever it stands.  In a callback (of the garbage collector, of a
    weak reference) the exception cannot spread: it would be printed and forgotten, and is
    raised again a moment later.  A process that was started deaf to Ctrl-C, as shells start
    background jobs, stays so; and the command itself is deaf when the body is done: all is said,
    and what remains is to leave.
    """
    if signal.getsignal(signal.SIGINT) not in (signal.default_int_handler, _end):
        yield
        return
    heard_at = -_CLEANUP_S

    def press(*_: object) -> None:
        nonlocal heard_at
        now = time.monotonic()
        if now - heard_at >= _CLEANUP_S:
            heard_at = now
            raise KeyboardInterrupt

    def lost(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, _SOON_S)
        else:
            told(unraisable)

    told, sys.unraisablehook = sys.unraisablehook, lost
    handlers = {
        signal.SIGINT: signal.signal(signal.SIGINT, press),
        signal.SIGTERM: signal.signal(signal.SIGTERM, press),
        signal.SIGALRM: signal.signal(signal.SIGALRM, _again),
    }
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)  # with the old handler it would end the process
        sys.unraisablehook = told
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_IGN if handler is _end else handler)


@contextmanager
def held_back() -> Iterator[None]:
    """Let a Ctrl-C wait until the body is done; processes started in it never hear one."""
    pressed: list[object] = []
    listens = threading.current_thread() is threading.main_thread()
    # Any thread may take the signal, and the main one then acts on it: a mask alone holds nothing.
    handler = signal.getsignal(signal.SIGINT)
    if listens and callable(handler):
        signal.signal(signal.SIGINT, lambda *_: pressed.append(_))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if listens and callable(handler):
            signal.signal(signal.SIGINT, handler)
        if pressed:
            signal.raise_signal(signal.SIGINT)


def _again(*_: object) -> NoReturn:
    raise KeyboardInterrupt
