"""A layer's life before, between and after its forwards, as a program in one short word.

Faults of state need a history: a buffer of an earlier call, a graph that outlives its
weights, a switch thrown between captures.  A history is a dot-separated list of steps,
``f0.k1.f0.k0.f0``, so that it travels in a case's line, is replayed by it, and shrinks as
a list does.  Every forward in it is judged, and the same question put again on the same
path must get the same bits.
"""

import re
from dataclasses import dataclass

#: What each kind of step does with its number n.
KINDS = {
    "f": "forward of batch n on the case's own path and mode",
    "g": "forward of batch n on the graphed path, without a graph",
    "a": "forward of batch n on the AlltoAll path",
    "c": "forward of batch n by replay of a graph, whatever the case's mode",
    "o": "forward of batch n through another layer, of other shapes, on the same pool",
    "k": "kill switch: 1 on, 0 off",
    "w": "reload version n of the weights in place",
    "l": "reload version n from a checkpoint file, each rank its own experts",
    "x": "fill padding rows from now on with 0 old data, 1 NaN, 2 infinity, 3 huge numbers",
    "p": "poison memory: pools and static buffers now, allocations from now on, with NaN",
    "d": "let rank n start each operation of the next forward late",
    "n": "release all symmetric memory, then build the layers anew",
}
FORWARDS = "fgaco"

#: Programs for the classic troubles of state, by name.
HISTORIES = {
    "A, B, A": "f0.f1.f0",
    "large, small, large": "f0.f2.f1.f2.f0",
    "many calls": "f0.f1.f2.f1.f0.f2.f1.f0.f2.f1.f2.f0",
    "kill switch": "f0.k1.f0.k0.f0",
    "switched before the first capture": "k1.f0.k0.f0",
    "reload": "f0.c0.w1.w1.f0.c0.w0.f0",
    "load twice": "f0.w1.w1.f0",
    "checkpoint": "l0.f0.l1.f0.l0.f0",
    "two layers": "f0.o0.f0.o1.f1",
    "poisoned memory": "p.f0.p.f0.f1",
    "padding content": "f0.x1.f0.x2.f0.x3.f0",
    "late ranks": "f0.d0.f0.d1.f0.f1.d1.f0",
    "swap": "a0.g0.f0.c1.c0.a0.f0",
    "re-created group": "f0.n.f0",
}

_STEP = re.compile(f"([{''.join(KINDS)}])([0-9]?)")


class HistoryError(ValueError):
    """A history that is no program of steps."""


@dataclass(frozen=True)
class Step:
    """One step: a letter of :data:`KINDS` and its number."""

    kind: str
    number: int

    @property
    def is_forward(self) -> bool:
        """Whether a batch goes through a layer."""
        return self.kind in FORWARDS

    def __str__(self) -> str:
        return f"{self.kind}{self.number}"


def parse(history: str) -> tuple[Step, ...]:
    """Read the steps of ``history``; a missing number is 0.

    Raises HistoryError for a word that is no step, and for a program without a forward.
    """
    steps = []
    for word in history.split("."):
        found = _STEP.fullmatch(word)
        if found is None:
            raise HistoryError(
                f"history ({history!r}) has no step {word!r}: write steps such as f0.k1.f0, each "
                f"one of {', '.join(KINDS)} and a digit"
            )
        steps.append(Step(found[1], int(found[2] or 0)))
    if not any(step.is_forward for step in steps):
        raise HistoryError(
            f"history ({history!r}) shows nothing: it has no forward to be judged; add f0"
        )
    return tuple(steps)
