"""A stand-in for CUDA graphs on a CPU, faithful to what makes graphs go wrong.

A CUDA graph replays the kernels it saw, on the addresses it saw; Python does not run
again.  The stand-in records every tensor operation below autograd, with its very
tensors, and every launch that passes :mod:`twinmoe.optimized.launch`.  A replay
re-executes them on the same storage.  So a tensor re-allocated after capture is not
seen, a Python branch is frozen, an output buffer is overwritten by the next replay:
stale-buffer faults show here as they would on a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from twinmoe.optimized import launch


class CaptureError(RuntimeError):
    """Something that a CUDA graph cannot hold was tried while capturing."""


#: Operations that need a value, or an output size, on the host.
_HOST_READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.equal.default,
}


class CpuGraph:
    """Record operations once, re-execute them at will, on the same tensors."""

    def __init__(self) -> None:
        self._tape: list[Callable[[], object]] = []

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Run the body and record it.

        Raises CaptureError for a host read, naming the operation, and for a capture
        inside a capture.
        """
        if launch.capturing():
            raise CaptureError("a capture is already live: graphs do not nest; end it first")
        recording = _Recording(self._tape)
        launch.record_to(recording.keep_launch)
        try:
            with recording:
                yield
        finally:
            launch.record_to(None)

    def replay(self) -> None:
        """Re-execute everything recorded, in order."""
        for step in self._tape:
            step()


class _Recording(TorchDispatchMode):
    """Runs each operation and writes its re-execution on the tape."""

    def __init__(self, tape: list[Callable[[], object]]) -> None:
        super().__init__()
        self._tape = tape
        self._inside_launch = False

    def keep_launch(self, name: str, operation: launch.Operation) -> None:
        """Run a kernel or collective; what it does inside is its own affair."""
        self._tape.append(lambda: launch.execute(name, operation))
        self._inside_launch = True
        try:
            launch.execute(name, operation)
        finally:
            self._inside_launch = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._inside_launch:
            return func(*args, **kwargs)
        _refuse_host_read(func, args)
        result = func(*args, **kwargs)
        step = _replay_step(func, args, kwargs, result)
        if step is not None:
            self._tape.append(step)
        return result


def _refuse_host_read(func: Any, args: tuple[Any, ...]) -> None:
    boolean_index = func is torch.ops.aten.index.Tensor and any(
        index is not None and index.dtype is torch.bool for index in args[1]
    )
    if func in _HOST_READS or boolean_index:
        raise CaptureError(
            f"{func} needs a value on the host during graph capture: a CUDA graph cannot "
            "wait for one; keep counts and masks on the device"
        )


def _replay_step(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> Callable[[], object] | None:
    """How to redo ``func`` into the tensors it produced; None if there is nothing to do."""
    if func._schema.is_mutable:
        return lambda: func(*args, **kwargs)
    outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    inputs = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
    fresh = [output for output in outputs if _storage(output) not in inputs]
    if not fresh or func in (
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_strided.default,
    ):
        return None  # a view of storage that other steps fill, or memory without content

    def redo() -> None:
        again = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
        for kept, new in zip(outputs, again, strict=True):
            kept.copy_(new)

    return redo


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
