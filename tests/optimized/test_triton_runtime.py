"""TRITON_INTERPRET is read once, and as Triton reads it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_PROGRAM = "from twinmoe.optimized.triton_runtime import INTERPRETED; print(INTERPRETED)"


@pytest.mark.parametrize(
    ("value", "expected"), [("1", True), ("true", True), ("on", True), ("0", False), (None, True)]
)
def test_every_spelling_means_what_it_means_to_triton(value: str | None, expected: bool) -> None:
    """What Triton interprets is never taken for compiled; without a GPU that is the default."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "ci" / "packages")}
    environment.pop("TRITON_INTERPRET", None)
    if value is not None:
        environment["TRITON_INTERPRET"] = value
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        env=environment, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert run.stdout.strip() == str(expected)
