"""Parts of the layer that are built with other settings than the layer has."""

from collections.abc import Callable, Sequence
from typing import Any

from twinmoe.oracle.faults.seams import Seams, Wrong
from twinmoe.reference.config import MoEConfig

Reading = Callable[[MoEConfig], MoEConfig]


def misread(seams: Seams, parts: Sequence[type], reading: Reading) -> None:
    """Let ``parts`` (classes built from a config first) see ``reading`` of the settings."""

    def construct(build: Wrong, part: object, config: MoEConfig, *args: Any) -> None:
        build(part, reading(config), *args)

    for part in parts:
        seams.around(part, "__init__", construct)
