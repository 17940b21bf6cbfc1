"""The scripts of ci/ keep their promises: types are followed, and a hollow or dirty run fails."""

from __future__ import annotations

import importlib.util
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PASSED = '<testcase name="a"/>'
SKIPPED = '<testcase name="b"><skipped message="no CUDA device here"/></testcase>'
FAILED = '<testcase name="c"><failure message="wrong"/></testcase>'

#: Appended to one module of each folder; the last shows that types cross from folder to folder.
DELIBERATE_ERRORS = {
    "reference/config.py": "wrong_in_reference: int = 'text'",
    "optimized/launch.py": "wrong_in_optimized: int = 'text'",
    "oracle/recording.py": "from twinmoe.reference.config import MoEConfig\n"
    "MoEConfig(hidden_size='wrong_across_folders')",
}


@dataclass(frozen=True)
class Account:
    """What ci/aftermath.py made of a run."""

    status: int
    lines: list[str]


@pytest.fixture
def aftermath(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Account]:
    """Return a function that gives ci/aftermath.py a report of cases, and an own /dev/shm."""
    spec = importlib.util.spec_from_file_location("aftermath", ROOT / "ci" / "aftermath.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.2)
    (tmp_path / "shm").mkdir()
    (tmp_path / "shm" / "old").touch()
    (tmp_path / "shm-before").write_text("old\n")

    def account(*cases: str) -> Account:
        (tmp_path / "report.xml").write_text(f"<testsuite>{''.join(cases)}</testsuite>")
        status = module.main(tmp_path, shm=tmp_path / "shm")
        return Account(status, capsys.readouterr().out.splitlines())

    return account


@pytest.mark.slow
def test_mypy_follows_the_mapped_folders(tmp_path: Path) -> None:
    """A type error planted in any folder, or across two, is found by plain ``mypy``."""
    pytest.importorskip("mypy")
    for name in ("pyproject.toml", "ci/packages", "reference", "optimized", "oracle"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        subprocess.run(["cp", "-a", ROOT / name, tmp_path / name], check=True)
    for name, error in DELIBERATE_ERRORS.items():
        with (tmp_path / name).open("a") as module:
            module.write(f"\n{error}\n")
    # Our own folders are named by pyproject.toml; reading all of torch's types would add a minute.
    command = [sys.executable, "-m", "mypy", "--follow-imports=skip", "--cache-dir=cache"]
    run = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 1
    for name in DELIBERATE_ERRORS:
        last_line = len((tmp_path / name).read_text().splitlines())
        assert f"ci/packages/twinmoe/{name}:{last_line}: error: " in run.stdout, run.stdout


def test_a_run_is_counted_and_its_skips_explained(aftermath: Callable[..., Account]) -> None:
    """Outcomes end in one line; each reason for skipping is told with how often it applied."""
    run = aftermath(PASSED, PASSED, SKIPPED, SKIPPED, SKIPPED)
    assert run == Account(0, ["skipped 3: no CUDA device here", "2 passed, 3 skipped"])


@pytest.mark.parametrize("cases", [(), (SKIPPED,), (FAILED, SKIPPED)])
def test_a_run_in_which_nothing_passed_fails(
    aftermath: Callable[..., Account], cases: tuple[str, ...]
) -> None:
    """Nothing collected, everything skipped or all broken: exit 1, and it says so."""
    run = aftermath(*cases)
    assert run.status == 1
    assert "no test passed: a run that shows nothing is a failed run" in run.lines


def _await_environment(pid: int) -> None:
    """Wait until a process that Popen has just started has its environment.

    Popen returns when exec closes its pipe, which the kernel does before it lays out the new stack.
    """
    deadline = time.monotonic() + 10
    while not Path(f"/proc/{pid}/environ").read_bytes():
        assert time.monotonic() < deadline, f"process {pid} never got its environment"


def test_a_process_left_behind_fails_the_run(
    aftermath: Callable[..., Account], tmp_path: Path
) -> None:
    """A living process that carries the run's mark is named, and the run fails."""
    environment = {**os.environ, "TWINMOE_TEST_RUN": str(tmp_path)}
    with subprocess.Popen(["sleep", "60"], env=environment) as sleeper:
        try:
            _await_environment(sleeper.pid)
            run = aftermath(PASSED)
        finally:
            sleeper.kill()
    assert run.status == 1
    assert f"left behind: process {sleeper.pid}: sleep 60" in run.lines


def test_shared_memory_left_behind_fails_the_run(
    aftermath: Callable[..., Account], tmp_path: Path
) -> None:
    """A new segment that no process maps is named, and the run fails."""
    (tmp_path / "shm" / "orphan").write_bytes(b"left")
    run = aftermath(PASSED)
    assert run.status == 1
    assert f"left behind: shared memory {tmp_path}/shm/orphan" in run.lines


def test_shared_memory_in_use_is_somebody_elses(
    aftermath: Callable[..., Account], tmp_path: Path
) -> None:
    """A new segment that a living process maps does not fail this run."""
    segment = tmp_path / "shm" / "mapped"
    segment.write_bytes(b"used")
    with segment.open("r+b") as file, mmap.mmap(file.fileno(), 0):
        assert aftermath(PASSED) == Account(0, ["1 passed, 0 skipped"])


def pytest_on(folder: Path, name: str, test: str) -> subprocess.CompletedProcess[str]:
    """Run ``test``, written to ``folder/name``, under copies of the project's conftest files."""
    for conftest in ("conftest.py", "gpu/conftest.py"):
        (folder / conftest).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "tests" / conftest, folder / conftest)
    (folder / name).write_text(test)
    command = [sys.executable, "-m", "pytest", "-ra", "-c", "/dev/null", "--rootdir", str(folder)]
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", "-W", "ignore", str(folder)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_gpu_tests_are_skipped_with_reason_and_count(tmp_path: Path) -> None:
    """Without a CUDA device each test in tests/gpu is skipped, and the summary says how many."""
    run = pytest_on(tmp_path, "gpu/test_it.py", "def test_one(): pass\ndef test_two(): pass\n")
    assert "no CUDA device here: none of the 2 tests in tests/gpu can run" in run.stdout
    assert "2 skipped" in run.stdout


@pytest.mark.slow
def test_a_child_left_running_fails_the_session(tmp_path: Path) -> None:
    """A test that forgets a process passes, but the session ends with an error that names it."""
    test = "import subprocess\ndef test_it(): globals()['p'] = subprocess.Popen(['sleep', '47'])\n"
    run = pytest_on(tmp_path, "test_it.py", test)
    assert run.returncode == 1
    child = re.search(r"tests left processes behind: (\d+) \(sleep 47\)", run.stdout)
    assert child, run.stdout
    os.kill(int(child[1]), signal.SIGKILL)


@pytest.mark.parametrize("name", ["check", "test", "lint", "gpu", "environment.sh", "../.ci/run"])
def test_scripts_parse_and_fail_early(name: str) -> None:
    """Each script is valid bash and, where it is run directly, executable and stops on errors."""
    script = ROOT / "ci" / name
    subprocess.run(["bash", "-n", script], check=True)
    if script.suffix != ".sh":
        assert os.access(script, os.X_OK)
        assert "\nset -euo pipefail\n" in script.read_text()
