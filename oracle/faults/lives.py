"""What a case's history makes of each of its forwards, for triggers that depend on state.

The same walk as a rank's own through the program (:mod:`twinmoe.oracle.session`), on the
case alone: which path, which graph, over which transport, after what.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from twinmoe.oracle.case import Case
from twinmoe.oracle.faults.visits import visited
from twinmoe.oracle.history import Step
from twinmoe.oracle.inputs import tokens_at
from twinmoe.oracle.subject import bucket_for
from twinmoe.reference.placement import Placement


@dataclass(frozen=True)
class Moment:
    """One forward of the case's own layer.

    ``path`` as in a Call.  ``version`` is that of the weights, ``captured_version`` the one
    that the graph was captured under.  ``symmetric``: our own collectives run.  ``previous``
    is the forward before on the same path and bucket; on a captured path, the replay before
    of the same graph.  ``captured_later`` counts graphs, of all layers,
    that were captured since this one's; ``unused_transport`` says that nothing has run on the
    transport since it was chosen.
    """

    step: Step
    path: str
    tokens: tuple[int, ...]
    bucket: int
    version: int
    symmetric: bool
    poisoned: bool
    previous: "Moment | None"
    captured_version: int = 0
    captured_later: int = 0
    unused_transport: bool = False

    @property
    def in_graph(self) -> bool:
        """The all-gather path, captured or not."""
        return self.path != "alltoall"

    @property
    def first_replay(self) -> bool:
        """A graph is captured, then replayed for the first time."""
        return self.path == "captured" and self.previous is None

    @property
    def later_replay(self) -> bool:
        """A graph is replayed again."""
        return self.path == "captured" and self.previous is not None

    @property
    def asks_anew(self) -> bool:
        """Other numbers travel than in the forward before, or none did."""
        before = self.previous
        return before is None or (before.step.number, before.version) != (
            self.step.number,
            self.version,
        )


@dataclass
class _Walk:
    """What is so between two steps."""

    version: int = 0
    killed: bool = False
    poisoned: bool = False
    unused: bool = True
    last: dict[object, Moment] = field(default_factory=dict)
    #: Place in the order of captures, and version of the weights then, by graph.
    graphs: dict[object, tuple[int, int]] = field(default_factory=dict)

    def change(self, step: Step) -> None:
        if step.kind in "wl":
            self.version = step.number
        elif step.kind == "k":
            self.killed, self.unused = bool(step.number), True
        elif step.kind == "p":
            self.poisoned = True
        elif step.kind == "n":
            self.killed, self.unused = False, True
            self.last.clear()
            self.graphs.clear()

    def forward(self, case: Case, step: Step) -> Moment:
        path = case.path(step.kind)
        tokens = tokens_at(case, step.number)
        bucket = 0 if path == "alltoall" else bucket_for(max(tokens))
        ours = path != "alltoall" and not self.killed and case.transport not in ("gloo", "nccl")
        key = (step.kind == "o", path, bucket, ours)
        place, captured = 0, self.version
        if path == "captured":
            place, captured = self.graphs.setdefault(key, (len(self.graphs), self.version))
        moment = Moment(
            step,
            path,
            tokens,
            bucket,
            self.version,
            ours,
            self.poisoned,
            self.last.get(key),
            captured,
            len(self.graphs) - 1 - place,
            self.unused,
        )
        self.last[key] = moment
        if step.kind != "o" and path != "alltoall":
            self.unused = False
        return moment


@functools.lru_cache(maxsize=64)
def moments(case: Case) -> tuple[Moment, ...]:
    """The forwards of the case's own layer, in order; a relation's changed layers left out."""
    walk, seen = _Walk(), []
    steps = (Step("f", 0),) if case.relation else case.steps()
    for step in steps:
        if not step.is_forward:
            walk.change(step)
            continue
        moment = walk.forward(case, step)
        if step.kind != "o" and any(moment.tokens):
            seen.append(moment)
    return tuple(seen)


def some_moment(when: Callable[[Case, Moment], bool]) -> Callable[[Case], bool]:
    """``when`` holds at some forward that has a token."""
    return lambda case: any(when(case, moment) for moment in moments(case))


def consecutive(case: Case) -> Iterator[tuple[Moment, Moment]]:
    """Each forward of the case's own layer with the one right after it, whatever their paths."""
    return zip(moments(case), moments(case)[1:], strict=False)


def crosses(case: Case, moment: Moment, row: int | None = None) -> bool:
    """Some token (of those at place ``row`` of their ranks) visits another rank's expert."""
    placement = Placement(case.config.num_experts, case.ep_size)
    rows = slice(None) if row is None else slice(row, row + 1)
    return any(
        bool((placement.owner(ids_TK[rows]) != rank).any())
        for rank, ids_TK in enumerate(visited(case, moment.step.number))
    )


def sums_symmetric(case: Case, moment: Moment) -> bool:
    """Ranks add each other's shares by our own reduce-scatter, and some share is not its own."""
    return moment.symmetric and case.ep_size > 1 and crosses(case, moment)
