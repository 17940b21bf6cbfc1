"""A relation: what must hold between answers to a case and to changes of it, truth or no truth.

Each forward of a relation is judged against its own truth besides; the relation asks
whether the answers fit each other, which a truth that shares a mistake cannot.

Legend: T tokens of all ranks in rank order, H hidden_size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twinmoe.oracle.case import Case
from twinmoe.oracle.observation import RankObservation
from twinmoe.oracle.scenario import Change

#: All ranks' observations of one forward.
Shown = Sequence[RankObservation]


@dataclass(frozen=True)
class Mapped:
    """Rows [T, H] which must lie inside the envelope of the unchanged case."""

    rows_TH: Tensor


@dataclass(frozen=True)
class Complaint:
    """A statement that does not hold, at a stage of the data flow."""

    stage: str
    message: str


Statement = Callable[[Case, Shown, Sequence[Shown]], Iterator[Mapped | Complaint]]


@dataclass(frozen=True)
class Relation:
    """A named property of layers.

    ``says`` in a sentence; ``applies`` to a case or does not; ``changes`` are shown after
    the case itself, on layers of their own; ``holds`` compares (case, unchanged, changed).
    ``new_ids`` says that a change gives experts other ids, so that sums in the order of ids are
    made in another one.
    """

    name: str
    says: str
    applies: Callable[[Case], bool]
    changes: Callable[[Case], tuple[Change, ...]]
    holds: Statement
    new_ids: bool = False


def rows_of(shown: Shown) -> Tensor:
    """All ranks' outputs [T, H], in rank order."""
    return torch.cat([seen.output_TH for seen in shown])


def tapped(shown: Shown, name: str) -> Tensor | None:
    """All ranks' taps of a name, in rank order; None unless every rank shows it."""
    taps = [getattr(seen.taps, name) for seen in shown]
    return None if any(tap is None for tap in taps) else torch.cat(taps)
