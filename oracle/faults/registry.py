"""The registry: every planted fault by name, with what triggers it.

A fault is planted in the optimized twin only, around construction and forwards, in
every rank's process.  It composes with any case that ``reaches`` its trigger.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from twinmoe.oracle.case import Case
from twinmoe.oracle.faults import basic
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.config import ConfigError

Plant = Callable[[RankContext], AbstractContextManager[None]]


@dataclass(frozen=True)
class Fault:
    """One planted fault: what goes wrong, where it should be seen first, and when.

    ``stage`` is the stage of the data flow that the verdict should name.
    """

    name: str
    what: str
    stage: str
    plant: Plant
    reaches: Callable[[Case], bool]


def _has_tokens(case: Case) -> bool:
    return sum(case.tokens) > 0


def _crosses_ranks(case: Case) -> bool:
    return case.transport != "alltoall" and case.ep_size > 1 and case.tokens[0] != 0


FAULTS: dict[str, Fault] = {
    fault.name: fault
    for fault in (
        Fault("zeros", "the output is all zeros", "output", basic.zeros, _has_tokens),
        Fault(
            "swapped_gate_up",
            "the experts read [up | gate] where the weights hold [gate | up]",
            "experts",
            basic.swapped_gate_up,
            lambda case: _has_tokens(case) and case.config.gated,
        ),
        Fault(
            "dropped_slot",
            "the last slot of the first token is never added",
            "experts",
            basic.dropped_slot,
            _has_tokens,
        ),
        Fault(
            "bias_in_weights",
            "the correction bias, meant for selection, also enters the weights",
            "router",
            basic.bias_in_weights,
            lambda case: _has_tokens(case) and case.config.use_correction_bias,
        ),
        Fault(
            "swapped_segments",
            "one rank exchanges the segments of ranks 0 and 1 after the all-gather",
            "dispatch",
            basic.swapped_segments,
            _crosses_ranks,
        ),
        Fault(
            "skipped_collective",
            "the last rank returns without taking part in the combine",
            "combine",
            basic.skipped_collective,
            lambda case: case.ep_size > 1,
        ),
        Fault(
            "killed_worker",
            "the last rank's process dies before it routes",
            "router",
            basic.killed_worker,
            lambda case: True,
        ),
    )
}


def require_fault(name: str) -> None:
    """Raise ConfigError unless ``name`` is empty or that of a fault."""
    if name and name not in FAULTS:
        raise ConfigError(
            f"fault ({name!r}) is not in the registry: use one of {', '.join(FAULTS)}"
        )


@contextmanager
def planted(name: str, context: RankContext) -> Iterator[None]:
    """Plant the fault ``name`` for the block; an empty name plants none."""
    if not name:
        yield
        return
    with FAULTS[name].plant(context):
        yield
