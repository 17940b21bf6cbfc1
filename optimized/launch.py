"""The one door through which kernels and collectives start, and are counted.

Three parties need to know what really ran: attestation (a forward may only claim
a path whose launches were counted), the watchdog (what was each rank doing when
it stopped?) and the CPU graph stand-in (which must re-execute launches that the
tensor library does not see).  All three listen here.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from twinmoe.optimized.triton_runtime import INTERPRETED

#: Launches so far in this process, by kernel or collective name.
COUNTS: Counter[str] = Counter()

#: Told each operation's name, and the sizes that all ranks must agree on, just before it starts.
observers: list[Callable[[str, str], None]] = []

Operation = Callable[[], None]

#: While the CPU stand-in captures: takes each operation, runs it and keeps it.
_recorder: Callable[[str, Operation, str], None] | None = None


def run(name: str, operation: Operation, on: str = "") -> None:
    """Run ``operation``, count it as ``name``, and let a live capture keep it.

    ``operation`` must touch only tensors that it closes over: a replay calls it
    again, on the same storage.  ``on`` says what a collective works on, alike on all ranks.
    """
    (_recorder or execute)(name, operation, on)


def execute(name: str, operation: Operation, on: str = "") -> None:
    """Run and count ``operation`` without offering it to a capture."""
    for observer in observers:
        observer(name, on)
    COUNTS[name] += 1
    operation()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """Launch a Triton kernel over ``grid``; counted under the kernel's own name."""
    run(kernel.fn.__name__, lambda: kernel[grid](*args, **kwargs))


def record_to(recorder: Callable[[str, Operation, str], None] | None) -> None:
    """Hand operations to ``recorder`` from now on; None ends the recording."""
    global _recorder  # noqa: PLW0603 - one capture at a time, as on a CUDA stream
    _recorder = recorder


def capturing() -> bool:
    """Is a graph being captured, by the CPU stand-in or on the current CUDA stream?"""
    if _recorder is not None:
        return True
    # An interpreted process never captures CUDA, and may be the fork of one that had found it.
    return (
        not INTERPRETED and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    )


def sizes(*tensors: torch.Tensor) -> str:
    """``[8, 2] int32, [8, 96] bfloat16``: what a collective works on, in words."""
    return ", ".join(f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors)
