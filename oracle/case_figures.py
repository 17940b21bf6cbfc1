"""What one judged case adds to the figures of its cell: numbers that a file can hold."""

from dataclasses import dataclass, fields
from typing import Any, Self

from twinmoe.oracle.trial import Outcome


@dataclass(frozen=True)
class CaseFigures:
    """One case that was answered.

    ``ran`` names transport and expert backend as the path report does; ``worst_ratio`` is over all
    subjects, the counts are those of the optimized layer, or of the only one.  ``left_out`` is what
    the history asked of a layer that does not offer it; ``fault_met`` says whether a rank
    met the planted fault.
    """

    ran: tuple[str, str]
    seconds: float
    judge_seconds: float
    worst_ratio: float
    elements: int
    flips: int
    slots: int
    slots_visible: int
    ambiguous: int
    tokens: int
    left_out: tuple[str, ...] = ()
    fault_met: bool = False

    @classmethod
    def of(cls, outcome: Outcome) -> Self:
        """The figures of ``outcome``."""
        verdict = outcome.verdicts.get("optimized") or next(iter(outcome.verdicts.values()))
        return cls(
            ran=_what_ran(list(outcome.paths.values())[-1]),
            seconds=outcome.run_seconds + outcome.judge_seconds,
            judge_seconds=outcome.judge_seconds,
            worst_ratio=max(each.worst_ratio for each in outcome.verdicts.values()),
            elements=verdict.elements,
            flips=verdict.flips,
            slots=verdict.slots,
            slots_visible=verdict.slots_visible,
            ambiguous=verdict.ambiguous,
            tokens=verdict.tokens,
            left_out=tuple(sorted(outcome.left_out)),
            fault_met=outcome.fault_met,
        )

    @classmethod
    def read(cls, content: Any) -> Self:
        """Read what JSON kept of one; raises ValueError for what is none."""
        names = [field.name for field in fields(cls)]
        if not isinstance(content, dict) or set(content) != set(names):
            raise ValueError(f"its figures are not {', '.join(names)}")
        numbers = {name: content[name] for name in names if name not in ("ran", "left_out")}
        if not all(isinstance(value, int | float) for value in numbers.values()):
            raise ValueError("a figure is no number")
        transport, experts = content["ran"]
        left_out = tuple(map(str, content["left_out"]))
        return cls(ran=(str(transport), str(experts)), left_out=left_out, **numbers)


def _what_ran(path: str) -> tuple[str, str]:
    """The parts of a path report that name software: transport, or layer, and expert backend."""
    transport, experts = path.partition(": ")[2].split(", ")[:2]
    return transport, experts.removesuffix(" experts")
