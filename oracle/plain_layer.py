"""Anyone's layer before the judge: what it must have, and the adapter to a Subject.

Legend: T tokens of this rank, H hidden_size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from twinmoe.oracle.contract import RoundingContract
from twinmoe.oracle.observation import PLAIN_PATH, RankObservation, Taps
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

    Without :class:`~twinmoe.oracle.subject.Changeable`: the judge knows nothing of its state.
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
        self._layer = factory(scenario.config, weights, place)
        require_layer(name, self._layer)

    def contract(self, _call: Call) -> RoundingContract:
        """One contract, whatever the call asks for: there is one path."""
        return self._layer.contract

    def required(self, _call: Call) -> frozenset[str]:
        """No launch of ours."""
        return frozenset()

    def observe(self, hidden_TH: Tensor, _call: Call) -> RankObservation:
        """Run one forward; raises LayerError for an answer that is none."""
        with torch.no_grad():
            answer: object = self._layer.forward(hidden_TH)
        path = f"{PLAIN_PATH}{self._name.rpartition('/')[2]}, own experts"
        match answer:
            case Tensor() as output_TH:
                return RankObservation(output_TH, Taps(), path)
            case (Tensor() as output_TH, Taps() as taps):
                return RankObservation(output_TH, taps, path)
        parts = answer if isinstance(answer, tuple) else (answer,)
        raise LayerError(
            f"forward of {self._name} returned {', '.join(type(part).__name__ for part in parts)}: "
            "the judge compares rows; return a tensor [tokens, hidden_size], or that and Taps"
        )


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
