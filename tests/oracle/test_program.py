"""``twinmoe`` as a program of its own: however it ends, nothing of it is left."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from twinmoe.oracle import cli

NARROW = ["--mode", "eager", "--dtype", "bf16"]


class Program:
    """``twinmoe`` in a process and session of its own, whose descendants can be recognised."""

    def __init__(self, *arguments: str) -> None:
        self.mark = f"TWINMOE_CLI_TEST={uuid.uuid4().hex}"
        name, _, value = self.mark.partition("=")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), name: value}
        with _ctrl_c_is_heard():
            self.process = subprocess.Popen(
                [sys.executable, "-m", "twinmoe.oracle", *arguments],
                env=environment, text=True, start_new_session=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip

    def interrupt(self, whole_terminal: bool) -> None:
        """Press Ctrl-C, which reaches the whole terminal, or interrupt the program alone."""
        if whole_terminal:
            os.killpg(self.process.pid, signal.SIGINT)
        else:
            self.process.send_signal(signal.SIGINT)

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.family():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate()

    def family(self) -> list[int]:
        """Return the living processes that carry this program's mark, itself included."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if self.mark.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
        return found

    def wait_for(self, truth: Callable[[], Any], seconds: float) -> None:
        """Wait until ``truth``; fail if it does not come."""
        deadline = time.monotonic() + seconds
        while not truth():
            assert time.monotonic() < deadline, f"not in {seconds} s"
            time.sleep(0.05)


@contextmanager
def _ctrl_c_is_heard() -> Iterator[None]:
    """Start a program that listens, also where the tests run as a shell's background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def segments() -> set[str]:
    """Return the names in /dev/shm of our segments whose process is gone."""
    names = {path.name for path in Path("/dev/shm").glob("twinmoe-*")}
    return {name for name in names if not Path(f"/proc/{name.split('-')[1]}").exists()}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [3, 5], ids=["while workers start", "while cases run"])
@pytest.mark.parametrize("whole_terminal", [True, False])
def test_ctrl_c_leaves_nothing_and_gives_no_verdict(processes: int, whole_terminal: bool) -> None:
    """Interrupted early or late, as a terminal or as kill does it: exit 130, one line, no child."""
    before = segments()
    with Program("check", "--ep", "2", *NARROW, "--cases", "5000") as program:
        # itself, multiprocessing's two servers, and two workers
        program.wait_for(lambda: len(program.family()) >= processes, 60)
        time.sleep(0.5)
        program.interrupt(whole_terminal)
        stdout, stderr = program.process.communicate(timeout=60)
        assert program.process.returncode == cli.INTERRUPTED
        assert stderr.strip() == "twinmoe: interrupted; no verdict"
        assert "equivalent" not in stdout
        program.wait_for(lambda: not program.family(), 10)
    assert segments() <= before


def test_ctrl_c_during_imports_is_one_line() -> None:
    """Before anything of the command has run: exit 130, and no traceback."""
    with Program("contracts") as program:
        maps = Path(f"/proc/{program.process.pid}/maps")
        program.wait_for(lambda: "libtorch" in maps.read_text(), 60)
        program.interrupt(whole_terminal=False)
        _, stderr = program.process.communicate(timeout=60)
    assert program.process.returncode == cli.INTERRUPTED
    assert stderr == "twinmoe: interrupted; no verdict\n"


@pytest.mark.slow
def test_a_check_whose_workers_die_leaves_nothing_behind() -> None:
    """Killed ranks: exit 1, each cell's death told by name, no process and no segment left."""
    before = segments()
    arguments = ["--ep", "2", "--transport", "p2p,alltoall", *NARROW, "--fault", "killed_worker"]
    with Program("check", *arguments) as program:
        stdout, stderr = program.process.communicate(timeout=90)
        assert program.process.returncode == cli.NOT_EQUIVALENT, stderr
        assert stdout.count("WorkerDied: rank 1 was killed by signal 9 (SIGKILL)") == 2
        assert "NOT equivalent: 2 cases in 2 cells" in stdout
        assert stderr == ""
        program.wait_for(lambda: not program.family(), 10)
    assert segments() <= before


@pytest.mark.parametrize("command", [["contracts"], ["--help"], ["doctor"]])
def test_what_nobody_could_read_is_no_verdict(command: list[str]) -> None:
    """Exit 2, and one line, where the output goes nowhere: 1 would call a layer wrong."""
    with Path("/dev/full").open("w") as nowhere:
        run = subprocess.run(
            [sys.executable, "-m", "twinmoe.oracle", *command],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=nowhere, stderr=subprocess.PIPE, text=True, timeout=300, check=False,
        )  # fmt: skip
    assert run.returncode == cli.COULD_NOT_RUN, run.stderr
    assert "No space left" in run.stderr


def test_a_defect_of_the_program_is_no_verdict() -> None:
    """Exit 2 with the traceback, whatever goes wrong inside."""
    program = "from twinmoe.oracle import cli; cli.diagnosis.versions = lambda: 1 / 0; cli.main()"
    run = subprocess.run(
        [sys.executable, "-c", program, "doctor"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == cli.COULD_NOT_RUN
    assert "ZeroDivisionError" in run.stderr
    assert run.stderr.splitlines()[-1].startswith("twinmoe: this is a defect of twinmoe")
