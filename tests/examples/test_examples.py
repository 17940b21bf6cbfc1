"""Each example runs by the command that it documents, and says what it says it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"

needs_transformers = pytest.mark.skipif(
    find_spec("transformers") is None, reason="runs blocks of transformers"
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the checkout's root."""
    command = [sys.executable, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "ci" / "packages")}
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def check(subject: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the documented command with few cases."""
    few = ["--dtype", "bf16", "--cases", "2"]
    return run(
        "-m", "twinmoe.oracle", "check", "--subject", f"examples/{subject}", *few, *arguments
    )


@pytest.mark.slow
@needs_transformers
@pytest.mark.parametrize("model", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"])
def test_blocks_of_transformers_are_equivalent(model: str) -> None:
    """Under the contract of their eager code."""
    done = check(f"hugging_face_blocks.py:{model}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nequivalent: " in done.stdout


@pytest.mark.slow
def test_the_grouped_layer_is_equivalent() -> None:
    """The plain grouped_mm layer."""
    done = check("grouped_mm_layer.py:GroupedLayer")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_template_is_equivalent_over_ranks() -> None:
    """The engine-style call with padding, sentinel and offset, on one rank and on two."""
    done = check("fused_moe_template.py:FusedLayer", "--ep", "1,2")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@needs_transformers
def test_the_wrong_adapter_is_caught_and_told_why() -> None:
    """Gate and up swapped: exit code 1, and the words that the file promises."""
    done = check("wrong_adapter.py:mixtral")
    assert done.returncode == 1, done.stdout + done.stderr
    (promised,) = re.findall(
        r"    (this is what .*)\n", (EXAMPLES / "wrong_adapter.py").read_text()
    )
    assert promised in done.stdout


@pytest.mark.skipif(find_spec("flashinfer") is not None, reason="FlashInfer is installed here")
def test_without_flashinfer_its_adapter_says_so() -> None:
    """Exit code 2, and the missing package by name."""
    done = check("flashinfer_moe.py:FlashInferLayer")
    assert done.returncode == 2
    assert "No module named 'flashinfer'" in done.stderr


@pytest.mark.slow
@needs_transformers
@pytest.mark.parametrize("arguments", [(), ("--ep", "2")], ids=["ep1", "ep2"])
def test_both_models_run_on_our_layer(arguments: tuple[str, ...]) -> None:
    """Every MoE layer of prefill and decode is equivalent."""
    done = run("examples/whole_model.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equivalent") == 2 * 2 * 2
    assert "NOT" not in done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_every_example_documents_its_command(path: Path) -> None:
    """The docstring of each file holds a command that names it."""
    docstring = path.read_text().split('"""')[1]
    assert f"examples/{path.name}" in docstring
