"""A failure that does not come again alone: the earlier case that it needs.

Workers play many cases; what one leaves behind may fail a later one, whose own line then
replays green.  Its history, the cases of those workers since their start, is played again in
fresh workers: first the case alone, then with the last case before it, the last two, four ... until
the failure comes again; of the cases that the last doubling added, halves are dropped while it
stays.  Linear delta debugging for one culprit; a failure that needs several is not simplified.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from twinmoe.oracle.case import Case

#: Worlds that one failure may cost, and seconds that all failures of a run may.
MOST_TRIES = 14
MOST_SECONDS = 60.0


@dataclass(frozen=True)
class Recurrence:
    """How a failure comes again: with the cases ``needs`` before it, or not at all.

    ``tries`` counts the fresh worlds in which it was looked for.
    """

    needs: tuple[Case, ...] = ()
    tries: int = 0
    found: bool = True

    @property
    def note(self) -> str:
        """What to know beside the line that replays; empty where the case suffices."""
        if not self.found:
            return (
                f"failed once in {self.tries + 1} runs; not repeated in a fresh world, alone or "
                "after the cases before it"
            )
        if self.needs:
            return "alone it passes: it fails after what the replay line names before it"
        return ""

    def line(self, asked: str, case: Case) -> str:
        """The command that replays ``case``, the option ``asked`` for the subject included."""
        return f"twinmoe replay{asked} " + " ".join(f"'{one}'" for one in (*self.needs, case))


class Tracing:
    """Looks for recurrences within what time a run has for it.

    ``fails`` plays cases in a fresh world and says whether the last one fails.
    """

    def __init__(
        self,
        fails: Callable[[Sequence[Case]], bool],
        seconds: float = MOST_SECONDS,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fails, self._now, self._left = fails, now, seconds
        self._tries = 0
        self._deadline = 0.0

    def trace(self, case: Case, before: Sequence[Case]) -> Recurrence:
        """How ``case``, which failed after the cases ``before``, fails again."""
        if self._left <= 0:
            return Recurrence()  # nothing was found out, and nothing is claimed
        start, self._tries = self._now(), 0
        self._deadline = start + self._left
        needs = self._needed(case, tuple(before))
        self._left -= self._now() - start
        if needs is None:
            return Recurrence((), self._tries, found=False)
        return Recurrence(needs, self._tries)

    def _needed(self, case: Case, before: tuple[Case, ...]) -> tuple[Case, ...] | None:
        if self._comes_again((case,)):
            return ()
        length = 0
        while length < len(before):
            shorter, length = length, min(max(1, 2 * length), len(before))
            if not self._may_try():
                return None
            if self._comes_again((*before[-length:], case)):
                return (
                    self._one_of(before[-length : len(before) - shorter], case)
                    or (before[-length:])
                )
        return None

    def _one_of(self, added: tuple[Case, ...], case: Case) -> tuple[Case, ...]:
        """The one case of those that the last doubling added; empty if it takes more than one."""
        while len(added) > 1:
            if not self._may_try():
                return ()
            half = added[: len(added) // 2]
            added = half if self._comes_again((*half, case)) else added[len(half) :]
        return added if self._may_try() and self._comes_again((*added, case)) else ()

    def _may_try(self) -> bool:
        return self._tries < MOST_TRIES and self._now() < self._deadline

    def _comes_again(self, cases: tuple[Case, ...]) -> bool:
        self._tries += 1
        return self._fails(cases)
