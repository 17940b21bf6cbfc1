"""What came from outside is told from a process's own end by what the system says."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from twinmoe.oracle import outside
from twinmoe.oracle.outside import killed, lost_device, memory_kills, stopped


def test_an_end_of_its_own_making_is_not_from_outside() -> None:
    """An exit code, a crash, and a signal before which it wrote its stack."""
    assert killed(3, "", None) is None
    assert killed(-signal.SIGSEGV, "", None) is None
    assert killed(-signal.SIGKILL, "Stack (most recent call first):", None) is None
    seen = killed(-signal.SIGKILL, "", memory_kills())
    assert seen is not None
    assert not seen.proven


def test_the_kernels_count_proves_a_lack_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A count that rose since the workers' start, with the limit, for a SIGKILL alone."""
    events, limit = tmp_path / "memory.events", tmp_path / "memory.max"
    events.write_text("low 0\noom 4\noom_kill 4\n")
    limit.write_text("2147483648\n")
    monkeypatch.setattr(
        outside, "_group_files", lambda name, _: [tmp_path / name] if "." in name else []
    )
    seen = killed(-signal.SIGKILL, "", 3)
    assert seen is not None
    assert seen.proven
    assert "oom_kill 3 -> 4, limit 2.0 GiB" in seen.words
    assert not getattr(killed(-signal.SIGTERM, "", 3), "proven", True)


def test_a_stopped_process_is_seen() -> None:
    """By its state; one that stopped itself has said so."""
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        try:
            assert stopped(sleeper.pid, "") is None
            sleeper.send_signal(signal.SIGSTOP)
            deadline = time.monotonic() + 10
            while stopped(sleeper.pid, "") is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert stopped(sleeper.pid, "Stack (most recent call first):") is None
        finally:
            sleeper.kill()


@pytest.mark.parametrize(
    ("text", "is_lost"),
    [
        ("CUDA error: uncorrectable ECC error encountered", True),
        ("no CUDA-capable device is detected", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("CUDA out of memory. Tried to allocate 20.00 MiB", False),
    ],
)
def test_a_lost_device_is_told_from_a_wrong_kernel(text: str, is_lost: bool) -> None:
    """What a kernel does wrong is the layer's own."""
    assert (lost_device(text) is not None) == is_lost
