"""The property for other people's test files, run by pytest as they would run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.oracle import plain_layers
from twinmoe.oracle.testing import equivalence_property
from twinmoe.reference.config import ConfigError

PACKAGES = Path(__file__).resolve().parents[2] / "ci" / "packages"

TEN_LINES = f"""
from hypothesis import settings
from twinmoe.oracle.testing import equivalence_property
settings.register_profile("few", max_examples=3, derandomize=True)
settings.load_profile("few")
test_right = equivalence_property("{plain_layers.__file__}:right", ep_sizes=(1, 2), dtypes=["bf16"])
test_swapped = equivalence_property("{plain_layers.__file__}:swapped", dtypes=["bf16"])
"""


@pytest.mark.slow
def test_a_file_of_ten_lines_is_a_test(tmp_path: Path) -> None:
    """A right layer passes at each size; a wrong one fails with verdict, mistake and replay."""
    (tmp_path / "test_mine.py").write_text(TEN_LINES)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"]
    environment = os.environ | {"PYTHONPATH": str(PACKAGES)}
    run = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert "1 failed, 2 passed" in run.stdout, run.stdout + run.stderr
    assert "FAILED test_mine.py::test_swapped[ep1-bf16]" in run.stdout
    assert "this is what one gets if gate and up are swapped" in run.stdout
    assert "twinmoe replay --subject" in run.stdout


def test_a_wrong_name_fails_at_collection() -> None:
    """A factory that is not there is told before any test runs."""
    with pytest.raises(ConfigError, match="has no 'nothing'"):
        equivalence_property(f"{plain_layers.__file__}:nothing")


test_the_readable_twin = equivalence_property(plain_layers.silent, dtypes=("fp32",))
