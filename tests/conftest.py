"""What every test lives under: a Hypothesis profile, and the duty to end what it starts."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.meta.judged_cases import pytest_terminal_summary  # noqa: F401 - a hook

#: Examples are drawn on machines with other work to do: time says nothing about a property.
_UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

settings.register_profile("quick", _UNTIMED, max_examples=20)
settings.register_profile("ci", _UNTIMED, max_examples=50, derandomize=True)
settings.register_profile("nightly", _UNTIMED, max_examples=5000, print_blob=True)

#: How long a worker may take to end after the last test let go of it.
_GRACE_SECONDS = 5.0


def pytest_configure() -> None:
    """Load the Hypothesis profile that TWINMOE_PROFILE names."""
    name = os.environ.get("TWINMOE_PROFILE", "quick")
    if name not in ("quick", "ci", "nightly"):
        raise pytest.UsageError(
            f"TWINMOE_PROFILE ({name}) names no profile; use quick, ci or nightly"
        )
    settings.load_profile(name)


@pytest.fixture(scope="session", autouse=True)
def no_process_outlives_the_tests() -> Iterator[None]:
    """Fail the session, in each xdist worker, if a process started by a test is still there."""
    before = _descendants()
    yield
    deadline = time.monotonic() + _GRACE_SECONDS
    while left := _descendants() - before:
        assert time.monotonic() < deadline, f"tests left processes behind: {_described(left)}"
        time.sleep(0.05)


def _descendants() -> set[int]:
    """Return the living processes below this one, without multiprocessing's own servers."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # The command in parentheses may itself contain spaces and parentheses.
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(stat.parent.name))
    found: set[int] = set()
    queue = [os.getpid()]
    while queue:
        below = children.get(queue.pop(), [])
        found.update(below)
        queue.extend(below)
    return found - _servers_of_multiprocessing()


def _servers_of_multiprocessing() -> set[int]:
    """Return the helpers that Python starts once per process and ends with it."""
    return {
        getattr(forkserver._forkserver, "_forkserver_pid", None),
        getattr(resource_tracker._resource_tracker, "_pid", None),
    }


def _described(pids: set[int]) -> str:
    """Return each process id with its command line."""
    lines = []
    for pid in sorted(pids):
        with suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            lines.append(f"{pid} ({command.strip()})")
    return ", ".join(lines)
