"""ci/gpu without GPUs: which steps run, on which devices, and what its last line says."""

import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from twinmoe.oracle.case import MODES
from twinmoe.oracle.faults import FAULTS

ROOT = Path(__file__).resolve().parents[1]

#: Says how many devices there are, notes what else it is asked, and fails where it should.
_PYTHON = """#!/usr/bin/env bash
if [[ "$1" == - ]]; then echo "$COUNT"; exit; fi
echo "$CUDA_VISIBLE_DEVICES: $*" >>"$NOTES"
if [[ -n "$FAILING" && "$*" == *"$FAILING"* ]]; then
    if [[ -z "$SIGNAL" ]]; then exit 1; fi
    group=$PPID main=$(cut -d ' ' -f 4 "/proc/$PPID/stat")
    if [[ "$OF" == main ]]; then kill "-$SIGNAL" "$main"; sleep 60; fi
    kill "-$SIGNAL" "$group"
fi
"""

Run = Callable[..., tuple[subprocess.CompletedProcess[str], list[str]]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a function: ci/gpu on ``count`` devices that are not there, and what it started."""
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(_PYTHON)
    python.chmod(0o755)

    def run_it(
        count: str,
        *,
        failing: str = "",
        signal: str = "",
        of: str = "group",
        devices: str = "",
        arguments: tuple[str, ...] = (),
    ) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        environment = {
            **os.environ,
            "PATH": f"{python.parent}:{os.environ['PATH']}",
            "COUNT": count,
            "FAILING": failing,
            "SIGNAL": signal,
            "OF": of,
            "CUDA_VISIBLE_DEVICES": devices,
            "NOTES": str(tmp_path / "notes"),
        }
        done = subprocess.run(
            [ROOT / "ci" / "gpu", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        notes = tmp_path / "notes"
        return done, notes.read_text().splitlines() if notes.exists() else []

    return run_it


def test_every_group_is_checked_and_smaller_ones_share_the_devices(
    run: Run, tmp_path: Path
) -> None:
    """Four GPUs: two and two, then all four with what one does alone beside them."""
    reports = tmp_path / "reports"
    done, started = run("4", devices="3,5,6,7", arguments=(str(reports),))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("ci/gpu: equivalent on 1,2,4 GPUs, ")
    checks = {line.split(": ")[0] for line in started if "check --device" in line}
    assert checks == {"3", "3,5", "3,5,6,7"}
    planted = {line.split(": ")[0]: line for line in started if "faults --device" in line}
    assert "--ep 2" in planted["6,7"]
    assert "--ep 1" in planted["7"]
    for step in ("pytest tests/gpu ", "killswitch", "torch.distributed.run"):
        assert sum(step in line for line in started) == 1, step
    assert sum(str(reports) in line for line in started) == 9
    assert reports.is_dir()


def test_one_gpu_has_no_kill_switch_to_flip(run: Run) -> None:
    """A group of one has nothing to fall back to; everything else runs."""
    done, started = run("1")
    assert done.stdout.splitlines()[-1].startswith("ci/gpu: equivalent on 1 GPUs, ")
    assert not any("killswitch" in line for line in started)
    assert sum("check --device" in line for line in started) == 2


@pytest.mark.parametrize(
    "failing", ["--ep 2", "pytest", "faults", "killswitch", "run --standalone"]
)
def test_a_step_that_fails_is_named_and_the_others_still_run(run: Run, failing: str) -> None:
    """Exit 1, the step's name, and a verdict that says so."""
    done, started = run("4", failing=failing)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("ci/gpu: NOT equivalent on 1,2,4 GPUs, ")
    assert ": exit 1" in done.stdout.splitlines()[-2]
    assert len(started) == 10


def test_a_group_that_is_killed_is_no_pass(run: Run) -> None:
    """Groups that run aside may die, of a lack of memory say: the verdict knows."""
    done, _ = run("4", failing="--ep 2", signal="KILL")
    assert done.returncode == 1
    assert "ci/gpu: a group of GPUs ended early: exit 137" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("ci/gpu: NOT equivalent on 1,2,4 GPUs, ")


@pytest.mark.parametrize("count", ["1", "2", "3", "4", "8"])
def test_jobs_of_several_ranks_hold_disjoint_devices(run: Run, count: str) -> None:
    """Jobs of several ranks hold disjoint devices; each step's seconds are in the table."""
    done, started = run(count)
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line for line in done.stdout.splitlines() if re.match(r"\d+ s ", line)]
    assert len(table) == len(started)
    several = [line.split(": ")[0] for line in started if "," in line.split(": ")[0]]
    largest = max(several, key=len, default="")
    beside = {devices for devices in several if devices != largest}
    assert sum(len(devices.split(",")) for devices in beside) == len(set(",".join(beside)) - {","})


def test_every_fault_is_planted_alone_or_together() -> None:
    """The two lists are those classes, each fault in one of them."""
    script = (ROOT / "ci" / "gpu").read_text()
    lists = {
        name: [
            x for part in re.findall(rf"^{name}\+?=(.*)$", script, re.M) for x in part.split(",")
        ]
        for name in ("alone", "together")
    }
    named = [name for names in lists.values() for name in names if name]
    wanted = [
        fault.id or fault.name
        for fault in FAULTS.values()
        if fault.id[:2] in ("GR", "ST", "CL", "CB")
        or fault.name in ("dropped_slot", "swapped_segments")
    ]
    assert sorted(named) == sorted(wanted)


def test_an_interrupt_ends_the_groups_too(run: Run) -> None:
    """Nothing keeps the GPUs when somebody gives up."""
    begun = time.monotonic()
    done, _ = run("4", failing="--ep 2", signal="TERM", of="main")
    assert done.returncode == 130
    assert time.monotonic() - begun < 20
    assert "equivalent" not in done.stdout


def test_no_device_is_no_pass(run: Run) -> None:
    """Exit 2, and nothing starts."""
    done, started = run("has torch 2.11.0, but no device")
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert started == []


def test_modes_that_are_asked_for_exist() -> None:
    """A mode of another name would end the check before it starts, which only a GPU would show."""
    asked = re.findall(r"--mode (\S+)", (ROOT / "ci/gpu").read_text())
    assert asked
    assert {mode for modes in asked for mode in modes.split(",")} <= set(MODES)
