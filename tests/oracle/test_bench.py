"""The bench measures every stage of every path, beside a floor, and shows ratios."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from twinmoe.optimized.experts import choose_backend
from twinmoe.optimized.experts.timings import Shape
from twinmoe.oracle import cli
from twinmoe.oracle.bench import Row, slowest
from twinmoe.oracle.bench_cli import expert_timings, table
from twinmoe.reference.published import published, scaled


def row(path: str, us: float, stage: str = "experts") -> Row:
    """A measurement with a floor of one microsecond."""
    return Row("model", 2, 4, stage, path, us, 1.0)


def test_a_stage_takes_as_long_as_its_slowest_rank() -> None:
    """Rank by rank and row by row, the larger figure counts."""
    by_rank = [[row("a", 3.0), row("b", 1.0)], [row("a", 2.0), row("b", 4.0)]]
    assert [r.us for r in slowest(by_rank)] == [3.0, 4.0]


def test_ratios_are_to_the_quickest_path_of_the_same_stage() -> None:
    """Another stage is no competitor."""
    shown = table([row("a", 3.0), row("b", 2.0), row("c", 1.0, "layer")])
    *_, share, ratio = (list(column.cells) for column in shown.columns)
    assert ratio == ["1.50", "1.00", "1.00"]
    assert share == ["33", "50", "100"]


def test_counts_that_are_none_are_refused() -> None:
    """A list is a list of positive numbers."""
    for text in ("1,x", "0"):
        for option in ("--gpus", "--tokens"):
            run = ["bench", "--device", "cpu", option, text]
            result = CliRunner().invoke(cli.main, run)
            assert result.exit_code == cli.COULD_NOT_RUN
            assert f"{option} ({text!r})" in result.stderr
            assert "write 1,2,4" in result.stderr


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--json", "/nowhere/x.json"], "/nowhere is not a folder"),
        (["--backend", "foo"], "'foo' is not one of"),
        (["--backend", "flashinfer"], "'flashinfer' cannot run this layer"),
        (["--tokens", "999999999"], "must be counts from 1 to"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_it_is_tried(
    options: list[str], complaint: str
) -> None:
    """No worker starts for it, and no minutes are lost."""
    result = CliRunner().invoke(cli.main, ["bench", "--device", "cpu", "--gpus", "1", *options])
    assert result.exit_code == cli.COULD_NOT_RUN
    assert complaint in result.stderr


def test_experts_are_recorded_by_the_shape_of_a_share() -> None:
    """Rows of all ranks, and the experts of one; what is no backend's time is left out."""
    rows = [
        Row("qwen3-30b-a3b", 2, 4, stage, path, us, 1.0)
        for stage, path, us in (
            ("experts", "triton", 5.0),
            ("experts", "grouped_mm", 3.0),
            ("layer", "p2p + triton", 1.0),
        )
    ]
    device = torch.device("cpu")
    timings = expert_timings(rows, 64, device)
    shape = Shape.of(scaled(published("qwen3-30b-a3b"), 64), 2, device)
    assert (shape.hidden_size, shape.local_experts) == (32, 64)
    assert timings.quickest(shape, ["triton", "grouped_mm"]) == "grouped_mm"


@pytest.mark.slow
def test_every_stage_is_measured_on_every_path(tmp_path: Path) -> None:
    """Two ranks on a CPU: router, both collectives on both tiers, experts and layers."""
    file = tmp_path / "bench.json"
    options = ["--device", "cpu", "--gpus", "2", "--tokens", "2", "--scale", "64"]
    options += ["--model", "qwen3-30b-a3b", "--backend", "triton", "--json", str(file)]
    options += ["--record", str(tmp_path / "mine.json")]
    result = CliRunner().invoke(cli.main, ["bench", *options])
    assert result.exit_code == 0, result.output
    rows = [Row(**values) for values in json.loads(file.read_text())["rows"]]
    assert {(r.stage, r.path) for r in rows} == {
        ("router", "fused"),
        ("router", "torch"),
        *((stage, tier) for stage in ("all-gather", "reduce-scatter") for tier in ("p2p", "gloo")),
        ("experts", "triton"),
        ("layer", "p2p + triton"),
        ("layer", "gloo + triton"),
    }
    assert all(r.us > 0 and r.floor_us > 0 for r in rows)
    config = scaled(published("qwen3-30b-a3b"), 64)
    recorded = {"ranks": 2, "record": tmp_path / "mine.json"}
    choice = choose_backend("auto", config, torch.device("cpu"), **recorded)
    assert choice.backend.name == "triton"
    assert "the quickest measured" in choice.why
