"""What tests of the inference layer in the pytest process itself need."""

from collections.abc import Iterator

import pytest
import torch

from twinmoe.optimized.communication.pool_setup import release_pools


@pytest.fixture(autouse=True)
def no_pool_survives_its_test() -> Iterator[None]:
    """Let no test meet a pool whose size, or captured graphs, another test left behind."""
    yield
    release_pools(None)


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Compute as workers do: on tensors this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
