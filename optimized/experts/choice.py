"""Choosing an expert backend, and saying why the others were not chosen."""

from dataclasses import dataclass
from pathlib import Path

import torch

from twinmoe.optimized.experts.backend import ExpertBackend
from twinmoe.optimized.experts.flashinfer import FlashInferBackend
from twinmoe.optimized.experts.fused import TritonBackend
from twinmoe.optimized.experts.grouped_mm import GroupedMMBackend
from twinmoe.optimized.experts.timings import SHIPPED, Shape, Timings
from twinmoe.reference.config import ConfigError, MoEConfig

#: Every backend by name, most preferred first where a device has no order of its own.
BACKENDS: dict[str, type[ExpertBackend]] = {
    backend.name: backend for backend in (GroupedMMBackend, TritonBackend, FlashInferBackend)
}

#: Take the quickest backend on record at the layer's shape, else the first that can run.
AUTO = "auto"

#: By device type, most preferred first where nothing was measured.  On H200s triton was the
#: quickest at every size that was, flashinfer 2 to 40 % behind it, grouped_mm 40 to 100 %.
PREFERENCE = {"cuda": ("triton", "flashinfer", "grouped_mm")}


@dataclass(frozen=True)
class Choice:
    """A backend, and why it is this one."""

    backend: type[ExpertBackend]
    why: str


def backend_report(config: MoEConfig, device: torch.device) -> dict[str, str | None]:
    """Tell for each backend, most preferred first, why it cannot run here; None if it can."""
    names = PREFERENCE.get(device.type, tuple(BACKENDS))
    return {name: BACKENDS[name].unsupported(config, device) for name in names}


def choose_backend(
    name: str,
    config: MoEConfig,
    device: torch.device,
    *,
    ranks: int = 1,
    record: Path | None = None,
) -> Choice:
    """Return the named backend, or for ``auto`` the quickest on record that can run.

    ``record``: a file of ``twinmoe bench --record``, None for the one of this project.  At a
    shape that it does not hold the most preferred backend is taken.

    Raises ConfigError for an unknown name, for a named backend that cannot run this
    layer on this device, if none can, and for a record that cannot be read.
    """
    if name == AUTO:
        return _quickest(config, device, ranks, record or SHIPPED)
    if name not in BACKENDS:
        raise ConfigError(
            f"expert backend ({name!r}) is unknown: there are {', '.join(BACKENDS)}; use one of "
            f"them or {AUTO!r}"
        )
    if reason := BACKENDS[name].unsupported(config, device):
        raise ConfigError(f"expert backend {name!r} cannot run this layer: {reason}")
    return Choice(BACKENDS[name], "asked for by name")


def _quickest(config: MoEConfig, device: torch.device, ranks: int, record: Path) -> Choice:
    timings, report = Timings.load(record), backend_report(config, device)
    usable = [name for name, reason in report.items() if reason is None]
    if not usable:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in report.items())
        raise ConfigError(f"no expert backend can run this layer on {device}: {reasons}")
    shape = Shape.of(config, ranks, device)
    if (quickest := timings.quickest(shape, usable)) is not None:
        return Choice(BACKENDS[quickest], f"the quickest measured at this shape ({record.name})")
    why = f"nothing was measured at this shape ({record.name}): the first that can run"
    return Choice(BACKENDS[usable[0]], why)
