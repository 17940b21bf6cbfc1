"""Symmetric memory of tests that run in the pytest process itself."""

from collections.abc import Iterator

import pytest

from twinmoe.optimized.communication.pool_setup import release_pools


@pytest.fixture(autouse=True)
def no_pool_survives_its_test() -> Iterator[None]:
    """Let no test meet a pool whose size, or captured graphs, another test left behind."""
    yield
    release_pools(None)
