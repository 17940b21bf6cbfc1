"""Measurements on record, and the backend that they choose."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.optimized.experts.inputs import config_of, integer_weights
from twinmoe.optimized.experts import BACKENDS, InferenceGroupedMLP, choose_backend
from twinmoe.optimized.experts.timings import SHIPPED, Shape, Timing, Timings
from twinmoe.reference.config import ConfigError
from twinmoe.reference.placement import Placement
from twinmoe.reference.published import PUBLISHED, published

CPU = torch.device("cpu")
CONFIG = config_of()
SHAPE = Shape.of(CONFIG, 1, CPU)


def record(path: Path, *measured: Timing) -> Path:
    """A file with these measurements."""
    Timings(measured).save(path)
    return path


def test_auto_takes_the_quickest_on_record(tmp_path: Path) -> None:
    """At a measured shape the measurement decides, whatever is preferred otherwise."""
    file = record(tmp_path / "mine.json", Timing(SHAPE, 4, {"grouped_mm": 3.0, "triton": 2.0}))
    choice = choose_backend("auto", CONFIG, CPU, record=file)
    assert choice.backend is BACKENDS["triton"]
    assert choice.why == "the quickest measured at this shape (mine.json)"


@pytest.mark.parametrize(
    "other",
    [{"hidden_size": 8}, {"dtype": "fp16"}, {"local_experts": 4}, {"device": "NVIDIA H200"}],
    ids=str,
)
def test_another_shape_says_nothing(tmp_path: Path, other: dict[str, object]) -> None:
    """Sizes, dtype, share and device all have to agree; else the usual order holds, and says so."""
    timing = Timing(replace(SHAPE, **other), 4, {"grouped_mm": 3.0, "triton": 2.0})
    choice = choose_backend("auto", CONFIG, CPU, record=record(tmp_path / "r.json", timing))
    assert choice.backend is BACKENDS["grouped_mm"]
    assert choice.why.startswith("nothing was measured at this shape (r.json)")


def test_ranks_share_the_experts(tmp_path: Path) -> None:
    """Half of the experts on each of two ranks is another shape than all on one."""
    halves = Timing(Shape.of(CONFIG, 2, CPU), 4, {"grouped_mm": 3.0, "triton": 2.0})
    file = record(tmp_path / "r.json", halves)
    names = [
        choose_backend("auto", CONFIG, CPU, ranks=ranks, record=file).backend.name
        for ranks in (1, 2)
    ]
    assert names == ["grouped_mm", "triton"]
    weights, placement = integer_weights(CONFIG, 0), Placement(CONFIG.num_experts, 2)
    mlp = InferenceGroupedMLP(CONFIG, weights.shard(placement, 1), placement, 1, "auto", file)
    assert mlp.backend_name == "triton"
    assert "r.json" in mlp.backend_why


def test_the_quickest_loses_least_over_all_numbers_of_rows() -> None:
    """Twice as slow once weighs more than a little slower three times."""
    timings = Timings(
        [
            Timing(SHAPE, 1, {"a": 10.0, "b": 20.0}),
            *(Timing(SHAPE, rows, {"a": 110.0, "b": 100.0}) for rows in (2, 3, 4)),
        ]
    )
    assert timings.quickest(SHAPE, ["a", "b"]) == "a"
    assert timings.quickest(SHAPE, ["b"]) == "b"


def test_a_backend_that_was_measured_at_times_is_no_rival() -> None:
    """Its other times are unknown; and one that cannot run here wins nothing."""
    timings = Timings([Timing(SHAPE, 1, {"a": 2.0, "b": 1.0}), Timing(SHAPE, 2, {"a": 2.0})])
    assert timings.quickest(SHAPE, ["a", "b"]) == "a"
    assert timings.quickest(SHAPE, ["b"]) is None
    assert Timings().quickest(SHAPE, ["a", "b"]) is None


def test_a_record_is_read_as_it_was_written_and_updated(tmp_path: Path) -> None:
    """A new measurement replaces the old one of the same shape and rows, and adds to others."""
    old = Timings([Timing(SHAPE, 1, {"a": 1.0}), Timing(SHAPE, 2, {"a": 1.0})])
    old.updated(Timings([Timing(SHAPE, 2, {"a": 9.0, "b": 3.0})])).save(tmp_path / "r.json")
    assert [entry["us"] for entry in json.loads((tmp_path / "r.json").read_text())] == [
        {"a": 1.0},
        {"a": 9.0, "b": 3.0},
    ]
    assert Timings.load(tmp_path / "r.json").quickest(SHAPE, ["a"]) == "a"


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        "[null]",
        "",
        "{}",
        '{"rows": 3}',
        "[1]",
        '[{"rows": 1}]',
        '[{"shape": {}, "rows": 1, "us": {}}]',
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    """With the file and the remedy, before anything is chosen."""
    file = tmp_path / "r.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"r\.json\) are no record .* twinmoe bench --record"):
        choose_backend("auto", CONFIG, CPU, record=file)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        choose_backend("auto", CONFIG, CPU, record=tmp_path / "none.json")


def test_a_time_that_is_none_is_refused(tmp_path: Path) -> None:
    """Zero microseconds would win every comparison."""
    file = record(tmp_path / "r.json", Timing(SHAPE, 1, {"a": 0.0}))
    with pytest.raises(ConfigError, match="not positive"):
        Timings.load(file)


@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "deepseek-v3"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_is_shipped_holds_the_published_shapes(
    monkeypatch: pytest.MonkeyPatch, model: str, ranks: int
) -> None:
    """On H200s, both geometries and the sizes that docs/h200.md shows."""
    assert model in PUBLISHED
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H200")
    shape = Shape.of(published(model), ranks, torch.device("cuda"))
    assert Timings.load(SHIPPED).quickest(shape, ["flashinfer", "triton"]) == "triton"
