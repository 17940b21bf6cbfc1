"""Replace a function at its seam for the length of a block, and put it back."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def wrapped(owner: type, name: str, wrap: Callable[[Callable[..., Any]], Any]) -> Iterator[None]:
    """``owner.name`` becomes ``wrap(original)`` inside the block."""
    original = getattr(owner, name)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        setattr(owner, name, original)
