"""One rank's side of a case: layers built, a program of steps played, every forward shown.

Runs in the workers, in lockstep: all ranks play the same steps.

Legend: T tokens of this rank, H hidden_size.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from twinmoe.optimized import launch
from twinmoe.oracle import breadcrumbs
from twinmoe.oracle.admission import admitted
from twinmoe.oracle.case import Case
from twinmoe.oracle.contract import RoundingContract
from twinmoe.oracle.history import Step
from twinmoe.oracle.live_layer import LiveLayer
from twinmoe.oracle.observation import RankObservation
from twinmoe.oracle.relations import RELATIONS
from twinmoe.oracle.scenario import Change, Scenario
from twinmoe.oracle.subject import Call, Changeable, SubjectFactory
from twinmoe.oracle.visible import visible
from twinmoe.oracle.worker import RankContext

#: How long a late rank waits before each operation: long beside a store, short beside a case.
_LATE_S = 0.01

#: Content of padding rows by a history's number; None leaves old data.
FILLERS = (None, torch.nan, torch.inf, 3e4)


@dataclass(frozen=True)
class Answer:
    """One forward of one rank: what it computed from, promised, showed, and was caught at."""

    act: str
    scenario: Scenario
    contract: RoundingContract
    required: frozenset[str]
    call: Call
    observation: RankObservation
    complaints: tuple[str, ...] = ()


class Session:
    """The live layers of one subject on one rank, through one case.

    ``change`` is made to every scenario of the case's history.  ``in_step``: no rank starts a
    forward before all have looked at the one before, which hides their races and shows all taps.
    """

    def __init__(
        self,
        case: Case,
        context: RankContext,
        factory: SubjectFactory,
        change: Change | None = None,
        in_step: bool = False,
    ) -> None:
        self.case, self.context, self._factory = case, context, factory
        self._in_step = in_step
        self._change_of_all = change or Change()
        self._answers: list[Answer | None] = []
        self._version = 0
        self._filler = torch.nan if case.padding == "nan" else None
        self._late_rank: int | None = None
        self._poisoned = False
        #: What histories asked of the layers in vain.
        self.left_out: set[str] = set()
        self._layers: dict[Case | Change, LiveLayer] = {}

    def play(self) -> list[Answer | None]:
        """Play the case's relation or history; return one answer for each forward, in order.

        None stands for a forward in which this rank had no part.
        """
        if self.case.relation:
            self._compare(RELATIONS[self.case.relation].changes(self.case))
        else:
            with _deterministic_again():
                self._live(self.case.steps())
        return self._answers

    def close(self) -> None:
        """Let go of all layers and symmetric memory."""
        # On a CPU peers have mappings of their own; a barrier would only hide who was missing.
        if self.context.device.type != "cpu":
            self._barrier()
        for layer in self._layers.values():
            self.left_out |= getattr(layer.subject, "left_out", set())
        self._layers.clear()
        self.context.release_pools()

    # --- a relation ---------------------------------------------------------------------

    def _compare(self, changes: tuple[Change, ...]) -> None:
        """Show the case itself, then each changed layer or batch, each on a layer of its own."""
        scenarios = [Scenario(self.case, change=change) for change in (Change(), *changes)]
        for scenario in scenarios:  # all before the first capture, which fixes the pool's addresses
            if self.context.rank < len(scenario.hidden()):
                self._layer(scenario.change, scenario)
        for number, scenario in enumerate(scenarios):
            change = scenario.change
            act = type(change).__name__ if number else "unchanged"
            self._forward(change, scenario, act, self.case.path("f"), number == len(changes))

    # --- a history ----------------------------------------------------------------------

    def _live(self, steps: tuple[Step, ...]) -> None:
        self._build(steps)
        last = max(place for place, step in enumerate(steps) if step.is_forward)
        for place, step in enumerate(steps):
            if not step.is_forward:
                self._between(step, steps)
                continue
            case = other_shape(self.case) if step.kind == "o" else self.case
            scenario = Scenario(case, self._version, step.number, self._change_of_all)
            act = f"step {place + 1} of {len(steps)} ({step})" if len(steps) > 1 else ""
            self._forward(case, scenario, act, self.case.path(step.kind), place == last)

    def _build(self, steps: tuple[Step, ...]) -> None:
        """Build all layers before the first capture, which fixes the pool's addresses."""
        change = self._change_of_all
        self._layer(self.case, Scenario(self.case, self._version, change=change))
        if any(step.kind == "o" for step in steps):
            other = other_shape(self.case)
            self._layer(other, Scenario(other, self._version, change=change))

    def _between(self, step: Step, steps: tuple[Step, ...]) -> None:
        """Play a step that is no forward."""
        number = step.number
        if step.kind == "x":
            self._filler = FILLERS[number % len(FILLERS)]
        elif step.kind == "d":
            self._late_rank = number % self.context.world_size
        elif step.kind == "n":
            self._barrier()
            self.close()
            self._build(steps)
        elif step.kind in "wl":
            self._version = number
            for layer in self._layers.values():
                layer.reload(number, from_file=step.kind == "l")
        elif step.kind == "k":
            self._change(lambda subject: subject.set_kill_switch(bool(number)))
        elif step.kind == "p":
            self._poisoned = True
            torch.set_deterministic_debug_mode("warn")  # fills what empty() returns
            self._barrier()
            self._change(lambda subject: subject.poison())
            self._barrier()

    def _change(self, how: Callable[[Changeable], None]) -> None:
        """Change what the subjects keep between forwards; the readable twin keeps nothing."""
        for layer in self._layers.values():
            if isinstance(layer.subject, Changeable):
                how(layer.subject)

    # --- one forward --------------------------------------------------------------------

    def _forward(
        self, key: Case | Change, scenario: Scenario, act: str, path: str, is_last: bool
    ) -> None:
        if self._in_step:
            self._barrier()
        hidden_by_rank = scenario.hidden()
        rank = self.context.rank
        if rank >= len(hidden_by_rank):
            self._answers.append(None)  # the change leaves fewer ranks
            return
        issued = len(breadcrumbs.journal)
        layer = self._layer(key, scenario)
        # With a single rank nobody is faster, and every forward's buffers can be looked at.
        is_last = is_last or self._in_step or len(hidden_by_rank) == 1
        tokens = tuple(map(len, hidden_by_rank))
        call = Call(path, max(tokens), self._filler, is_last, tokens, self._poisoned)
        with self._late():
            observation, complaints = layer.observe(hidden_by_rank[rank], call)
        if len(hidden_by_rank) < self.context.world_size:
            del breadcrumbs.journal[issued:]  # what only some ranks do, others need not match
        subject = layer.subject
        promised, required = subject.contract(call), subject.required(call)
        shown = admitted(observation, rank, tokens, scenario.config, promised)
        self._answers.append(
            Answer(act, scenario, promised, required, call, shown, tuple(map(visible, complaints)))
        )

    def _layer(self, key: Case | Change, scenario: Scenario) -> LiveLayer:
        if key not in self._layers:
            self._layers[key] = LiveLayer(scenario, self.context, self._factory)
        return self._layers[key]

    def _barrier(self) -> None:
        if self.context.group is not None:
            dist.barrier(self.context.group)

    @contextmanager
    def _late(self) -> Iterator[None]:
        """Delay this rank's operations, if the step before said so."""
        late, self._late_rank = self._late_rank, None
        if late != self.context.rank:
            yield
            return

        def wait(_name: str, _on: str) -> None:
            time.sleep(_LATE_S)

        launch.observers.append(wait)
        try:
            yield
        finally:
            launch.observers.remove(wait)


def other_shape(case: Case) -> Case:
    """A case of the same ranks and batch sizes whose layer differs in every width."""
    config = case.config
    wider = config.hidden_size < 128
    return replace(
        case,
        config=replace(
            config,
            hidden_size=config.hidden_size * 2 if wider else config.hidden_size // 2,
            moe_intermediate_size=config.moe_intermediate_size + 8,
            shared_expert_intermediate_size=0,
            shared_expert_gate=False,
        ),
    )


@contextmanager
def _deterministic_again() -> Iterator[None]:
    # Not use_deterministic_algorithms(), which imports a compiler: seconds in every new process.
    before = torch.get_deterministic_debug_mode()
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
