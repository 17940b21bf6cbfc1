"""What Triton's interpreter needs from us: a mend, less work, and a look whether it runs at all.

The mend: Triton 3.6 converts arrays of one element with ``int``, which NumPy 2.4 refuses, and every
loop over a loaded count ends there.  The work: it rescans the whole language module at every call
of a device function, although the launch already prepared that module, it builds a table of dtypes
for every tensor, and it widens every int32 operation to check it for overflow.  Together these are
about half of the time of a decode-size forward.  All this touches private names of Triton: each
change is made where a probe finds the behaviour that it is for, and kernels otherwise run as Triton
made them.
"""

import dataclasses
import functools
import importlib
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import numpy
import torch

from twinmoe.optimized.triton_runtime import tl


def prepare() -> None:
    """Mend and speed up the interpreter of this process; calling it again changes nothing."""
    # Not imported above: compiled kernels have no use for it.
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    _convert_single_elements(interpreter)
    _speed_up(interpreter)


@functools.cache
def trouble() -> str | None:
    """Say why Triton's interpreter cannot run kernels with these versions; None if it can.

    It runs one, which loops over a loaded count, also where this process compiles its own.
    """
    try:
        prepare()
        interpreter: Any = importlib.import_module("triton.runtime.interpreter")
        total, count = torch.zeros(1, dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
        interpreter.InterpretedFunction(_count_up)[(1,)](total, count)
    except Exception as error:  # whatever it is, no kernel would get further
        return f"{_versions()} do not interpret kernels ({type(error).__name__}: {error})"
    if total.item() != count.item():
        return f"{_versions()} misinterpret kernels (counted {total.item()}, not {count.item()})"
    return None


def _count_up(total_ptr: Any, count_ptr: Any) -> None:
    """Add 1 to a total as often as a count says."""
    for _ in range(tl.load(count_ptr)):
        tl.store(total_ptr, tl.load(total_ptr) + 1)


def _versions() -> str:
    return " and ".join(
        f"{title} {metadata.version(title.lower())}" for title in ("Triton", "NumPy")
    )


def _convert_single_elements(interpreter: Any) -> None:
    patch_tensor = getattr(interpreter, "_patch_lang_tensor", None)
    if patch_tensor is None or _converts_single_elements(patch_tensor):
        return

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


def _converts_single_elements(patch_tensor: Any) -> bool:
    """Ask the ``__index__`` that Triton gives its tensors for that of a tensor of one element."""
    given: dict[str, Any] = {}
    scope = SimpleNamespace(set_attr=lambda _tensor, name, value: given.update({name: value}))
    patch_tensor(object(), scope)
    one = SimpleNamespace(handle=SimpleNamespace(data=numpy.array([3], dtype=numpy.int32)))
    try:
        return "__index__" not in given or given["__index__"](one) == 3
    except TypeError:
        return False


def _speed_up(interpreter: Any) -> None:
    builder = getattr(interpreter, "interpreter_builder", None)
    options: Any = getattr(builder, "options", None)
    if builder is not None and hasattr(options, "sanitize_overflow"):
        builder.options = dataclasses.replace(options, sanitize_overflow=False)
    known = all(hasattr(interpreter, name) for name in ("_patch_lang", "_LangPatchScope"))
    if known and not hasattr(interpreter._patch_lang, "patches_once"):
        interpreter._patch_lang = _patch_once(interpreter)
    convert = getattr(interpreter, "_get_np_dtype", None)
    if convert is not None and not hasattr(convert, "remembers"):
        interpreter._get_np_dtype = _remember_dtypes(convert)


def _patch_once(interpreter: Any) -> Any:
    """Wrap ``_patch_lang`` to do nothing where its modules are patched already."""
    patch_lang, language = interpreter._patch_lang, interpreter.tl
    is_builtin = language.core.is_builtin

    @functools.cache
    def modules_of(function: Any) -> list[Any]:
        visible = {id(value) for value in function.__globals__.values()}
        return [module for module in (language, language.core) if id(module) in visible]

    def patch(function: Any) -> Any:
        modules = modules_of(function)
        if any(is_builtin(m.load) or is_builtin(m.tensor.__add__) for m in modules):
            return patch_lang(function)
        return interpreter._LangPatchScope()

    patch.patches_once = True  # type: ignore[attr-defined]
    return patch


def _remember_dtypes(convert: Any) -> Any:
    """Wrap ``_get_np_dtype``, which builds its whole table anew for every tensor."""
    known: dict[str, Any] = {}

    def remembered(dtype: Any) -> Any:
        scalar = dtype.scalar
        if scalar.is_ptr():
            return convert(dtype)
        if scalar.name not in known:
            known[scalar.name] = convert(scalar)
        return known[scalar.name]

    remembered.remembers = True  # type: ignore[attr-defined]
    return remembered
