"""Values on the pipe between the driver and its workers.

Plain pickle sends a tensor's whole storage and PyTorch's multiprocessing pickler
sends file descriptors, which leak when a worker is killed.  Here a tensor travels as
the bytes of its own elements and arrives as a contiguous CPU tensor without gradient.
"""

import importlib.util
import io
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

#: What a worker runs: ``function(rank_context, *args)``.
Task = tuple[Callable[..., Any], tuple[Any, ...]]


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            return NotImplemented
        flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        return _tensor, (flat.view(torch.uint8).numpy().tobytes(), value.dtype, tuple(value.shape))


def _tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).reshape(shape)


def dumps(value: Any) -> bytes:
    """Pickle ``value`` with its tensors by value."""
    buffer = io.BytesIO()
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def dump_task(task: Task) -> bytes:
    """Pickle ``task`` together with the file that defines its function.

    A test module imported by path is not importable by name in another process.
    """
    function, _ = task
    file = getattr(sys.modules.get(function.__module__), "__file__", None)
    return pickle.dumps((function.__module__, file, dumps(task)))


def load_task(data: bytes) -> Task:
    """Inverse of :func:`dump_task`, in a worker."""
    module, file, task = pickle.loads(data)
    if module not in sys.modules and file is not None and not _importable(module):
        _import_file(module, file)
    loaded: Task = pickle.loads(task)
    return loaded


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _import_file(name: str, file: str) -> None:
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"no module named {name!r}, and {file} is not a Python file")
    # Pickle imports a module's parents first: stand-ins that find its siblings.
    parents = name.split(".")[:-1]
    for depth in range(len(parents), 0, -1):
        parent = types.ModuleType(".".join(parents[:depth]))
        parent.__path__ = [str(Path(file).parents[len(parents) - depth])]
        sys.modules.setdefault(parent.__name__, parent)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
