"""One rank's side of a kill-switch check: a layer, a switch, and a word on what runs.

Before each forward all ranks tell each other which transport they hold.  Ranks that differ
would wait for each other for ever, so they stop there, and say so.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from twinmoe.optimized import layer as layer_module
from twinmoe.optimized.communication.agreement import exchange
from twinmoe.optimized.communication.cpu_symmetric_memory import CpuSymmetricAllocation
from twinmoe.optimized.communication.cuda_symmetric_memory import CudaSymmetricAllocation
from twinmoe.optimized.communication.errors import TransportError
from twinmoe.optimized.communication.pool import Capacity
from twinmoe.optimized.communication.transport import select_transport
from twinmoe.optimized.layer import MoELayer
from twinmoe.optimized.options import InferenceOptions
from twinmoe.oracle import breadcrumbs
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults.seams import Seams
from twinmoe.oracle.scenario import Change, Scenario
from twinmoe.oracle.session import Answer, Session
from twinmoe.oracle.showing import Showing
from twinmoe.oracle.subject import OptimizedSubject
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.weights import MoEWeights


@dataclass(frozen=True)
class Setup:
    """How the layer of a check is built.

    ``killed``: with the switch on from the start.  ``is_open``: the best transport is taken, not
    the case's.  ``inject`` stages failures of the set-up on the last rank
    (``twinmoe.optimized.communication.INJECTABLE``).  ``alone``: what the last rank does to the
    switch between forwards by itself: "differs" from the others, or "calls" when none else does.
    """

    killed: bool = False
    is_open: bool = False
    inject: frozenset[str] = frozenset()
    alone: str = ""


@dataclass
class Played:
    """What a rank saw: each forward's transports by rank, the switch as set, forwards, refusal.

    ``held`` has one entry for each forward, every rank's transport; it ends early where they
    differ.  ``asked`` is the switch as this rank's layer passed it on; ``report`` what the
    transport says at the end; ``refusal`` the error that all ranks agreed on.
    """

    showing: Showing
    held: list[list[str]] = field(default_factory=list)
    asked: list[bool] = field(default_factory=list)
    report: str = ""
    refusal: str = ""


class SwitchSubject(OptimizedSubject):
    """The fast twin, built as a check asks, that promises what its transport reports."""

    def __init__(
        self, setup: Setup, scenario: Scenario, weights: MoEWeights, context: RankContext
    ) -> None:
        self._setup = setup
        super().__init__(scenario, weights, context)
        self._killed = True  # hence the contract of what is reported, not of the case's transport

    def options(self, max_tokens_per_rank: int) -> InferenceOptions:
        """See `OptimizedSubject`."""
        options = super().options(max_tokens_per_rank)
        if self._setup.killed or self._setup.is_open:
            options = replace(options, transport=None)
        return replace(options, disable_triton_nvls_kernels=self._setup.killed)

    def set_kill_switch(self, disabled: bool) -> None:
        """See `OptimizedSubject`."""
        super().set_kill_switch(disabled)
        self._killed = True

    def unexpected(self) -> str:
        """Nothing here: a check says itself what each forward must run, and what is refused."""
        return ""


class _Astray(Exception):  # noqa: N818 - no error of the program: the ranks found out in time
    """The ranks hold different transports: a forward would never end."""


class _AttestedSession(Session):
    """A session whose ranks compare their transports before each forward."""

    def __init__(self, case: Case, context: RankContext, setup: Setup, held: list[Any]) -> None:
        super().__init__(case, context, partial(SwitchSubject, setup))
        self._setup, self._held = setup, held

    @property
    def answers(self) -> tuple[Answer | None, ...]:
        """The forwards so far."""
        return tuple(self._answers)

    def report(self) -> str:
        """What the transports say now."""
        return "\n".join(subject.layer.transport_report() for subject in self.subjects())

    def subjects(self) -> Iterator[OptimizedSubject]:
        """The layers' subjects."""
        for layer in self._layers.values():
            assert isinstance(layer.subject, OptimizedSubject)
            yield layer.subject

    def _forward(
        self, key: Case | Change, scenario: Scenario, act: str, path: str, is_last: bool
    ) -> None:
        # A rank that calls the switch alone would take this exchange for its own.
        for subject in self.subjects() if self._setup.alone != "calls" else ():
            label = subject.layer.transport.report().label
            self._held.append(exchange(label, self.context.group))
            if len(set(self._held[-1])) > 1:
                raise _Astray
        super()._forward(key, scenario, act, path, is_last)


