"""The program under torchrun: rank 0 drives, every rank serves, and all of them end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from twinmoe.oracle import torchrun
from twinmoe.reference.config import ConfigError


def run(folder: Path, ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Start ``ranks`` processes that find each other by a port that the system chooses."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={ranks}", "-m", "twinmoe.oracle", *arguments,
    ]  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_check_runs_on_the_processes_that_torchrun_started(tmp_path: Path) -> None:
    """Sizes up to the number of processes, one verdict, printed once; exit code 0."""
    done = run(
        tmp_path, 2, "check", "--transport", "p2p,gloo", "--mode", "replayed", "--dtype", "bf16",
        "--cases", "1", "--json", "report.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    cells = json.loads((tmp_path / "report.json").read_text())["cells"]
    assert {cell["ep_size"] for cell in cells} == {1, 2}
    assert done.stdout.count("worst case") == 1


@pytest.mark.slow
def test_a_fault_ends_the_run_with_its_own_exit_code(tmp_path: Path) -> None:
    """A layer that is not equivalent is told as such, and torchrun passes the failure on."""
    done = run(
        tmp_path, 2, "check", "--ep", "2", "--transport", "p2p", "--mode", "eager",
        "--dtype", "bf16", "--cases", "1", "--fault", "swapped_segments",
    )  # fmt: skip
    assert done.returncode != 0
    assert "not equivalent" in done.stdout.lower()


def test_more_ranks_than_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names both numbers and what to change."""
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("TORCHELASTIC_RUN_ID", "x")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"4 ranks .* torchrun started 2: use --ep up to 2"):
        torchrun.open_world(4, "cpu", 15.0)


def test_without_torchrun_a_world_starts_its_own_workers() -> None:
    """The environment alone decides."""
    assert not torchrun.launched()
    assert torchrun.largest_world() is None
    assert not torchrun.serve()
    with torchrun.open_world(1, "cpu", 15.0) as world:
        assert isinstance(world, torchrun.World)
