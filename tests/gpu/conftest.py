"""Tests of this folder need a CUDA device; elsewhere they are skipped, counted and say why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark this folder's tests as gpu tests, and skip them where there is no CUDA device."""
    ours = [item for item in items if Path(__file__).parent in item.path.parents]
    available = torch.cuda.is_available()
    for item in ours:
        item.add_marker(pytest.mark.gpu)
        if not available:
            reason = f"no CUDA device here: none of the {len(ours)} tests in tests/gpu can run"
            item.add_marker(pytest.mark.skip(reason=reason))
