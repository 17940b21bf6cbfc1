"""What a check shall try: the cells, their pinned corners, and how many cases are drawn."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from twinmoe.oracle.case import Case
from twinmoe.oracle.corners import CORNERS
from twinmoe.oracle.faults import require_fault
from twinmoe.oracle.strategies import Cell
from twinmoe.oracle.subject_spec import PlainName
from twinmoe.reference.config import ConfigError, MoEConfig


@dataclass(frozen=True)
class Plan:
    """What to check: the cells, random cases a cell, geometry, seed, fault and device.

    ``subject`` is anyone's layer, instead of our twins.
    """

    cells: tuple[Cell, ...]
    cases_per_cell: int
    model: MoEConfig | None = None
    seed: int = 0
    fault: str = ""
    device: str = "cpu"
    subject: PlainName | None = None

    @property
    def total(self) -> int:
        """Cases that a clean run takes; a published geometry has no corners."""
        return sum(len(self.corners(cell)) + self.cases_per_cell for cell in self.cells)

    def corners(self, cell: Cell) -> list[tuple[str, Case]]:
        """This cell's share of the pinned corners; the cells of one size cover them all."""
        if self.model is not None:
            return []
        same_size = [other for other in self.cells if other.ep_size == cell.ep_size]
        share = range(same_size.index(cell), len(CORNERS), len(same_size))
        names = list(CORNERS)
        picked = share or [same_size.index(cell) % len(names)]
        corners = [(names[i], self.fit(CORNERS[names[i]](cell))) for i in picked]
        # what a layer cannot be asked makes some of them equal
        return list({str(case): (name, case) for name, case in corners}.values())

    @property
    def asked(self) -> str:
        """The subject as an option on a command line, with a blank before it."""
        return "" if self.subject is None else f" --subject {shlex.quote(self.subject.text)}"

    @property
    def identity(self) -> dict[str, object]:
        """All that decides which cases are tried and what they answer, as a journal keeps it."""
        return {
            "cells": list(map(str, self.cells)),
            "cases_per_cell": self.cases_per_cell,
            "model": repr(self.model),
            "seed": self.seed,
            "fault": self.fault,
            "device": self.device,
            "subject": None if self.subject is None else [self.subject.text, self.subject.digest],
        }

    def fit(self, case: Case) -> Case:
        """``case`` as one that the subject can be asked."""
        return case if self.subject is None else self.subject.fit(case)

    def check(self) -> None:
        """Raise ConfigError for a plan that checks nothing, or that no ranks could share."""
        if not self.cells:
            raise ConfigError(
                "the transports and modes (alltoall, in a graph) form no cell: alltoall reads its "
                "split sizes on the host; add mode eager or another transport"
            )
        if self.model is not None:
            for cell in self.cells:
                self.model.check_ep_size(cell.ep_size)
        require_fault(self.fault)
        if self.fault and self.subject is not None:
            raise ConfigError(
                f"fault ({self.fault!r}) cannot be planted in {self.subject.text}: faults are "
                "changes of this project's own layer; drop --fault or --subject"
            )


def plan_cells(
    ep_sizes: Sequence[int],
    transports: Sequence[str],
    modes: Sequence[str],
    dtypes: Sequence[torch.dtype],
) -> tuple[Cell, ...]:
    """Every combination that exists, once each: alltoall has no graph."""
    cells = (
        Cell(ep_size, transport, mode, dtype)
        for ep_size in ep_sizes
        for transport in transports
        for mode in modes
        for dtype in dtypes
        if transport != "alltoall" or mode == "eager"
    )
    return tuple(dict.fromkeys(cells))
