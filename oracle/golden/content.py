"""What a golden file holds, as values.

Legend: T tokens of all ranks in rank order, H hidden_size, K experts per token.
"""

import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from twinmoe.oracle import doctor
from twinmoe.oracle.case import Case
from twinmoe.oracle.verdict import Verdict


@dataclass(frozen=True, kw_only=True)
class Figures:
    """How close one case came, in numbers: see :class:`~twinmoe.oracle.verdict.Verdict`.

    ``ratios`` is the worst error over allowed error by stage, "output" end to end; ``sign`` the
    sum of the mean directions of flips over the ``signed`` tokens that have any; of ``slots``,
    ``visible`` would be missed.
    """

    ratios: dict[str, float] = field(default_factory=dict)
    elements: int = 0
    flips: int = 0
    expected_flips: float = 0.0
    sign: float = 0.0
    signed: int = 0
    tokens: int = 0
    ambiguous: int = 0
    slots: int = 0
    visible: int = 0

    @classmethod
    def of_json(cls, told: Any) -> "Figures":
        """Figures as ``asdict`` gives them; raises TypeError or ValueError for what is none."""
        figures = cls(**told)
        if not isinstance(figures.ratios, dict):
            raise TypeError("ratios are no mapping")
        numbers = [getattr(figures, field.name) for field in fields(cls) if field.name != "ratios"]
        for number in [*figures.ratios.values(), *numbers]:
            if type(number) not in (int, float) or not abs(number) <= sys.float_info.max:
                raise ValueError(f"figure {number!s:.40} is no finite number")
        return figures

    @classmethod
    def of(cls, verdict: Verdict) -> "Figures":
        """The figures of a verdict."""
        return cls(
            ratios={**verdict.ratios, "output": verdict.worst_ratio},
            elements=verdict.elements,
            flips=verdict.flips,
            expected_flips=verdict.expected_flips,
            sign=sum(verdict.signs),
            signed=len(verdict.signs),
            tokens=verdict.tokens,
            ambiguous=verdict.ambiguous,
            slots=verdict.slots,
            visible=verdict.slots_visible,
        )


#: Tensors of a forward: the interval that is the norm, and what the recorded path showed.
NORM = ("value", "radius")
SHOWN = ("ids", "weights", "routed", "output")


@dataclass(frozen=True, kw_only=True)
class Forward:
    """One forward of a case on the recorded path.

    ``contract`` names, and ``points`` spells out, where the path declared to round.  ``digests``
    are of the weights and the hidden states that the case's line draws.  ``tensors``: "value" and
    "radius" [T, H] fp64, the truth before the last rounding, for the recorded ids; "ids" and
    "weights" [T, K], "routed" and "output" [T, H], as the path showed them.
    """

    path: str
    contract: str
    points: dict[str, str]
    tokens: tuple[int, ...]
    digests: dict[str, str]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Recorded:
    """One case: its line, its forwards in order, and how close they came to their truth."""

    case: Case
    forwards: tuple[Forward, ...]
    figures: Figures


@dataclass(frozen=True)
class Golden:
    """A recording: its cases and where it was made, ``device`` by type, the rest in words."""

    cases: tuple[Recorded, ...]
    environment: Mapping[str, str]
    device: str = "cpu"


def environment(device: str) -> dict[str, str]:
    """Machine, device and versions, in words."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    # What a CPU's vector units can do decides how torch multiplies on it.
    host = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {"device": name, "host": host, "versions": doctor.versions()}
