"""The recipes of ci/examples: they parse, and what they call exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="reads workflow files")

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "ci" / "examples"
WORKFLOWS = sorted(RECIPES.glob("*.yml"))


def steps_of(path: Path) -> list[dict[str, Any]]:
    """All steps of a workflow's jobs."""
    workflow = yaml.safe_load(path.read_text())
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_one(path: Path) -> None:
    """Each has jobs with a time limit, and every step either uses an action or runs a command."""
    workflow = yaml.safe_load(path.read_text())
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())
    assert all(("uses" in step) != ("run" in step) for step in steps_of(path))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_scripts_and_profiles_that_it_names_exist(path: Path) -> None:
    """ci/ scripts are in this checkout, profiles in the conftest.py beside the recipe."""
    text = path.read_text()
    for script in re.findall(
        r"\bci/[a-z]+\b(?!/)", "\n".join(s.get("run", "") for s in steps_of(path))
    ):
        assert (ROOT / script).exists()
    profiles = re.findall(r'register_profile\("(\w+)"', (RECIPES / "conftest.py").read_text())
    assert set(re.findall(r"TWINMOE_PROFILE: (\w+)", text)) <= set(profiles)


@pytest.mark.slow
def test_cells_are_spread_and_failures_kept(tmp_path: Path) -> None:
    """Two xdist workers share the cells of one property; what failed lies in the database."""
    layers = ROOT / "tests" / "oracle" / "plain_layers.py"
    (tmp_path / "conftest.py").write_text(
        (RECIPES / "conftest.py").read_text().replace("max_examples=20", "max_examples=2")
    )
    (tmp_path / "test_moe.py").write_text(
        "from twinmoe.oracle.testing import equivalence_property\n"
        "from twinmoe.reference.config import MoEConfig\n"
        "model = MoEConfig(hidden_size=32, moe_intermediate_size=16, num_experts=4,\n"
        "    num_experts_per_tok=2)\n"
        f"layers = '{layers}'\n"
        "test_right = equivalence_property(\n"
        "    f'{layers}:right', dtypes=['bf16', 'fp32'], model=model)\n"
        "test_swapped = equivalence_property(f'{layers}:swapped', dtypes=['bf16'], model=model)\n"
    )
    command = [sys.executable, "-m", "pytest", "-v", "-n", "2", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "test_moe.py"],
        cwd=tmp_path,
        # the layers import what stands beside them in the checkout
        env=os.environ
        | {"PYTHONPATH": f"{ROOT / 'ci' / 'packages'}:{ROOT}", "TWINMOE_PROFILE": "quick"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert "1 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    assert {"[gw0]", "[gw1]"} <= set(re.findall(r"\[gw\d\]", done.stdout))
    assert list((tmp_path / ".hypothesis" / "examples").iterdir())
