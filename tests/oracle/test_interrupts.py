"""Ctrl-C is heard once, wherever it meets Python."""

import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator

import pytest

from twinmoe.oracle.interrupts import heard_once, held_back


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """Run the tests of this file as a program that listens, not as a background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class _Watched:
    """Something that a weak reference can watch."""


def test_an_interrupt_in_a_callback_is_raised_after_it(capfd: pytest.CaptureFixture[str]) -> None:
    """Python forgets what a weak reference's callback raises: it comes again, and is not told."""
    watched = [_Watched()]
    reference = weakref.ref(watched[0], lambda _: signal.raise_signal(signal.SIGINT))

    @heard_once()
    def forget() -> None:
        watched.clear()
        assert reference() is None
        time.sleep(10)

    with pytest.raises(KeyboardInterrupt):
        forget()
    assert capfd.readouterr().err == ""


def test_an_interrupt_lost_at_the_very_end_does_no_harm() -> None:
    """No alarm is left behind that would end the process a moment later."""
    watched = [_Watched()]
    reference = weakref.ref(watched[0], lambda _: signal.raise_signal(signal.SIGINT))
    with heard_once():
        watched.clear()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert reference() is None


def test_a_second_interrupt_does_not_disturb_the_cleaning_up() -> None:
    """What follows the first at once is not heard."""
    cleaned_up = []

    @heard_once()
    def work() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            cleaned_up.append(True)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert cleaned_up
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_background_job_stays_deaf() -> None:
    """Where SIGINT was ignored from the start, nothing listens to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with heard_once():
        signal.raise_signal(signal.SIGINT)


def test_an_interrupt_waits_while_it_is_held_back() -> None:
    """It is raised at the end, not lost; and a process started meanwhile does not hear one."""
    code = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    held, reached = threading.Event(), []

    def take() -> None:
        held.wait(60)
        signal.raise_signal(signal.SIGINT)

    # A thread from before takes the signal, which the main thread acts on.
    thread = threading.Thread(target=take)
    thread.start()

    @held_back()
    def start() -> None:
        held.set()
        thread.join()
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
        reached.append(True)

    with pytest.raises(KeyboardInterrupt):
        start()
    assert reached
