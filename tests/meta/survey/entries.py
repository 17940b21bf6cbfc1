"""What an entry of the surveys is: a layer of somebody's, wrong in one way or right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from twinmoe.oracle.plain_layer import LayerFactory
from twinmoe.oracle.testing import neutral, runs
from twinmoe.reference.config import MoEConfig

Built = TypeVar("Built", bound=type)


@dataclass(frozen=True)
class Layer:
    """A factory by the name under which ``--subject`` finds it.

    ``source`` is the public report of the mistake, empty for a layer that has none.  ``what``
    it does, in a sentence.  ``stages`` are those that a verdict may name: the stage where the
    mistake is made, and the output where the layer shows nothing from which to tell it; empty
    where a process fails.  ``ep_size`` is that of the world in which it is asked.
    """

    name: str
    subject: str
    what: str
    source: str
    stages: tuple[str, ...]
    ep_size: int

    @property
    def is_wrong(self) -> bool:
        """Whether the judge should say so."""
        return bool(self.source)


#: All layers by name, in the order of their files.
LAYERS: dict[str, Layer] = {}


def wrong(source: str, *stages: str, ep_size: int = 1) -> Callable[[Built], Built]:
    """Enter the decorated factory as one with a mistake from the public report ``source``.

    Its docstring says what is wrong.
    """

    def enter(factory: Built) -> Built:
        return _entered(factory, source, stages, ep_size)

    return enter


def right(ep_size: int = 1) -> Callable[[Built], Built]:
    """Enter the decorated factory as a correct layer: an alarm over it is a false one."""

    def enter(factory: Built) -> Built:
        return _entered(factory, "", (), ep_size)

    return enter


def _entered(factory: Built, source: str, stages: tuple[str, ...], ep_size: int) -> Built:
    name = factory.__name__
    if name in LAYERS:
        raise ValueError(f"layer {name} is entered twice: names are unique")
    what = (factory.__doc__ or "").partition("\n")[0]
    subject = f"{factory.__module__}:{name}"
    LAYERS[name] = Layer(name, subject, what, source, stages, ep_size)
    return runs(_narrow_of(factory))(factory)


def _narrow_of(factory: type) -> Callable[[MoEConfig], MoEConfig]:
    reads: tuple[str, ...] = getattr(factory, "reads", ())
    fitted: Callable[[MoEConfig], MoEConfig] = getattr(factory, "fitted", lambda config: config)
    return lambda config: fitted(neutral(config, reads=reads))


__all__ = ["LAYERS", "Layer", "LayerFactory", "right", "wrong"]
