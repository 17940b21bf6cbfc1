"""docs/your-layer.md as a reader would follow it: the mistake, the promise, the right layer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "your-layer.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)


def check(
    folder: Path, layer: str, file: str = "my_layer.py", *more: str
) -> subprocess.CompletedProcess[str]:
    """Save the layer, and run the command of the guide beside it."""
    (folder / file).write_text(layer)
    command = [sys.executable, "-m", "twinmoe.oracle", "check", "--subject", f"{file}:make"]
    return subprocess.run(
        [*command, *more, "--dtype", "bf16"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT / "ci" / "packages")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def promised(words: str) -> str:
    """The line of the guide that holds these words."""
    (line,) = [line for line in GUIDE.splitlines() if line.startswith("  ") and words in line]
    return line


@pytest.mark.slow
def test_the_guide_tells_what_happens(tmp_path: Path) -> None:
    """Wrong as printed, then open about ties, then equivalent, each with the words of the guide."""
    wrong = BLOCKS[0]
    done = check(tmp_path, wrong)
    assert done.returncode == 1, done.stderr
    assert promised("gate and up are swapped") in done.stdout

    tied = wrong.replace("up, gate =", "gate, up =")
    assert tied != wrong
    done = check(tmp_path, tied)
    assert done.returncode == 1, done.stderr
    assert promised("exact ties do not go") in done.stdout

    imports, contract = BLOCKS[1].strip().split("\n\ncontract = ")
    right = tied.replace('storage_contract("mine", config.dtype)', contract)
    done = check(tmp_path, f"{imports}\n{right}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nequivalent: " in done.stdout


@pytest.mark.slow
def test_the_example_of_several_ranks_tells_what_happens(tmp_path: Path) -> None:
    """Equivalent as printed; without the all-reduce, with the words of the guide."""
    (right,) = [block for block in BLOCKS if "def gathered(" in block]
    done = check(tmp_path, right, "my_ranks.py", "--ep", "1,2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nequivalent: " in done.stdout

    alone = right.replace("dist.all_reduce(share, group=place.group)", "pass")
    assert alone != right
    done = check(tmp_path, alone, "my_ranks.py", "--ep", "2")
    assert done.returncode == 1, done.stdout + done.stderr
    assert promised("the sum over ranks is missing") in done.stdout


def test_the_first_example_is_short() -> None:
    """Ten lines or so, of which a reader types every one."""
    body = BLOCKS[0].split("def forward(hidden):\n")[1].split("    return PlainLayer")[0]
    assert len([line for line in body.splitlines() if line.strip()]) == 10
