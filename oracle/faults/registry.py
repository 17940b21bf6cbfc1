"""The registry: every planted fault by name, and how a case asks for one.

A fault is planted in the optimized twin only, around construction and forwards, in
every rank's process.  It composes with any case that it ``reaches``.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from twinmoe.oracle.case import Case
from twinmoe.oracle.faults import (  # noqa: F401 - importing enters them
    basic,
    benign,
    benign_routers,
    collectives,
    combine,
    configuration,
    dispatch,
    downgrades,
    expert_tiles,
    experts,
    graphs,
    lifecycle,
    loading,
    narrow_range,
    races,
    routing,
    routing_weights,
    sizes,
    streams,
    tile_maps,
)
from twinmoe.oracle.faults.fault import FAULTS, VARIANTS, Fault
from twinmoe.oracle.faults.seams import Seams
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.config import ConfigError


def require_fault(name: str) -> None:
    """Raise ConfigError unless ``name`` is empty or that of a fault or a correct variation."""
    if name and patch_named(name) is None:
        raise ConfigError(
            f"fault ({name!r}) is not in the registry: use one of {', '.join(FAULTS)}"
        )


def patch_named(name: str) -> Fault | None:
    """Return the fault or correct variation of this name; None if there is none."""
    return FAULTS.get(name) or VARIANTS.get(name)


@contextmanager
def planted(case: Case, context: RankContext) -> Iterator[Seams]:
    """Plant the case's fault, if it names one, for the block; its seams know whether it was met."""
    with Seams(context, case) as seams:
        if case.fault:
            (FAULTS | VARIANTS)[case.fault].plant(seams)
        yield seams
