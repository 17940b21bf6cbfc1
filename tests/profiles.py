"""Which of many alike a run takes: all of them in the nightly profile, a sample otherwise."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

#: Whether this run searches for long: see the table in tests/README.md.
NIGHTLY = os.environ.get("TWINMOE_PROFILE") == "nightly"


def sampled(values: Sequence[T], one_in: int) -> Sequence[T]:
    """Return ``values``, or every ``one_in``-th of them; the same ones in every run."""
    return values if NIGHTLY else values[::one_in]
