"""Choosing an expert backend, and saying why the others were not chosen."""

import torch

from twinmoe.optimized.experts.backend import ExpertBackend
from twinmoe.optimized.experts.flashinfer import FlashInferBackend
from twinmoe.optimized.experts.fused import TritonBackend
from twinmoe.optimized.experts.grouped_mm import GroupedMMBackend
from twinmoe.reference.config import ConfigError, MoEConfig

#: Every backend by name, most preferred first where nothing else was measured.
BACKENDS: dict[str, type[ExpertBackend]] = {
    backend.name: backend for backend in (GroupedMMBackend, TritonBackend, FlashInferBackend)
}

#: Take the first backend that supports the layer.
AUTO = "auto"

#: By device type, quickest first.  On an H200 triton was the quickest at every size measured,
#: 1 to 64 tokens a rank at the widths of Qwen3-30B-A3B and DeepSeek-V3 on 1 and 4 GPUs, flashinfer
#: 2 to 40 % behind it and grouped_mm 40 to 100 % (docs/h200.md, ``twinmoe bench``).
PREFERENCE = {"cuda": ("triton", "flashinfer", "grouped_mm")}


def backend_report(config: MoEConfig, device: torch.device) -> dict[str, str | None]:
    """Tell for each backend, most preferred first, why it cannot run here; None if it can."""
    names = PREFERENCE.get(device.type, tuple(BACKENDS))
    return {name: BACKENDS[name].unsupported(config, device) for name in names}


def choose_backend(name: str, config: MoEConfig, device: torch.device) -> type[ExpertBackend]:
    """Return the named backend, or for ``auto`` the most preferred one that can run.

    Raises ConfigError for an unknown name, for a named backend that cannot run this
    layer on this device, and if none can.
    """
    if name == AUTO:
        return _first_supported(config, device)
    if name not in BACKENDS:
        raise ConfigError(
            f"expert backend ({name!r}) is unknown: there are {', '.join(BACKENDS)}; use one of "
            f"them or {AUTO!r}"
        )
    if reason := BACKENDS[name].unsupported(config, device):
        raise ConfigError(f"expert backend {name!r} cannot run this layer: {reason}")
    return BACKENDS[name]


def _first_supported(config: MoEConfig, device: torch.device) -> type[ExpertBackend]:
    report = backend_report(config, device)
    for name, reason in report.items():
        if reason is None:
            return BACKENDS[name]
    reasons = "; ".join(f"{name}: {reason}" for name, reason in report.items())
    raise ConfigError(f"no expert backend can run this layer on {device}: {reasons}")
