"""What all ranks must have done alike: issued the same collectives, taken the same path."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from twinmoe.oracle.breadcrumbs import Issued
from twinmoe.oracle.failures import name_ranks
from twinmoe.oracle.verdict import STAGES, stage_of_operation


@dataclass(frozen=True)
class Mismatch:
    """What ranks did not do alike, and the stage that it belongs to."""

    stage: str
    message: str


def collective_mismatches(journals: Sequence[Sequence[Issued]]) -> Iterator[Mismatch]:
    """Compare each rank's journal; the first place at which they differ, in words.

    The n-th collective of every rank must be the same operation on the same sizes, and what
    one rank sends another must be what that one expects to receive.
    """
    for place, issued in enumerate(zip_longest(*journals)):
        groups: dict[str, list[int]] = {}
        for rank, entry in enumerate(issued):
            groups.setdefault("nothing" if entry is None else str(entry), []).append(rank)
        if len(groups) > 1:
            each = ", ".join(f"{name_ranks(ranks)} issued {what}" for what, ranks in groups.items())
            yield Mismatch(
                _stage_left_out(issued, journals[0][place - 1] if place else None),
                f"collective {place + 1} differs between ranks: {each}",
            )
            return
        yield from _uneven_exchange(place, [entry for entry in issued if entry is not None])


def _stage_left_out(issued: Sequence[Issued | None], before: Issued | None) -> str:
    """The stage of the collective that some rank left out: what comes after ``before``, if any.

    Who leaves one out issues the next in its place, perhaps that of the stage just done.
    """
    stages = {stage_of_operation(entry.name) for entry in issued if entry is not None}
    done = set() if before is None else {stage_of_operation(before.name)}
    return min(stages - done or stages, key=STAGES.index)


def _uneven_exchange(place: int, issued: Sequence[Issued]) -> Iterator[Mismatch]:
    for sender, entry in enumerate(issued):
        for receiver, sent in enumerate(entry.sent):
            expected = issued[receiver].received
            if sender < len(expected) and expected[sender] != sent:
                yield Mismatch(
                    stage_of_operation(entry.name),
                    f"collective {place + 1}, {entry.name}: rank {sender} sends rank {receiver} "
                    f"{sent} rows, which expects {expected[sender]}",
                )


def missing_exchanges(journals: Sequence[Sequence[Issued]]) -> Iterator[Mismatch]:
    """Ranks that claim the AlltoAll path and exchanged no rows with anybody."""
    for rank, journal in enumerate(journals):
        if not any(issued.name.startswith("all_to_all") for issued in journal):
            yield Mismatch(
                "dispatch",
                f"rank {rank} claims the AlltoAll path of several ranks, but exchanged no rows",
            )
