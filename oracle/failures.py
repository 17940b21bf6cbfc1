"""The ways in which a world of workers fails, told in a line or two that name the ranks."""

import re
import signal
import traceback
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from twinmoe.oracle import places
from twinmoe.oracle.breadcrumbs import Footprint, Phase
from twinmoe.oracle.outside import Outside
from twinmoe.oracle.visible import visible

#: How an innocent rank's collective ends when another rank has gone away, or says that it cannot.
_SECONDARY = re.compile(
    r"closed by (remote )?peer|connection (was )?(closed|reset|refused)|broken pipe|socket timeout"
    r"|timed out (waiting|after)|remote process exited|all ranks or (by|on) none",
    re.IGNORECASE,
)

#: What the adapter itself raises about a layer.
LAYER_ERROR = "LayerError"

#: Frames and texts of a traceback that are kept at either end.
_PARTS = 100

#: Raised for what a user asked: options and environment, no layer's doing.
_SET_UP = "ConfigError"


@dataclass(frozen=True)
class Raised:
    """An exception of a task, as text: its class may not be importable in the driver.

    The text is bounded and visible: see :mod:`twinmoe.oracle.visible`.
    """

    type_name: str
    text: str
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> Self:
        """Read ``error``, whatever its class makes of being read."""
        told = traceback.TracebackException.from_exception(error)
        try:
            text = str(error)
        except Exception as failed:  # a class of anyone's says what it is
            text = f"its text cannot be read: __str__ raised {type(failed).__qualname__}"
        return cls(visible(type(error).__qualname__), visible(text), _written(told))

    def __str__(self) -> str:
        return f"{self.type_name}: {self.text}" if self.text else self.type_name

    @property
    def place(self) -> str:
        """``file:line in name`` that raised; of anyone's layer, the last line in its own file."""
        return places.raised_at(self.traceback)


