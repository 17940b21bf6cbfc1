"""What all ranks must have done alike: issued the same collectives, taken the same path."""

from collections.abc import Iterator, Sequence
from itertools import zip_longest

from twinmoe.oracle.breadcrumbs import Issued
from twinmoe.oracle.failures import name_ranks


def collective_mismatches(journals: Sequence[Sequence[Issued]]) -> Iterator[str]:
    """Compare each rank's journal; the first place at which they differ, in words.

    The n-th collective of every rank must be the same operation on the same sizes, and what
    one rank sends another must be what that one expects to receive.
    """
    for place, issued in enumerate(zip_longest(*journals)):
        groups: dict[str, list[int]] = {}
        for rank, entry in enumerate(issued):
            groups.setdefault("nothing" if entry is None else str(entry), []).append(rank)
        if len(groups) > 1:
            told = ", ".join(f"{name_ranks(ranks)} issued {what}" for what, ranks in groups.items())
            yield f"collective {place + 1} differs between ranks: {told}"
            return
        yield from _uneven_exchange(place, [entry for entry in issued if entry is not None])


def _uneven_exchange(place: int, issued: Sequence[Issued]) -> Iterator[str]:
    for sender, entry in enumerate(issued):
        for receiver, sent in enumerate(entry.sent):
            expected = issued[receiver].received
            if sender < len(expected) and expected[sender] != sent:
                yield (
                    f"collective {place + 1}, {entry.name}: rank {sender} sends rank {receiver} "
                    f"{sent} rows, which expects {expected[sender]}"
                )


def missing_exchanges(journals: Sequence[Sequence[Issued]]) -> Iterator[str]:
    """Ranks that claim the AlltoAll path and exchanged no rows with anybody."""
    for rank, journal in enumerate(journals):
        if not any(issued.name.startswith("all_to_all") for issued in journal):
            yield f"rank {rank} claims the AlltoAll path of several ranks, but exchanged no rows"
