"""What a planted fault is, and the decorator that enters one into the registry."""

from collections.abc import Callable
from dataclasses import dataclass

from twinmoe.oracle.case import Case
from twinmoe.oracle.faults.seams import Seams

Reaches = Callable[[Case], bool]
Plant = Callable[[Seams], None]


@dataclass(frozen=True)
class Fault:
    """One planted fault.

    ``id`` is its row in the catalogue, empty for a fault that no public report is quoted
    for; ``source`` the public issues or pull requests; ``what`` goes wrong, in a sentence.
    ``stage`` is the stage of the data flow that the verdict should name, empty where a
    process fails instead; ``stage_by_alltoall`` that on the AlltoAll path, where it is another
    one.  ``reaches`` says whether a case can make the fault matter.
    ``changes_output`` is False where only a state, a log or a resource shows it.
    """

    name: str
    id: str
    source: str
    what: str
    stage: str
    reaches: Reaches
    plant: Plant
    changes_output: bool
    stage_by_alltoall: str = ""

    def stage_on(self, case: Case) -> str:
        """The stage that the verdict on ``case`` should name."""
        return (case.transport == "alltoall" and self.stage_by_alltoall) or self.stage

    def __str__(self) -> str:
        return f"{self.id} {self.name}" if self.id else self.name


#: Every fault by name, in the order of the catalogue's classes.
FAULTS: dict[str, Fault] = {}


def fault(
    id: str,
    source: str,
    what: str,
    *,
    stage: str,
    when: Reaches,
    changes_output: bool = True,
    stage_by_alltoall: str = "",
) -> Callable[[Plant], Fault]:
    """Enter the decorated function, which plants the fault at its seams, under its own name."""

    def enter(plant: Plant) -> Fault:
        name = plant.__name__
        entered = Fault(
            name, id, source, what, stage, when, plant, changes_output, stage_by_alltoall
        )
        if name in FAULTS or (id and any(other.id == id for other in FAULTS.values())):
            raise ValueError(f"fault {entered} is entered twice: names and ids are unique")
        FAULTS[name] = entered
        return entered

    return enter


#: Correct variations by name: planted as faults are, and none may be taken for one.
VARIANTS: dict[str, Fault] = {}


def variant(what: str, *, when: Reaches) -> Callable[[Plant], Fault]:
    """Enter the decorated function as a variation that keeps every promise of the contract."""

    def enter(plant: Plant) -> Fault:
        name = plant.__name__
        if name in VARIANTS or name in FAULTS:
            raise ValueError(f"variant {name} is entered twice: names are unique")
        VARIANTS[name] = Fault(name, "", "", what, "", when, plant, changes_output=False)
        return VARIANTS[name]

    return enter