class WorkerFailure(RuntimeError):  # noqa: N818 - a died worker is no error of the program
    """A task that did not return on every rank.

    ``ranks`` are those to blame; ``footprints`` tells what every rank last did; ``stacks`` are
    those that ranks wrote, of where they stood or ended.  ``outside`` says what came from
    outside, ``before`` are the cases of the same workers before this one, the last one last, and
    ``case`` is the one that is at fault, where it is not the one that was asked.  ``printed`` is
    what the ranks last printed.
    """

    printed = ""
    outside: Outside | None = None
    before: tuple[Any, ...] = ()
    case: Any = None

    def __init__(
        self,
        message: str,
        ranks: Sequence[int],
        footprints: Mapping[int, Footprint],
        stacks: Mapping[int, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)
        self.footprints = dict(footprints)
        self.stacks = dict(stacks or {})

    def __str__(self) -> str:
        return "\n".join(filter(None, (super().__str__(), self.printed)))

    @property
    def rank(self) -> int:
        """The first rank to blame."""
        return self.ranks[0]

    @property
    def last_operations(self) -> dict[int, str]:
        """Each rank's last operation, empty where it started none."""
        return {rank: footprint.last for rank, footprint in self.footprints.items()}

    @property
    def place(self) -> str:
        """``file:line in name`` of a rank to blame, else of one that waits; empty if unknown."""
        ranks = dict.fromkeys((*self.ranks, *self.stacks))
        found = (places.standing_at(self.stacks.get(rank, "")) for rank in ranks)
        return next(filter(None, found), "")

    @property
    def is_set_up(self) -> bool:
        """Whether it refuses what the user asked, outside anyone's layer."""
        return False

    @property
    def is_in_layer(self) -> bool:
        """Whether the place is past doubt: a hang or a death is of the code that runs."""
        return True


class WorkerDied(WorkerFailure):
    """A worker process ended during a task; ``exit_code`` is -N after signal N."""

    def __init__(
        self,
        rank: int,
        exit_code: int | None,
        footprints: Mapping[int, Footprint],
        told: str,
        stacks: Mapping[int, str] | None = None,
    ) -> None:
        self.exit_code = exit_code
        if exit_code is not None and exit_code < 0:
            how = f"was killed by signal {-exit_code} ({_signal_name(-exit_code)})"
        else:
            how = f"exited with code {exit_code}"
        super().__init__(f"rank {rank} {how}\n  {told}", [rank], footprints, stacks)


class WorkerLost(WorkerDied):
    """A worker ended after its last answer: no fault of what is asked next, which was not run."""


class WorkerError(WorkerFailure):
    """The task raised on ``ranks``: ``exception_type`` (a name), ``text``, ``traceback``, place."""

    def __init__(
        self, ranks: Sequence[int], raised: Raised, footprints: Mapping[int, Footprint], told: str
    ) -> None:
        self.exception_type, self.text = raised.type_name, raised.text
        self.traceback = raised.traceback
        where = f"\n  at {self.place}" if self.place else ""
        said = f"{name_ranks(ranks)} raised {raised}{where}\n  {told}"
        super().__init__(said, ranks, footprints)
        self.add_note(f"on rank {ranks[0]}:\n{raised.traceback}")

    @property
    def place(self) -> str:
        """See :attr:`Raised.place`."""
        return places.raised_at(self.traceback)

    @property
    def is_set_up(self) -> bool:
        """See :attr:`WorkerFailure.is_set_up`."""
        return self.exception_type == _SET_UP and not self.is_in_layer

    @property
    def is_in_layer(self) -> bool:
        """Whether it was raised by anyone's layer, or in what the judge says of it."""
        return places.is_in_layer(self.traceback)


class WorkerHang(WorkerFailure):
    """No rank made progress for ``seconds``; ``ranks`` kept the others waiting."""

    def __init__(
        self,
        ranks: Sequence[int],
        seconds: float,
        footprints: Mapping[int, Footprint],
        told: str,
        stacks: Mapping[int, str] | None = None,
    ) -> None:
        self.seconds = seconds
        if mismatch := mismatched(footprints):
            told = f"{mismatch}\n  {told}"
        rest = [rank for rank in footprints if rank not in ranks]
        waiting = f"kept {name_ranks(rest)} waiting" if rest else "stood still"
        said = f"{name_ranks(ranks)} {waiting} for {seconds:.1f} s\n  {told}"
        super().__init__(said, ranks, footprints, stacks)


class SetUpError(RuntimeError):
    """No subject's doing: workers did not start, or what failed fails without the subject too.

    ``failure`` is what became of the workers.
    """

    def __init__(self, failure: WorkerFailure) -> None:
        super().__init__(f"could not run: {failure}")
        self.failure = failure


def account(failure: WorkerFailure) -> str:
    """What went wrong, the place in anyone's code first, for him to click on."""
    place = f"{failure.place}: " if failure.place else ""
    if not isinstance(failure, WorkerError):
        return "\n".join([f"{place}{type(failure).__name__}: {failure}", *_ways(failure)])
    said = f": {failure.text}" if failure.text else ""
    raised = f"{place}{failure.exception_type}{said}"
    if failure.exception_type == LAYER_ERROR:  # which says where
        raised = failure.text
    told = f"{raised} (on {name_ranks(failure.ranks)})"
    return "\n".join(filter(None, (told, failure.printed)))


def _ways(failure: WorkerFailure) -> list[str]:
    """A line for each rank that wrote its stack: the calls that lead to where it stands."""
    ways = {rank: places.way_to(stack) for rank, stack in failure.stacks.items()}
    return [f"  rank {rank} stands in {' > '.join(way)}" for rank, way in ways.items() if way]


def is_secondary(text: str) -> bool:
    """Whether an exception's text says only that another rank has gone away or given up."""
    return _SECONDARY.search(text) is not None


def suspects(footprints: Mapping[int, Footprint], finished: Collection[int]) -> list[int]:
    """Name the ranks that the others wait for.

    Most unfinished ranks stand in one operation, the n-th of its name in the task; a rank
    that has started fewer of that name is missing there.  Counting by name, not by position,
    forgives a rank without tokens that skips a local kernel.  Where two operations are stood
    in by equally many, either side may be at fault and both are named; when nobody is missing,
    every unfinished rank is.  Ranks whose last operation of the same number is another one than
    that of most are named before all.
    """
    if strangers := [rank for group in _issued(footprints)[1:] for rank in group]:
        return sorted(strangers)
    unfinished = [rank for rank in footprints if rank not in finished]
    standing = Counter(
        (footprint.last, footprint.counts[footprint.last])
        for footprint in (footprints[rank] for rank in unfinished)
        if footprint.last
    )
    most = max(standing.values(), default=0)
    awaited = [operation for operation, ranks in standing.items() if ranks == most]
    missing = [
        rank
        for rank, footprint in footprints.items()
        if any(footprint.counts.get(name, 0) < nth for name, nth in awaited)
    ]
    return missing or unfinished


def mismatched(footprints: Mapping[int, Footprint]) -> str:
    """Say which collectives met that do not belong together; empty if none did."""
    groups = _issued(footprints)
    if len(groups) < 2:
        return ""
    told = []
    for ranks in groups:
        footprint = footprints[ranks[0]]
        told.append(f"{name_ranks(ranks)} issued {footprint.last}({footprint.on})")
    return ", ".join(told)


def _issued(footprints: Mapping[int, Footprint]) -> list[list[int]]:
    """Ranks by their last collective, most first, where all stand at one number of operations.

    Empty where they do not, or where some rank's last operation is its own affair.
    """
    if len({footprint.sequence for footprint in footprints.values()}) != 1:
        return []
    if not all(footprint.on for footprint in footprints.values()):
        return []
    groups: dict[str, list[int]] = {}
    for rank, footprint in footprints.items():
        groups.setdefault(f"{footprint.last} {footprint.on}", []).append(rank)
    return sorted(groups.values(), key=len, reverse=True)


def tell(
    footprints: Mapping[int, Footprint],
    finished: Collection[int],
    places: Mapping[int, str] | None = None,
) -> str:
    """Say what each rank last did, ranks that did the same together, at the first one's place."""
    places = places or {}
    groups: dict[str, list[int]] = {}
    for rank, footprint in footprints.items():
        groups.setdefault(_doing(footprint, rank in finished), []).append(rank)
    told = []
    for what, ranks in groups.items():
        at_work = [rank for rank in ranks if rank in places and rank not in finished]
        place = places[at_work[0]] if at_work else ""
        told.append(f"{name_ranks(ranks)}: {what}" + (f", at {place}" if place else ""))
    return "; ".join(told)


def name_ranks(ranks: Sequence[int]) -> str:
    """``rank 3``, ``ranks 0 to 2``, ``ranks 0, 2 and 5``."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def _doing(footprint: Footprint, finished: bool) -> str:
    on = f" of {footprint.on}" if footprint.on else ""
    number = f"{footprint.last}{on} (operation {footprint.sequence})"
    if finished and not footprint.last:
        return "finished without any operation"
    if finished:
        plural = "" if footprint.sequence == 1 else "s"
        return f"finished after {footprint.sequence} operation{plural} (last: {footprint.last})"
    if not footprint.last:
        return "no operation yet"
    return {
        Phase.STARTED: f"last started {number}",
        Phase.INSIDE: f"waiting in {number}",
        Phase.PAST: f"past {number}",
    }[footprint.phase]


def _written(told: traceback.TracebackException) -> str:
    """A traceback of visible parts: frames, texts; of very many, the first and the last."""
    parts = [visible(part) for part in told.format()]
    if len(parts) > 2 * _PARTS:
        left_out = f"  [... {len(parts) - 2 * _PARTS} parts of the traceback left out ...]\n"
        parts[_PARTS:-_PARTS] = [left_out]
    return "".join(parts)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
