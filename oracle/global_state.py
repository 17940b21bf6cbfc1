"""State of the process that a forward may not change: read before, compared and put back after.

What one case leaves changed, later cases mean otherwise.  A row for each state: its name, how it
is read, how it is put back.  Every change is a finding, but for two that are legal.  Random numbers
may be drawn and generators seeded: nothing of the judge's draws from the global ones, and to put
them back would give a random layer the same answer twice.  And libraries keep settings of their
own in the environment, which are put back without a word.
"""

import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import backends


@dataclass(frozen=True)
class State:
    """One state: ``read`` returns what ``restore`` takes."""

    name: str
    read: Callable[[], Any]
    restore: Callable[[Any], object]


#: Where torch keeps how fp32 is multiplied, in its present words.
_MULTIPLIES_FP32: tuple[Any, ...] = (
    backends.cuda.matmul,
    backends.cudnn,
    backends.mkldnn.matmul,  # type: ignore[attr-defined]
)

_SIGNALS = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM,
    signal.SIGCHLD, signal.SIGPIPE, signal.SIGUSR1, signal.SIGUSR2,
)  # fmt: skip

#: What torch, Triton and CUDA write into the environment for themselves.
_LIBRARIES_OWN = re.compile(r"CUDA_MODULE_LOADING$|TORCHINDUCTOR_|TRITON_|PYTORCH_|KMP_")


def _read_precision() -> tuple[str, ...]:
    return (
        torch.get_float32_matmul_precision(),
        *(backend.fp32_precision for backend in _MULTIPLIES_FP32),
    )


def _restore_precision(before: tuple[str, ...]) -> None:
    torch.set_float32_matmul_precision(before[0])
    for backend, precision in zip(_MULTIPLIES_FP32, before[1:], strict=True):
        backend.fp32_precision = precision


def _read_reductions() -> tuple[bool, bool]:
    matmul = backends.cuda.matmul
    return (
        bool(matmul.allow_bf16_reduced_precision_reduction),
        bool(matmul.allow_fp16_reduced_precision_reduction),
    )


def _restore_reductions(before: tuple[bool, bool]) -> None:
    matmul = backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = before[0]
    matmul.allow_fp16_reduced_precision_reduction = before[1]


def _restore_device(before: torch.device) -> None:
    # Naming the CPU would leave a mode behind that every operation passes through.
    torch.set_default_device(None if before.type == "cpu" else before)


def _restore_environment(before: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(before)


def _read_signals() -> tuple[Any, ...]:
    return tuple(map(signal.getsignal, _SIGNALS))


def _restore_signals(before: tuple[Any, ...]) -> None:
    for number, handler in zip(_SIGNALS, before, strict=True):
        if handler is not None and signal.getsignal(number) != handler:
            signal.signal(number, handler)  # None: it was not Python's, and cannot come back


STATES: Sequence[State] = (
    State("the default dtype", torch.get_default_dtype, torch.set_default_dtype),
    State("the default device", torch.get_default_device, _restore_device),
    State(
        "deterministic mode",
        torch.get_deterministic_debug_mode,
        torch.set_deterministic_debug_mode,
    ),
    State("grad mode", torch.is_grad_enabled, torch.set_grad_enabled),
    State("the number of threads", torch.get_num_threads, torch.set_num_threads),
    State("the precision of fp32 products", _read_precision, _restore_precision),
    State("the precision of 16-bit sums", _read_reductions, _restore_reductions),
    State("the environment", lambda: dict(os.environ), _restore_environment),
    State("signal handlers", _read_signals, _restore_signals),
    State("the current folder", Path.cwd, os.chdir),
)


def read() -> list[Any]:
    """All states now, for :func:`put_back`."""
    return [state.read() for state in STATES]


def put_back(before: Sequence[Any], states: Sequence[State] = STATES) -> Iterator[str]:
    """Undo what has changed since ``before`` was read; name what may not change."""
    for state, old in zip(states, before, strict=True):
        new = state.read()
        if new == old:
            continue
        state.restore(old)
        if told := _change(state, old, new):
            yield told


def _change(state: State, old: Any, new: Any) -> str:
    """Old and new in words; of the environment, the variables; empty for a legal change."""
    if not isinstance(old, dict):
        return f"{state.name} from {old} to {new}"
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    named = [name for name in changed if not _LIBRARIES_OWN.match(name)]
    return f"{state.name}: {', '.join(named)}" if named else ""


class Growth:
    """Memory that grows by megabytes with every forward, many times on end.

    The cases are small: a layer's own tensors are kilobytes.  What a first call compiles or
    caches comes once or a few times; only what goes on is a leak.
    """

    #: A forward that leaves so many bytes more ...
    STEP = 8 << 20
    #: ... so often in a row leaks: beyond what torch compiles one function for (8 times).
    TIMES = 10

    def __init__(self) -> None:
        self._in_a_row, self._bytes = 0, 0

    def add(self, grown: int) -> str:
        """Count one forward; say so where it was one too many."""
        if grown < self.STEP:
            self._in_a_row = self._bytes = 0
            return ""
        self._in_a_row, self._bytes = self._in_a_row + 1, self._bytes + grown
        if self._in_a_row < self.TIMES:
            return ""
        each = self._bytes / self._in_a_row / (1 << 20)
        told = f"{self._in_a_row} forwards on end left {each:.0f} MB more each in this process"
        self._in_a_row = self._bytes = 0
        return f"{told}: memory is kept that nobody can use; release it with the call"


def resident_bytes() -> int:
    """What this process holds in memory now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
