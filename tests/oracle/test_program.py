"""``twinmoe`` as a program of its own: however it ends, nothing of it is left."""

import json
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
from twinmoe.oracle.exit_codes import NOT_WRITTEN

NARROW = ["--mode", "eager", "--dtype", "bf16"]
#: A check of a few seconds.
SHORT = ["--ep", "1", "--transport", "alltoall", *NARROW, "--model", "mixtral-8x7b"]
SHORT += ["--scale", "64"]


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

    def interrupt(self, whole_terminal: bool, number: int = signal.SIGINT) -> None:
        """Press Ctrl-C, which reaches the whole terminal, or interrupt the program alone."""
        if whole_terminal:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

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
@pytest.mark.parametrize(
    ("whole_terminal", "number"),
    [(True, signal.SIGINT), (False, signal.SIGINT), (False, signal.SIGTERM)],
)
def test_an_interrupt_leaves_nothing_and_gives_no_verdict(
    processes: int, whole_terminal: bool, number: int
) -> None:
    """Interrupted early or late, as a terminal or as kill does it: exit 130, one line, no child."""
    before = segments()
    with Program("check", "--ep", "2", *NARROW, "--cases", "5000") as program:
        # itself, multiprocessing's two servers, and two workers
        program.wait_for(lambda: len(program.family()) >= processes, 60)
        time.sleep(0.5)
        program.interrupt(whole_terminal, number)
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


def finished(*command: str, stdout: Any = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "twinmoe.oracle", *command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("command", "code"),
    [("contracts", NOT_WRITTEN), ("--help", cli.COULD_NOT_RUN), ("doctor", NOT_WRITTEN)],
)
def test_what_nobody_could_read_is_no_success(command: str, code: int) -> None:
    """One line, and neither 0 nor 1, where the output goes nowhere: 1 would call a layer wrong."""
    with Path("/dev/full").open("w") as nowhere:
        run = finished(command, stdout=nowhere)
    assert run.returncode == code, run.stderr
    assert "No space left" in run.stderr


def test_a_full_disk_costs_the_report_and_not_the_verdict() -> None:
    """The table and the verdict are shown; the file is named on stderr, and in the exit code."""
    run = finished("check", *SHORT, "--cases", "1", "--json", "/dev/full")
    assert run.returncode == NOT_WRITTEN
    assert "equivalent: 1 cases in 1 cells" in run.stdout
    assert run.stderr == (
        "twinmoe: --json (/dev/full) could not be written: No space left on device\n"
    )


def test_a_reader_that_is_gone_costs_the_table_and_not_the_report(tmp_path: Path) -> None:
    """The file is whole, and the exit code says that the output is not."""
    reading, writing = os.pipe()
    os.close(reading)
    run = finished("check", *SHORT, "--cases", "1", "--json", str(tmp_path / "r"), stdout=writing)
    os.close(writing)
    assert run.returncode == NOT_WRITTEN
    assert json.loads((tmp_path / "r").read_text())["equivalent"] is True
    assert run.stderr == "twinmoe: the output could not be written: Broken pipe\n"


def test_a_check_that_was_killed_goes_on(tmp_path: Path) -> None:
    """SIGKILL costs the case at hand: the others are in the journal, the verdict is of them all."""
    journal = tmp_path / "journal"
    command = ["check", *SHORT, "--cases", "12", "--journal", str(journal)]
    with Program(*command) as program:
        program.wait_for(lambda: journal.exists() and journal.read_text().count("\n") > 3, 120)
        program.interrupt(whole_terminal=False, number=signal.SIGKILL)
        program.process.communicate(timeout=60)
    kept = journal.read_text().count("\n") - 1
    run = finished(*command, "--resume", "--json", str(tmp_path / "report"))
    assert run.returncode == cli.EQUIVALENT, run.stderr
    assert json.loads((tmp_path / "report").read_text())["cases"] == 12
    assert 3 <= kept <= 12
    assert journal.read_text().count("\n") - 1 == 12


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