def play(context: RankContext, case: Case, setup: Setup, fault: str = "") -> Played:
    """Play the case's history on a layer built as ``setup`` says; a task of a world."""
    context.release_pools()
    start = len(breadcrumbs.journal)
    told = Played(Showing((), ()))
    with _planted(context, case, setup, fault, told.asked):
        session = _AttestedSession(case, context, setup, told.held)
        try:
            session.play()
        except _Astray:
            pass
        except TransportError as error:
            told.refusal = str(error)
        told.report = session.report()
        told.showing = Showing(session.answers, tuple(breadcrumbs.journal[start:]))
        session.close()
    return told


def best_transport(context: RankContext) -> str:
    """What the ranks choose where nobody asks for anything; a task of a world."""
    transport = select_transport(
        context.group, device=context.device, capacity=Capacity(1024, 1024), pool="killswitch"
    )
    return transport.report().label


# --- a rank of its own mind ---------------------------------------------------------------------


@contextmanager
def _planted(
    context: RankContext, case: Case, setup: Setup, fault: str, asked: list[bool]
) -> Iterator[None]:
    """Watch what the layer asks for; stage failures, and plant ``fault``, on the last rank."""
    with Seams(context, case) as seams:
        mine = setup.inject if seams.is_last_rank else frozenset()

        def select(original: Any, group: Any, **request: Any) -> Any:
            asked.append(request["kill_switch"])
            return original(group, **request, inject=mine)

        seams.around(layer_module, "select_transport", select)
        if fault and seams.is_last_rank:
            FAULTS[fault](seams)
        if setup.alone == "differs" and seams.is_last_rank:
            seams.around(MoELayer, "set_kill_switch", _differs)
        if setup.alone == "calls" and not seams.is_last_rank:
            seams.around(MoELayer, "set_kill_switch", _never_again)
        yield


def _differs(original: Any, layer: MoELayer, disabled: bool) -> None:
    """Turn the switch the other way, once the layer is built."""
    original(layer, disabled != hasattr(layer, "transport"))


def _never_again(original: Any, layer: MoELayer, disabled: bool) -> None:
    """Build the layer, and hear nothing of the switch from then on."""
    if not hasattr(layer, "transport"):
        original(layer, disabled)


def _ignores_flag(seams: Seams) -> None:
    """The rank never learns that the switch is on, as if its environment lacked the setting."""
    seams.around(
        MoELayer, "set_kill_switch", lambda original, layer, disabled: original(layer, False)
    )


def _keeps_transport(seams: Seams) -> None:
    """The rank votes as all do, and then goes on with the transport it had."""

    def keep(original: Any, layer: MoELayer, disabled: bool) -> None:
        if not hasattr(layer, "transport"):
            original(layer, disabled)
            return
        before = layer.transport, layer.dispatcher
        original(layer, disabled)
        layer.transport, layer.dispatcher = before

    seams.around(MoELayer, "set_kill_switch", keep)


def _sets_up_anyway(seams: Seams) -> None:
    """The rank runs plain collectives, but still makes memory that its peers could map."""
    device = seams.context.device

    def switch(original: Any, layer: MoELayer, disabled: bool) -> None:
        if disabled and device.type == "cpu":
            CpuSymmetricAllocation(_ANY_SIZE, _ANY_SIZE).seal()
        elif disabled:
            CudaSymmetricAllocation(_ANY_SIZE, device).seal()
        original(layer, disabled)

    seams.around(MoELayer, "set_kill_switch", switch)


#: Bytes of memory that nobody asked for.
_ANY_SIZE = 4096

#: Switches that one rank, the last, applies by half.
FAULTS = {
    "ignores_flag": _ignores_flag,
    "keeps_transport": _keeps_transport,
    "sets_up_anyway": _sets_up_anyway,
}
