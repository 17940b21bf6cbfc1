"""Criteria side by side, and the command that measures them."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from twinmoe.oracle import RankObservation, cli, cost
from twinmoe.oracle.calibrate import PathRecord, calibrate_paths, calibration_cases
from twinmoe.oracle.compare_criteria import CORRECT, SUBJECTS, compare_criteria, exhibits
from twinmoe.oracle.criteria import CRITERIA, OURS, Classical, Exhibit
from twinmoe.oracle.envelope import Enclosure, rounded
from twinmoe.oracle.rounding import BF16


@pytest.fixture(scope="module")
def correct() -> Exhibit:
    """Make a correct subject of the small size."""
    return next(exhibit for subject, exhibit in exhibits("small", seed=1) if subject == CORRECT)


def moved(exhibit: Exhibit, by: torch.Tensor | float) -> Exhibit:
    """Shift every output of ``exhibit`` by the same amount, or each by its own."""
    seen_TH = exhibit.partner_TH.double() + by
    rows = seen_TH.to(exhibit.partner_TH.dtype).split(exhibit.truth.tokens_by_rank)
    return replace(exhibit, observations=[RankObservation(row_TH) for row_TH in rows])


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_accepts_the_partner_and_refuses_zeros(name: str, correct: Exhibit) -> None:
    """No criterion is so strict that equality fails, or so loose that nothing does."""
    assert not CRITERIA[name](moved(correct, 0.0))
    assert CRITERIA[name](moved(correct, -correct.partner_TH.double()))


@pytest.mark.parametrize(
    ("name", "passes", "fails"),
    [
        ("atol 2e-2", 0.01, 0.04),
        ("atol = rtol = 5e-2", 0.03, 0.3),
        ("92.5 % within (0.1, 0.85)", 0.08, 2.0),
    ],
)
def test_tolerances_are_what_their_names_say(
    name: str, passes: float, fails: float, correct: Exhibit
) -> None:
    """A shift inside the tolerance passes, one outside fails."""
    assert not CRITERIA[name](moved(correct, passes))
    assert CRITERIA[name](moved(correct, fails))


def test_the_classical_bound_is_never_tighter_than_ours() -> None:
    """Without cancelling common roundings, a rounding always widens the interval."""
    generator = torch.Generator().manual_seed(3)
    value = torch.randn(4096, dtype=torch.float64, generator=generator)
    radius = value.abs() * 2.0 ** -torch.randint(6, 30, (4096,), generator=generator)
    ours = rounded(Enclosure(value, radius), BF16)
    classical = rounded(Classical(value, radius), BF16)
    assert torch.equal(ours.value, classical.value)
    assert bool((ours.radius <= classical.radius).all())
    assert float((ours.radius == 0).double().mean()) > 0.5


def test_only_the_envelope_sees_everything() -> None:
    """On three small layers ours is always right, and no other criterion is."""
    table = compare_criteria(3, "small", seed=5)
    right = {
        name: all(table.share(name, subject) == (subject != CORRECT) for subject in SUBJECTS)
        for name in CRITERIA
    }
    assert right == {name: name == OURS for name in CRITERIA}


def test_paths_are_measured() -> None:
    """Each path of one rank is judged, and so is the reference, without alarm."""
    records = calibrate_paths(1, seed=4, ep_sizes=(1,), transports=("alltoall", "p2p"))
    assert [record.path for record in records] == [
        "reference",
        "eager, alltoall + grouped_mm",
        "eager, alltoall + triton",
        "graphed, p2p + grouped_mm",
        "graphed, p2p + triton",
    ]
    for record in records:
        assert record.alarms == []
        assert len(record.ratios) == len(record.flips) == len(record.expected) == 1
        assert max(record.ratios) <= 1
        assert abs(record.sign_score) < 5.4


def test_paths_get_the_same_draws() -> None:
    """Cases differ between paths only in the path, so that their slack can be compared."""
    cases = calibration_cases(2, ("p2p", "gloo"), torch.bfloat16, draws=2, seed=0)
    neutral = [str(replace(case, transport="p2p", backend="auto")) for case in cases]
    assert neutral == neutral[:2] * 4


def test_one_sided_flips_have_a_large_score() -> None:
    """A hundred tokens that all flip toward zero score 10 deviations, mixed ones none."""
    assert PathRecord("p2p", 2, signs=[-1.0] * 100).sign_score == pytest.approx(-10)
    assert PathRecord("p2p", 2, signs=[-1.0, 1.0] * 50).sign_score == 0
    assert PathRecord("p2p", 2).sign_score == 0


def test_the_command_compares_and_saves(tmp_path: Path) -> None:
    """--compare-criteria prints every subject, and saves numbers and a picture."""
    pytest.importorskip("matplotlib")
    picture, numbers = tmp_path / "criteria.png", tmp_path / "criteria.json"
    arguments = ["--compare-criteria", "--draws", "1", "--plot", str(picture)]
    result = CliRunner().invoke(cli.main, ["calibrate", *arguments, "--json", str(numbers)])
    assert result.exit_code == 0, result.output
    assert all(subject in result.output for subject in SUBJECTS)
    assert picture.read_bytes().startswith(b"\x89PNG")
    flagged = json.loads(numbers.read_text(encoding="utf-8"))["flagged"]
    assert set(flagged) == set(CRITERIA)
    assert flagged[OURS][CORRECT] == 0


def test_the_command_prints_what_a_judgement_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--cost judges the reference with weights made late, and says how long that took."""
    monkeypatch.setattr(cost, "SIZES", {"small": cost.SIZES["small"]})
    numbers = tmp_path / "cost.json"
    result = CliRunner().invoke(cli.main, ["calibrate", "--cost", "--json", str(numbers)])
    assert result.exit_code == 0, result.output
    (measured,) = json.loads(numbers.read_text(encoding="utf-8"))
    assert 0 < measured["making"] < measured["seconds"]
    assert measured["peak_mib"] > 0
    assert "MiB" in result.output


def test_a_missing_matplotlib_is_told_before_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """--plot without the optional extra exits 2 and says how to get it."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = CliRunner().invoke(cli.main, ["calibrate", "--plot", "x.png"])
    assert result.exit_code == 2
    assert "pip install 'twinmoe[plot]'" in result.output


@pytest.mark.parametrize("option", ["--plot", "--json"])
def test_a_missing_folder_is_told_before_measuring(option: str, tmp_path: Path) -> None:
    """What could not be saved in the end is refused at the start."""
    if option == "--plot":
        pytest.importorskip("matplotlib")
    file = tmp_path / "nowhere" / "file.png"
    result = CliRunner().invoke(cli.main, ["calibrate", option, str(file)])
    assert result.exit_code == 2
    assert "is not a folder" in result.output
