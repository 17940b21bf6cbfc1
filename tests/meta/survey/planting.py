"""Faults of a survey: planted as those of the catalogue are, without being in it.

A worker enters them into its own registry, so that no other test meets them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

from twinmoe.oracle.case import Case
from twinmoe.oracle.faults.fault import FAULTS, Fault, Plant, Reaches
from twinmoe.oracle.scenario import Change
from twinmoe.oracle.showing import Showing
from twinmoe.oracle.trial import Trial, observe_case
from twinmoe.oracle.worker import RankContext

#: The survey's faults by name, in the order of their files.
PLANTED: dict[str, Fault] = {}


def planted(
    source: str, stage: str, *, when: Reaches, changes_output: bool = True
) -> Callable[[Plant], Fault]:
    """Enter the decorated function, which plants the fault of the public report ``source``.

    ``stage`` as in the catalogue, or several that a verdict may name, parted by ``|``.
    """

    def enter(plant: Plant) -> Fault:
        name = plant.__name__
        what = (plant.__doc__ or "").partition("\n")[0]
        if name in PLANTED:
            raise ValueError(f"fault {name} is entered twice: names are unique")
        PLANTED[name] = Fault(name, "", source, what, stage, when, plant, changes_output)
        return PLANTED[name]

    return enter


class PlantingTrial(Trial):
    """A trial whose workers know the survey's faults too."""

    def observe(
        self,
        case: Case,
        subjects: Sequence[str],
        change: Change | None = None,
        ep_size: int | None = None,
        in_step: bool = False,
    ) -> list[dict[str, Showing]]:
        """See :meth:`Trial.observe`."""
        world = self._world(ep_size or case.ep_size)
        return world.run(observe_planted, case, tuple(subjects), change, in_step)


def observe_planted(
    context: RankContext,
    case: Case,
    subjects: Sequence[str],
    change: Change | None = None,
    in_step: bool = False,
) -> dict[str, Showing]:
    """:func:`observe_case` on a rank that has entered the survey's faults."""
    if case.fault and case.fault not in FAULTS:
        importlib.import_module("tests.meta.survey.asking").load_entries()
        entered = importlib.import_module("tests.meta.survey.planting").PLANTED
        FAULTS.update({name: fault for name, fault in entered.items() if name not in FAULTS})
    return observe_case(context, case, subjects, change, in_step)
