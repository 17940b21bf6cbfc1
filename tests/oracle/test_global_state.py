"""What a forward changes in its process is named and put back; what is legal is left alone."""

import os
import random
import signal
from collections.abc import Callable

import numpy as np
import pytest
import torch

from twinmoe.oracle import global_state
from twinmoe.oracle.global_state import Growth
from twinmoe.oracle.side_effects import noticed


def _listen(*_: object) -> None:
    """A handler."""


CHANGES: dict[str, Callable[[], object]] = {
    "the default dtype": lambda: torch.set_default_dtype(torch.float64),
    "the default device": lambda: torch.set_default_device("meta"),
    "deterministic mode": lambda: torch.set_deterministic_debug_mode("warn"),
    "grad mode": lambda: torch.set_grad_enabled(not torch.is_grad_enabled()),
    "the number of threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "the precision of fp32 products": lambda: torch.set_float32_matmul_precision("high"),
    "the precision of 16-bit sums": lambda: setattr(
        torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False
    ),
    "the environment": lambda: os.environ.update(TWINMOE_TEST_LEFT="1"),
    "signal handlers": lambda: signal.signal(signal.SIGUSR2, _listen),
    "the current folder": lambda: os.chdir("/"),
}


@pytest.mark.parametrize("name", [state.name for state in global_state.STATES])
def test_a_change_is_named_and_put_back(name: str) -> None:
    """Each state of the table, and no other beside it."""
    before = global_state.read()
    with noticed("the forward") as left:
        CHANGES[name]()
    (told,) = left
    assert told.startswith(f"the forward changed {name}")
    assert global_state.read() == before


def test_random_numbers_are_anyones_to_draw() -> None:
    """A draw, or a seed, is legal, and goes on: a random layer must not look deterministic."""
    with noticed("the forward") as left:
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        first = torch.rand(1)
    assert left == []
    assert not torch.equal(first, torch.rand(1))


def test_an_exception_is_no_excuse() -> None:
    """What is changed on the way to it is put back, too."""
    before = torch.get_default_dtype()

    @noticed("the forward")
    def fail() -> None:
        torch.set_default_dtype(torch.float64)
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_default_dtype() == before


def test_memory_that_grows_with_every_forward_is_a_leak() -> None:
    """Fifty megabytes ten times on end; a few first calls that compile are none."""
    growth = Growth()
    assert [growth.add(50 << 20) for _ in range(9)] == [""] * 9
    assert growth.add(50 << 20).startswith("10 forwards on end left 50 MB more each")
    assert [growth.add(size << 20) for size in (50, 50, 0, 50, 50) * 3] == [""] * 15
