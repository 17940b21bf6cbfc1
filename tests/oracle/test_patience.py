"""Seconds that a busy machine took are not charged to a rank; those that it slept or spun are."""

import os
import time

import pytest

from twinmoe.oracle.patience import Delays, Stopwatch, waits_for_cores


class Machine:
    """A clock, and what the kernel would count for one thread of process 1."""

    def __init__(self) -> None:
        self.now, self.waited = 0.0, 0.0

    def delays(self, _pids: object) -> Delays:
        """What the thread waited for a core."""
        return {(1, "1"): self.waited}


def test_waiting_for_a_core_is_not_charged() -> None:
    """Of ten seconds, nine without a core: one is charged; after a restart none."""
    machine = Machine()
    watch = Stopwatch([1], lambda: machine.now, machine.delays)
    machine.now, machine.waited = 10.0, 9.0
    assert watch.look() == pytest.approx(1.0)
    machine.now = 13.0  # asleep, or spinning on a core of its own
    assert watch.look() == pytest.approx(4.0)
    watch.restart()
    assert watch.look() == 0.0


def test_without_the_kernels_count_all_seconds_are_charged() -> None:
    """A process that is gone, or a system that counts nothing, gets no discount."""
    machine = Machine()
    watch = Stopwatch([1], lambda: machine.now, lambda _: {})
    machine.now = 5.0
    assert watch.look() == 5.0


def test_two_on_one_core_wait_for_it() -> None:
    """What the kernel counts for this process grows while others hold the only core it may use."""
    core = {min(os.sched_getaffinity(0))}
    allowed = os.sched_getaffinity(0)
    rival = os.fork()
    if rival == 0:
        os.sched_setaffinity(0, core)
        while True:
            pass
    try:
        os.sched_setaffinity(0, core)
        watch, start = Stopwatch([os.getpid()]), time.monotonic()
        while time.monotonic() - start < 0.4:
            pass
        assert watch.look() < time.monotonic() - start - 0.05
        assert waits_for_cores([os.getpid()])
    finally:
        os.sched_setaffinity(0, allowed)
        os.kill(rival, 9)
        os.waitpid(rival, 0)
