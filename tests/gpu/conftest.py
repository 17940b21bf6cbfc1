"""Tests of this folder need a CUDA device; elsewhere they are skipped, counted and say why."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from twinmoe.optimized.communication.pool_setup import release_pools

#: (model, GPUs, dtype, transport, backend, mode, verdict) of every path judged at real widths.
PATHS: list[tuple[Any, ...]] = []


def sizes() -> list[int]:
    """Group sizes to test: TWINMOE_GPUS ("2,4"), or 1, 2, 4 and 8, as far as there are GPUs.

    One without a GPU too, so that its tests are counted as skipped.
    """
    wanted = os.environ.get("TWINMOE_GPUS", "1,2,4,8").split(",")
    available = max(torch.cuda.device_count(), 1)
    return [int(size) for size in wanted if int(size) <= available]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark this folder's tests as gpu tests, and skip them where there is no CUDA device."""
    ours = [item for item in items if Path(__file__).parent in item.path.parents]
    available = torch.cuda.is_available()
    for item in ours:
        item.add_marker(pytest.mark.gpu)
        if not available:
            reason = f"no CUDA device here: none of the {len(ours)} tests in tests/gpu can run"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _own_pool() -> None:
    """Graphs of earlier tests pin this process' pool, which a larger layer may then not grow."""
    release_pools(None)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Show worst ratio and flips of every path at real widths, worst mode of each."""
    if not PATHS:
        return
    terminalreporter.section("published widths: error / allowed error, and flips")
    rows: dict[tuple[Any, ...], list[Any]] = {}
    for *path, _mode, verdict in PATHS:
        rows.setdefault(tuple(path), []).append(verdict)
    for path, verdicts in rows.items():
        model, gpus, dtype, transport, backend = path
        worst = max(verdict.worst_ratio for verdict in verdicts)
        elements = sum(verdict.elements for verdict in verdicts)
        flips = sum(verdict.flips for verdict in verdicts) / max(elements, 1)
        expected = sum(verdict.expected_flips for verdict in verdicts) / max(elements, 1)
        word = "equivalent" if all(v.equivalent for v in verdicts) else "NOT EQUIVALENT"
        terminalreporter.write_line(
            f"{model:14} {gpus} GPU {dtype} {transport:5} {backend:10} worst {worst:.3f}  "
            f"flips {100 * flips:.2f} % ({100 * expected:.2f} % expected)  {word}"
        )
