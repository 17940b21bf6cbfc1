"""What anyone's layer may offer beside ``forward``, so that histories can change its state.

All of it is optional; names are those of :class:`twinmoe.optimized.layer.MoELayer` where that
has them.  A step that a layer does not offer is left out, or played in another way, and the
report says so.
"""

from typing import Protocol, runtime_checkable

from twinmoe.reference.weights import MoEWeights


@runtime_checkable
class Reloadable(Protocol):
    """A layer whose weights can be overwritten while it lives."""

    def reload(self, weights: MoEWeights) -> None:
        """Overwrite the weights in place, and all that derives from them; graphs stay valid."""
        ...


@runtime_checkable
class Switchable(Protocol):
    """A layer whose symmetric-memory kernels can be switched off."""

    def set_kill_switch(self, disabled: bool) -> None:
        """Turn them off or on, on all ranks together; the judge captures its graphs anew."""
        ...


@runtime_checkable
class Counting(Protocol):
    """A layer that counts what it does with symmetric memory: launches, allocations, rendezvous."""

    def symmetric_calls(self) -> int:
        """Return how many there were so far; with the kill switch on there must be no more."""
        ...


@runtime_checkable
class Poisonable(Protocol):
    """A layer that shows the judge what it keeps between forwards."""

    def poison(self) -> None:
        """Fill with NaN every buffer whose content may not matter to the next forward."""
        ...


#: What a layer may lack, by the name that it would have, and what histories do without it.
WITHOUT = {
    "reload": "built anew instead, on other weights at the same addresses",
    "set_kill_switch": "its kill switch was not tried",
    "symmetric_calls": "whether its kill switch is obeyed was not judged",
    "poison": "new allocations alone were poisoned",
    "graph_safe": "no graph was captured",
}


def graph_safe(layer: object) -> bool:
    """Whether the layer says that its forward may be captured: ``graph_safe = True``."""
    return getattr(layer, "graph_safe", False) is True


def left_out(counts: dict[str, int]) -> str:
    """One line on what layers lacked, with the number of cases that asked for it; else empty."""
    parts = [
        f"no {name} ({counts[name]} histor{'y' if counts[name] == 1 else 'ies'}: {without})"
        for name, without in WITHOUT.items()
        if counts.get(name)
    ]
    return f"left out: the layer has {', '.join(parts)}" if parts else ""
