"""What is left behind: memory that stays mapped, a name that stays, a descriptor left open."""

import os
from pathlib import Path

import torch

from twinmoe.optimized.communication.cpu_symmetric_memory import CpuSymmetricAllocation
from twinmoe.oracle.resources import held, left_since


def test_nothing_is_left() -> None:
    """Memory that was closed, and whose tensors are gone, is not reported."""
    before = held()
    memory = CpuSymmetricAllocation(4096, 64)
    mapped = memory.rendezvous(None)
    memory.seal()
    mapped.close()
    del mapped
    assert left_since(before) == []


def test_mapping_is_left() -> None:
    """A view of the buffer keeps it mapped, and its file open, until the view goes."""
    before = held()
    memory = CpuSymmetricAllocation(4096, 64)
    mapped = memory.rendezvous(None)
    memory.seal()
    view: torch.Tensor | None = mapped.buffer[:16]
    mapped.close()
    del mapped
    opened, still_mapped = left_since(before)
    assert opened.startswith("/dev/shm/twinmoe-")
    assert opened.endswith("still open after the release")
    assert still_mapped.startswith("8 KiB of /dev/shm/twinmoe-")
    assert view is not None
    view = None
    assert left_since(before) == []


def test_name_and_descriptor_are_left() -> None:
    """A file that keeps its name, and is open, is told twice."""
    before = held()
    path = Path(f"/dev/shm/twinmoe-{os.getpid()}-left")
    with path.open("w"):
        told = left_since(before)
        path.unlink()
    assert [text.split(" ", 1)[1] for text in told] == [
        "is still open after the release"
        if "open" in text
        else "still has its name after the release: nobody will map it any more"
        for text in told
    ]
    assert len(told) == 2


def test_what_was_there_before_is_not_told() -> None:
    """Only what came since counts: whoever runs in the same process may hold his own."""
    memory = CpuSymmetricAllocation(4096, 64)
    mapped = memory.rendezvous(None)
    memory.seal()
    assert left_since(held()) == []
    mapped.close()
