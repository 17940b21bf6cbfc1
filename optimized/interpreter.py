"""Spare Triton's interpreter two costs that dominate the run time of small kernels.

It rescans the whole language module at every call of a device function, although
the launch already prepared that module, and it widens every int32 operation to check
it for overflow.  Together they are about half of the time of a decode-size forward.
This touches private names of Triton: where a version lacks them, kernels run as
before, only slower.
"""

import dataclasses
import importlib
from typing import Any


def speed_up() -> None:
    """Drop both costs for this process; calling it again changes nothing."""
    # Not imported above: TRITON_INTERPRET has to be set before Triton is first imported.
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    builder = getattr(interpreter, "interpreter_builder", None)
    options: Any = getattr(builder, "options", None)
    if builder is not None and hasattr(options, "sanitize_overflow"):
        builder.options = dataclasses.replace(options, sanitize_overflow=False)
    known = all(hasattr(interpreter, name) for name in ("_patch_lang", "_LangPatchScope"))
    if known and not hasattr(interpreter._patch_lang, "patches_once"):
        interpreter._patch_lang = _patch_once(interpreter)


def _patch_once(interpreter: Any) -> Any:
    """Wrap ``_patch_lang`` to do nothing where its modules are patched already."""
    patch_lang, language = interpreter._patch_lang, interpreter.tl
    is_builtin = language.core.is_builtin

    def patch(function: Any) -> Any:
        visible = {id(value) for value in function.__globals__.values()}
        modules = [module for module in (language, language.core) if id(module) in visible]
        if any(is_builtin(m.load) or is_builtin(m.tensor.__add__) for m in modules):
            return patch_lang(function)
        return interpreter._LangPatchScope()

    patch.patches_once = True  # type: ignore[attr-defined]
    return patch
