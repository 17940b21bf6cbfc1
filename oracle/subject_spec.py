"""Subjects by name: our twins, or ``package.module:factory`` of anyone's layer.

A name travels to the workers, and each of them imports it for itself.
"""

import hashlib
import importlib
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

from twinmoe.oracle.case import Case
from twinmoe.oracle.failures import Raised
from twinmoe.oracle.layer_space import fitted, narrow_of
from twinmoe.oracle.plain_layer import LayerFactory, PlainSubject
from twinmoe.oracle.subject import SUBJECTS, SubjectFactory
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.config import ConfigError

_FORM = "write package.module:factory or path/to/file.py:factory"


@dataclass(frozen=True)
class PlainName:
    """Anyone's layer by name; importable here, as it will be in every worker."""

    text: str

    def __post_init__(self) -> None:
        load_factory(self.text)

    @property
    def digest(self) -> str:
        """SHA-256 of the file that the name stands for: another layer may lie there tomorrow."""
        module = self.text.rpartition(":")[0]
        named = module if module.endswith(".py") else getattr(sys.modules[module], "__file__", None)
        file = Path(named or "")
        return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""

    def fit(self, case: Case) -> Case:
        """``case`` as one that the layer can be asked: see :func:`fitted`.

        Raises ConfigError where what the factory declared with ``runs`` raises.
        """
        try:
            return fitted(case, narrow_of(load_factory(self.text)))
        except Exception as error:  # whatever a function of somebody's stumbles over
            raise ConfigError(
                f"{_place(error)}{Raised.of(error)}\n  what {self.text} declares with "
                "runs failed on a layer's config: it takes any MoEConfig to one that it can run"
            ) from error


def subject_factory(name: str) -> SubjectFactory:
    """The twin, or the adapter around anyone's layer, that ``name`` stands for.

    Raises ConfigError as :func:`load_factory` does.
    """
    if name in SUBJECTS:
        return SUBJECTS[name]
    return partial(PlainSubject, name, load_factory(name))


def load_layers(_context: RankContext, names: Sequence[str]) -> None:
    """Import all that ``names`` stand for on this rank, so that no forward has to."""
    for name in names:
        subject_factory(name)


@cache
def load_factory(name: str) -> LayerFactory:
    """Import the factory that ``name`` stands for.

    Raises ConfigError for a name that is none, a module that is not found or fails to import,
    and an attribute that is missing or cannot be called.
    """
    module_name, colon, attribute = name.rpartition(":")
    if not colon or not module_name or not attribute.isidentifier():
        raise ConfigError(f"subject ({name!r}) is no name of a layer: {_FORM}")
    module = _imported(name, module_name)
    factory = getattr(module, attribute, None)
    if factory is None:
        raise ConfigError(
            f"subject ({name!r}): {module_name} has no {attribute!r}; it defines "
            f"{', '.join(_own_callables(module)) or 'nothing that can be called'}: correct the name"
        )
    if not callable(factory):
        raise ConfigError(
            f"subject ({name!r}): {attribute!r} is {type(factory).__name__}, which cannot be "
            "called: give a function of (config, weights, place) that returns a layer"
        )
    loaded: LayerFactory = factory
    return loaded


def spec_of(factory: str | Callable[..., Any]) -> str:
    """The name of a factory, by which another process finds it; a name is its own."""
    if isinstance(factory, str):
        return factory
    file = getattr(sys.modules.get(factory.__module__), "__file__", None)
    if file is None or not factory.__qualname__.isidentifier():
        raise ConfigError(
            f"subject ({factory!r}) has no name that a worker could import: define it at the top "
            "of a module or file"
        )
    return f"{file}:{factory.__qualname__}"


def _imported(name: str, module_name: str) -> ModuleType:
    # A file is imported as ``python file.py`` would: its folder is where it finds its siblings.
    path = Path(module_name)
    if path.suffix == ".py":
        if not path.is_file():
            raise ConfigError(f"subject ({name!r}): there is no file {path}; {_FORM}")
        module_name, folder = path.stem, str(path.resolve().parent)
    else:
        folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever a module of somebody's stumbles over
        raise ConfigError(
            f"{_place(error)}{Raised.of(error)}\n  subject ({name!r}) cannot be "
            f"imported: {_FORM}, as seen from {Path.cwd()}"
        ) from error
    imported = Path(module.__file__ or "")
    if path.suffix == ".py" and not (imported.exists() and imported.samefile(path)):
        raise ConfigError(
            f"subject ({name!r}): the name {module_name!r} is taken by {imported}: a module is "
            "imported by its name; rename the file"
        )
    return module


def _place(error: BaseException) -> str:
    """The last line of anyone's own file on the way to ``error``; empty if it has no part in it."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: "
    ours = (str(Path(__file__).parent), "<frozen importlib", importlib.__file__)
    trace = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in trace if not frame.filename.startswith(ours)]
    theirs = [frame for frame in frames if frame.filename == frames[0].filename]
    return f"{theirs[-1].filename}:{theirs[-1].lineno}: " if theirs else ""


def _own_callables(module: ModuleType) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__
    ]
