"""What a process still holds of ours when everything was released: no more than before.

Symmetric memory on a CPU is a file under /dev/shm, whose name goes once it is mapped; a
mapping that survives its pool is memory that nobody can ever use again.
"""

import gc
import os
import re
from collections.abc import Iterator
from pathlib import Path

RELATION = "resources"

_SHARED_MEMORY = Path("/dev/shm")
_OURS = re.compile(rf"{_SHARED_MEMORY}/twinmoe-\S+")

_MAPS, _DESCRIPTORS = Path("/proc/self/maps"), Path("/proc/self/fd")


def held() -> frozenset[str]:
    """Mappings, names and descriptors of this process's symmetric memory, in words.

    Memory of a GPU is not seen: its allocator tells no owner.
    """
    return frozenset(_held()) if _MAPS.exists() else frozenset()  # told by Linux alone


def left_since(before: frozenset[str]) -> list[str]:
    """Say what is held that was not ``before``; call it when all of that should be gone."""
    if held() <= before:
        return []
    gc.collect()  # a graph and its recording hold each other
    return sorted(held() - before)


def _held() -> Iterator[str]:
    for line in _MAPS.read_text().splitlines():
        if found := _OURS.search(line):
            yield f"{_kib(line)} KiB of {found[0]} are still mapped after the release"
    for path in _SHARED_MEMORY.glob(f"twinmoe-{os.getpid()}-*"):
        yield f"{path} still has its name after the release: nobody will map it any more"
    for descriptor in _DESCRIPTORS.iterdir():
        if _OURS.match(_target(descriptor)):
            yield f"{_target(descriptor)} is still open after the release"


def _kib(mapping: str) -> int:
    start, end = (int(address, 16) for address in mapping.split(maxsplit=1)[0].split("-"))
    return (end - start) // 1024


def _target(descriptor: Path) -> str:
    try:
        return str(descriptor.readlink())
    except OSError:  # the one that this listing itself had open
        return ""
