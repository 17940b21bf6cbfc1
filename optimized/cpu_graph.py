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
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from twinmoe.optimized import launch


class CaptureError(RuntimeError):
    """Something that a CUDA graph cannot hold was tried while capturing."""


#: What PyTorch marks operations with that need a value, or an output size, on the host.
_HOST_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

#: Host reads that leave no tensor operation behind.
_HOST_COPIES = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__}

#: Dtypes of an index that selects by truth, hence a number of elements known only on the device.
_MASKS = (torch.bool, torch.uint8)

#: Memory without content: a replay finds there what the last replay left, as on a GPU.
_ALLOCATIONS = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_permuted,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
}


class CpuGraph:
    """Record operations once, re-execute them at will, on the same tensors."""

    def __init__(self) -> None:
        self._tape: list[Callable[[], object]] | None = None

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Run the body and record it.

        Raises CaptureError for a host read, naming the operation, for a capture inside a
        capture, and for a second capture into the same graph.
        """
        if launch.capturing():
            raise CaptureError("a capture is already live: graphs do not nest; end it first")
        if self._tape is not None:
            raise CaptureError("this graph is captured already: make a new one for each capture")
        tape: list[Callable[[], object]] = []
        recording = _Recording(tape)
        launch.record_to(recording.keep_launch)
        try:
            with _HostCopyGuard(recording), recording:
                yield
        finally:
            launch.record_to(None)
        self._tape = tape

    @torch.no_grad()
    def replay(self) -> None:
        """Re-execute everything recorded, in order.

        Raises CaptureError without a completed capture, and inside a live one.
        """
        if self._tape is None:
            raise CaptureError("there is nothing to replay: no capture of this graph was completed")
        if launch.capturing():
            raise CaptureError("a replay inside a live capture is not recorded: end it first")
        for step in self._tape:
            step()


class _Recording(TorchDispatchMode):
    """Runs each operation and writes its re-execution on the tape."""

    def __init__(self, tape: list[Callable[[], object]]) -> None:
        super().__init__()
        self._tape = tape
        self.inside_launch = False

    def keep_launch(self, name: str, operation: launch.Operation, on: str) -> None:
        """Run a kernel or collective; what it does inside is its own affair."""
        self._tape.append(lambda: launch.execute(name, operation, on))
        self.inside_launch = True
        try:
            launch.execute(name, operation, on)
        finally:
            self.inside_launch = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.inside_launch:
            return func(*args, **kwargs)
        _refuse_host_read(func, args)
        result = func(*args, **kwargs)
        step = _replay_step(func, args, kwargs, result)
        if step is not None:
            self._tape.append(step)
        return result


class _HostCopyGuard(TorchFunctionMode):
    """Refuses what reads tensors without an operation that the recording could see."""

    def __init__(self, recording: _Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _HOST_COPIES and not self._recording.inside_launch:
            _refuse(f"Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))


def _refuse_host_read(func: Any, args: tuple[Any, ...]) -> None:
    if func.overloadpacket is torch.ops.aten.index:
        reads = _has_mask(args[1])
    elif func.overloadpacket in (torch.ops.aten.index_put, torch.ops.aten.index_put_):
        # A single value is written as a masked fill, which needs no count.
        reads = _has_mask(args[1]) and args[2].numel() != 1
    else:
        reads = not _HOST_READS.isdisjoint(func.tags)
    if reads:
        _refuse(str(func))


def _has_mask(indices: tuple[Tensor | None, ...]) -> bool:
    return any(index is not None and index.dtype in _MASKS for index in indices)


def _refuse(name: str) -> NoReturn:
    raise CaptureError(
        f"{name} needs a value on the host during graph capture: a CUDA graph cannot "
        "wait for one; keep counts and masks on the device"
    )


def _replay_step(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> Callable[[], object] | None:
    """How to redo ``func`` into the tensors it produced; None if there is nothing to do."""
    if func.overloadpacket in _ALLOCATIONS:
        return None
    outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    inputs = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
    is_fresh = [_storage(output) not in inputs for output in outputs]
    if not any(is_fresh) and not func._schema.is_mutable:
        return None  # views of storage that other steps fill

    def redo() -> None:
        again = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
        for kept, new, fresh in zip(outputs, again, is_fresh, strict=True):
            if fresh:
                kept.copy_(new)

    return redo


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
