"""The scripts that a pipeline copies: which commands they run, and how their exits add up."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "ci" / "examples"

#: Writes down how it was called; exits as told for the rank count in $FAILS.
STUB = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
if [[ " $* " == *" --ep ${FAILS:-none} "* ]]; then exit "$STATUS"; fi
"""


def run(tmp_path: Path, script: str, *arguments: str, **more: str) -> tuple[int, list[str]]:
    """Run an example in ``tmp_path`` with a stub for ``twinmoe``; return its exit and the calls."""
    stub, calls = tmp_path / "bin" / "twinmoe", tmp_path / "calls"
    stub.parent.mkdir(exist_ok=True)
    stub.write_text(STUB)
    stub.chmod(0o755)
    calls.touch()
    path = f"{stub.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "CALLS": str(calls), **more}
    command = [str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, timeout=30, check=False)
    return done.returncode, calls.read_text().splitlines()


def test_golden_records_into_the_file(tmp_path: Path) -> None:
    """``record`` hands its options on."""
    status, calls = run(tmp_path, "golden.sh", "record", "x.safetensors", "--cases", "3")
    assert (status, calls) == (0, ["golden record x.safetensors --cases 3"])


def test_golden_compares_on_several_ranks(tmp_path: Path) -> None:
    """``compare`` runs once for each number of ranks, with reports of its own."""
    status, calls = run(tmp_path, "golden.sh", "compare", "x", GOLDEN_EP="1 4")
    assert status == 0
    assert calls == [
        f"golden compare x --ep {ep} --junit reports/golden-ep{ep}.xml "
        f"--json reports/golden-ep{ep}.json"
        for ep in (1, 4)
    ]
    assert (tmp_path / "reports").is_dir()


@pytest.mark.parametrize("script", [("golden.sh", "compare", "x"), ("killswitch.sh",)])
@pytest.mark.parametrize("status", ["1", "2"])
def test_the_worst_exit_is_kept(tmp_path: Path, script: tuple[str, ...], status: str) -> None:
    """A failure on two ranks is the script's, although four ranks pass after it."""
    found, calls = run(tmp_path, *script, FAILS="2", STATUS=status)
    assert found == int(status)
    assert [call.split("--ep ")[1][0] for call in calls] == ["1", "2", "4"]


def test_golden_wants_an_action_and_a_file(tmp_path: Path) -> None:
    """Exit 2, and nothing is run."""
    assert run(tmp_path, "golden.sh", "replay", "x") == (2, [])
    assert run(tmp_path, "golden.sh", "record") == (2, [])
