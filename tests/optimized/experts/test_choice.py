"""Which backend is chosen, and what is said about the others."""

import pytest
import torch

from tests.optimized.experts.inputs import config_of, integer_weights
from twinmoe.optimized.experts import (
    BACKENDS,
    InferenceGroupedMLP,
    backend_report,
    choice,
    choose_backend,
)
from twinmoe.reference.config import ConfigError
from twinmoe.reference.placement import Placement

CPU = torch.device("cpu")


def test_auto_prefers_grouped_mm():
    """The first backend that supports the layer is taken, and the layer tells which."""
    config = config_of()
    mlp = InferenceGroupedMLP(config, integer_weights(config, 0), Placement(8, 1), 0)
    assert mlp.backend_name == "grouped_mm"
    report = backend_report(config, CPU)
    assert (report["grouped_mm"], report["triton"]) == (None, None)


@pytest.mark.parametrize("setting", ["hidden_size", "moe_intermediate_size"])
def test_auto_falls_back_to_triton_for_sizes_that_grouped_mm_refuses(setting):
    """A row of 12 bf16 values is no multiple of 16 bytes: the report says so."""
    config = config_of(**{setting: 12})
    assert choose_backend("auto", config, CPU).backend.name == "triton"
    report = backend_report(config, CPU)
    assert report["triton"] is None
    assert report["grouped_mm"] is not None
    assert report["grouped_mm"].startswith(f"{setting} (12) must be a multiple of 8")


def test_auto_follows_the_measured_order_on_a_gpu(monkeypatch):
    """The order of preference names every backend, and what cannot run is passed over."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H20")
    assert set(choice.PREFERENCE["cuda"]) == set(BACKENDS)
    cuda = torch.device("cuda")
    assert choose_backend("auto", config_of(), cuda).backend.name == "triton"
    assert list(backend_report(config_of(), cuda)) == list(choice.PREFERENCE["cuda"])
    monkeypatch.setattr(BACKENDS["triton"], "unsupported", lambda *_: "not today")
    assert choose_backend("auto", config_of(), cuda).backend.name == "grouped_mm"


def test_forcing_a_backend_that_cannot_run_is_an_error_with_the_reason():
    """No silent substitute for a backend that was asked for by name."""
    with pytest.raises(
        ConfigError, match=r"'grouped_mm' cannot run this layer: hidden_size \(12\)"
    ):
        choose_backend("grouped_mm", config_of(hidden_size=12), CPU)


def test_unknown_backend_is_an_error_that_lists_the_known_ones():
    """A typo is answered with the names that exist."""
    with pytest.raises(ConfigError, match=r"\('tritom'\) is unknown: there are grouped_mm, triton"):
        choose_backend("tritom", config_of(), CPU)


def test_fp64_runs_on_no_backend_and_every_reason_is_given():
    """Automatic choice fails with one reason per backend when none is left."""
    with pytest.raises(ConfigError, match=r"grouped_mm: dtype \(torch.float64\).*triton: dtype"):
        choose_backend("auto", config_of(dtype=torch.float64), CPU)
