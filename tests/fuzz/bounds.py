"""Bounds on what reading one input may take: seconds and memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Far more than any of these small inputs needs, on a busy machine too.
SECONDS, BYTES = 10.0, 2**30


@contextmanager
def bounded() -> Iterator[None]:
    """Fail what uses more processor time; what asks for more memory gets none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, hard))
    begun = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.process_time() - begun < SECONDS
