"""Anyone's layer before the judge: what it must have, and the adapter to a Subject.

Legend: T tokens of this rank, H hidden_size.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from twinmoe.oracle.admission import copied
from twinmoe.oracle.bits import same_bits
from twinmoe.oracle.contract import RoundingContract
from twinmoe.oracle.contracts import on_device
from twinmoe.oracle.observation import PLAIN_PATH, RankObservation, Taps
from twinmoe.oracle.plain_state import PlainState
from twinmoe.oracle.rounding import FORMATS
from twinmoe.oracle.scenario import Scenario
from twinmoe.oracle.subject import Call
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights

#: What a forward may return.
Answered = Tensor | tuple[Tensor, Taps]


class LayerError(TypeError):
    """A layer, or a factory of layers, that is not what the judge was promised."""


class JudgedLayer(Protocol):
    """All that the judge asks of a layer on one rank.  ``torch.nn.Module`` fits.

    ``forward`` takes this rank's rows [T, H] in the config's dtype, T possibly 0, and
    returns as many, or them and :class:`Taps`.  ``contract`` declares where it rounds.
    """

    @property
    def contract(self) -> RoundingContract:
        """Where the layer rounds, and to what."""
        ...

    def forward(self, hidden_TH: Tensor, /) -> Answered:
        """Run the layer."""
        ...


#: (config, this rank's shard of the weights, its place) -> a layer.  The place has ``rank``,
#: ``world_size``, ``group`` (None for a single rank) and ``device``.
LayerFactory = Callable[[MoEConfig, MoEWeights, RankContext], JudgedLayer]


@dataclass(frozen=True)
class PlainLayer:
    """A function and its contract, for whom a class of his own is too much."""

    forward: Callable[[Tensor], Answered]
    contract: RoundingContract


class PlainSubject:
    """A layer of anyone's behind the protocol of :class:`twinmoe.oracle.subject.Subject`.

    Its state is changed as far as it offers that (:mod:`twinmoe.oracle.offers`).
    """

    def __init__(
        self,
        name: str,
        factory: LayerFactory,
        scenario: Scenario,
        weights: MoEWeights,
        context: RankContext,
    ) -> None:
        self._name = name
        size = len(scenario.hidden())
        place = replace(context, world_size=size, group=context.group if size > 1 else None)
        self._dtype, self._device_type = scenario.config.dtype, context.device.type
        #: Every answer as it was returned, and its bits then.
        self._answers: list[tuple[Tensor, Tensor]] = []
        #: Whether the last answer lies on another device than the input.
        self._astray = False

        def make() -> object:
            layer = factory(scenario.config, weights, place)
            require_layer(name, layer)
            return layer

        self._state = PlainState(make, weights)

    @property
    def _layer(self) -> JudgedLayer:
        return cast(JudgedLayer, self._state.layer)  # as require_layer found it

    @property
    def left_out(self) -> set[str]:
        """What histories asked of the layer in vain."""
        return self._state.left_out

    def reload(self, weights: MoEWeights) -> None:
        """See :class:`twinmoe.oracle.subject.Changeable`."""
        self._state.reload(weights)

    def set_kill_switch(self, disabled: bool) -> None:
        """See :class:`twinmoe.oracle.subject.Changeable`."""
        self._state.set_kill_switch(disabled)

    def poison(self) -> None:
        """See :class:`twinmoe.oracle.subject.Changeable`."""
        self._state.poison()

    def contract(self, _call: Call) -> RoundingContract:
        """The layer's own, as this device computes; whatever the call, there is one path."""
        return on_device(self._layer.contract, self._dtype, self._device_type)

    def required(self, _call: Call) -> frozenset[str]:
        """No launch of ours."""
        return frozenset()

    def observe(self, hidden_TH: Tensor, call: Call) -> RankObservation:
        """Run one forward; raises LayerError for an answer that is none.

        What it shows is copied: a layer may use its buffers again.
        """
        graph = self._state.graph(self._answer, hidden_TH, call)
        output_TH, taps = graph.replay(hidden_TH) if graph else self._answer(hidden_TH)
        path = f"{PLAIN_PATH}{self._name.rpartition('/')[2]}, own experts"
        kept_TH = copied(output_TH)
        if isinstance(kept_TH, Tensor) and kept_TH.dtype in FORMATS:
            self._answers.append((output_TH, kept_TH))
        self._astray = output_TH.device != hidden_TH.device
        shown = {name: copied(tap) for name, tap in vars(taps).items()}
        return RankObservation(kept_TH, replace(taps, **shown), path)

    def _answer(self, hidden_TH: Tensor) -> tuple[Tensor, Taps]:
        with torch.no_grad():
            answer: object = self._layer.forward(hidden_TH)
        match answer:
            case Tensor() as output_TH:
                return output_TH, Taps()
            case (Tensor() as output_TH, Taps() as taps):
                return output_TH, taps
            case _:
                parts = answer if isinstance(answer, tuple) else (answer,)
                raise self._error(
                    f"returned {', '.join(type(part).__name__ for part in parts)}: the judge "
                    "compares rows; return a tensor [tokens, hidden_size], or that and Taps"
                )

    def complaints(self) -> list[str]:
        """See :class:`twinmoe.oracle.subject.Guarded`: an answer stays what it was."""
        complaints = self._state.complaints()
        if self._astray:
            complaints.append(
                "the forward returned a tensor on another device than its input's: a layer stays "
                "on its rank's device; return it there"
            )
        same = [same_bits(*answer) for answer in self._answers]
        if all(same):
            return complaints
        number = same.index(False) + 1
        self._answers.clear()
        return [
            *complaints,
            f"the forward overwrote what forward {number} of this layer had returned: who kept it "
            "finds other numbers there; return a copy, or what later calls leave alone",
        ]

    def _error(self, said: str) -> LayerError:
        return LayerError(f"{_place_of(self._layer.forward)}forward of {self._name} {said}")


def _place_of(function: Any) -> str:
    """File and line of a function of anyone's; empty for what has none."""
    inner = inspect.unwrap(getattr(function, "__func__", function))
    code = getattr(inner, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}: " if code is not None else ""


def require_layer(name: str, layer: object) -> None:
    """Raise LayerError unless a factory returned a layer that can be judged."""
    if not callable(getattr(layer, "forward", None)):
        raise LayerError(
            f"{name} returned {type(layer).__name__}, which has no method forward: there is "
            "nothing to run; return a module, or PlainLayer(function, contract)"
        )
    contract = getattr(layer, "contract", None)
    if not isinstance(contract, RoundingContract):
        raise LayerError(
            f"{name} returned {type(layer).__name__} whose contract is {type(contract).__name__}: "
            "the judge allows what a layer declares, and nothing else; give it a RoundingContract, "
            "such as storage_contract('mine', config.dtype), or ask for one with twinmoe calibrate "
            f"--suggest-contract --subject {name}"
        )
