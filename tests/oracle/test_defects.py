"""A judge that breaks at one case: that case has no verdict, the others keep theirs.

The workers are acted here, the judge is replaced; what runs is how each command goes on.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from twinmoe.oracle import calibrate as calibration
from twinmoe.oracle import cli, faults_cli, killswitch, replay_cli, trial
from twinmoe.oracle.calibrate import calibrate_paths
from twinmoe.oracle.campaign import Hunt, case_stream, hunt
from twinmoe.oracle.case import Case
from twinmoe.oracle.contracts import reference_contract
from twinmoe.oracle.defects import JudgeDefectError, judging
from twinmoe.oracle.failures import WorkerHang
from twinmoe.oracle.faults import FAULTS
from twinmoe.oracle.killswitch_checks import Check, Place, checks
from twinmoe.oracle.showing import Showing, rounds_of
from twinmoe.oracle.trial import Trial
from twinmoe.oracle.verdict import Finding, Verdict

PATH = "graphed: p2p, grouped_mm experts, fused router"


def broken(case: Case) -> bool:
    """Cases at which the acted judge breaks."""
    return case.values == "recorded"


def wrong(case: Case) -> bool:
    """Cases that it calls wrong."""
    return case.transport == "p2p"


class Acted(Trial):
    """A trial without workers: its judge is the one that is put into its module."""

    def observe(self, _case: Case, subjects: tuple[str, ...], **_: object) -> list[dict]:
        """Show nothing, once for each subject."""
        return [{name: Showing((), (), met=1) for name in subjects}]


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that replaces the judge of trials."""

    def replace_by(
        breaks: Callable[[Case], bool], finds: Callable[[Case], bool] = lambda _: False
    ) -> None:
        def acted(case: Case, _showings: object) -> Verdict:
            if breaks(case):
                raise IndexError("index 3 is out of bounds")
            found = [Finding("experts", 0, 0, 2, "out[...]")] if finds(case) else []
            return Verdict(reference_contract(case.config), PATH, found)

        monkeypatch.setattr(trial, "judge_showings", acted)

    return replace_by


def test_a_defect_names_the_case_the_place_and_the_command() -> None:
    """Whatever was raised; a worker's failure stays what it is, and a disk that is full too."""
    with pytest.raises(JudgeDefectError) as caught, judging("T=1", "twinmoe replay 'T=1'"):
        rounds_of(None)  # type: ignore[arg-type]
    told = str(caught.value)
    assert "'T=1' could not be judged: a defect of twinmoe" in told
    assert re.search(r"TypeError: .*\n  at \S*oracle/showing.py:\d+ in rounds_of", told)
    assert told.endswith("reproduce: twinmoe replay 'T=1'")
    for passed in (WorkerHang([0], 1.0, {}, "rank 0"), OSError("no space left")):
        with pytest.raises(type(passed)), judging("T=1"):
            raise passed


# --- check ------------------------------------------------------------------------------------


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], tuple[Result, dict]]:
    """Return a function that runs a narrow check on acted workers; its result and report."""
    monkeypatch.setattr(cli, "Trial", Acted)
    report = tmp_path / "report.json"
    narrow = ["--ep", "1", "--transport", "p2p,gloo", "--mode", "eager", "--dtype", "bf16"]

    def run() -> tuple[Result, dict]:
        result = CliRunner().invoke(cli.main, ["check", *narrow, "--json", str(report)])
        return result, json.loads(report.read_text())

    return run


def test_a_check_goes_on_and_is_no_verdict(
    judge: Callable[..., None], check: Callable[[], tuple[Result, dict]]
) -> None:
    """Every other case of the cell is judged, both reports are written, exit 2."""
    judge(lambda _: False)
    _, sound = check()
    judge(broken)
    result, report = check()
    assert result.exit_code == cli.COULD_NOT_RUN, result.output
    assert report["cases"] == sound["cases"] > len(report["not_judged"]) > 0
    assert not report["equivalent"]
    assert "IndexError: index 3 is out of bounds" in report["not_judged"][0]
    assert report["not_judged"][0] in result.stdout
    assert "reproduce: twinmoe replay 'T=" in result.stdout
    assert "\nno verdict (" in result.stdout
    assert "equivalent:" not in result.stdout


def test_what_is_wrong_beside_it_is_not_equivalent(
    judge: Callable[..., None], check: Callable[[], tuple[Result, dict]]
) -> None:
    """Exit 1: a case that fails stands, whatever could not be judged."""
    judge(broken, wrong)
    result, report = check()
    assert result.exit_code == cli.NOT_EQUIVALENT, result.output
    assert report["failures"]
    assert report["not_judged"]
    assert "\nNOT equivalent: " in result.stdout


def test_a_replay_goes_on_to_the_next_line(
    judge: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other line has its verdict; the traceback is for whoever mends the judge."""
    monkeypatch.setattr(replay_cli, "Trial", Acted)
    judge(broken)
    lines = ["T=2,H=24,I=16,E=4,k=2,values=recorded", "T=2,H=24,I=16,E=4,k=2"]
    result = CliRunner().invoke(cli.main, ["replay", *lines])
    assert result.exit_code == cli.COULD_NOT_RUN
    assert f"optimized ({PATH})" in result.stdout
    assert 'raise IndexError("index 3' in result.stderr
    judge(broken, lambda case: not broken(case))
    assert CliRunner().invoke(cli.main, ["replay", *lines]).exit_code == cli.NOT_EQUIVALENT


# --- campaigns ----------------------------------------------------------------------------------


def test_a_hunt_goes_on_to_the_next_case(judge: Callable[..., None]) -> None:
    """A fault is seen on a later case; one whose cases all broke has neither been seen nor not."""
    stream = case_stream(12, 5, (1, 2))
    first = next(case for case in stream if FAULTS["zeros"].reaches(case))

    def is_first(case: Case) -> bool:
        return replace(case, fault="") == first

    judge(is_first, lambda _: True)
    acted = Acted(subjects=("optimized",))
    found = hunt(FAULTS["zeros"], stream, acted, compare_plain=False)
    assert found.caught
    assert found.ran == 2
    assert len(found.defects) == 1
    judge(lambda _: True)
    unseen = hunt(FAULTS["zeros"], stream, acted, compare_plain=False)
    assert not unseen.caught
    assert len(unseen.defects) == unseen.ran == 12


def test_a_campaign_reports_every_other_fault(
    judge: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Exit 2 with the table and the JSON of all faults; a fault that survives makes it 1."""
    judge(lambda case: case.fault == "zeros", lambda case: case.fault == "swapped_gate_up")
    monkeypatch.setattr(faults_cli, "Trial", Acted)
    report = tmp_path / "faults.json"
    run = ["faults", "--only", "zeros,swapped_gate_up", "--ep", "1", "--budget", "4"]
    result = CliRunner().invoke(cli.main, [*run, "--json", str(report)])
    assert result.exit_code == cli.COULD_NOT_RUN, result.output
    zeros, swapped = json.loads(report.read_text())["faults"]
    assert zeros["not_judged"]
    assert swapped["seen_by"] == "truth"
    assert "zeros: 5 not judged: 'T=" in result.stdout
    survivor = Hunt(FAULTS["zeros"], "", "", 2, 1, 0.5, plain=None)
    hunts = iter([survivor, Hunt(FAULTS["zeros"], "", "", 2, 1, 0.5, None, defects=("broken",))])
    monkeypatch.setattr(faults_cli, "hunt", lambda *_, **__: next(hunts))
    assert CliRunner().invoke(cli.main, run).exit_code == cli.NOT_EQUIVALENT


# --- kill switch, calibration -------------------------------------------------------------------


class Silent:
    """A world whose ranks answer nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def run(self, *_: object) -> list[object]:
        """No answer."""
        return []

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_the_other_checks_of_a_kill_switch_have_their_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The one that cannot be judged does not hold, and nobody is to blame."""
    place = Place(2)
    bad, good = list(checks(place))[:2]

    def result(check: Check, *_: object) -> killswitch.Result:
        if check is bad:
            raise KeyError("held")
        return killswitch.Result(check.name)

    monkeypatch.setattr(killswitch, "_result", result)
    monkeypatch.setattr(killswitch, "_by_label", lambda _: ())
    first, second = killswitch.validate(place, Silent(), only=[bad, good])
    assert "KeyError: 'held'" in first.defect
    assert not first.holds
    assert not first.wrong
    assert second.holds


@dataclass
class Broken:
    """Measures every case but the first."""

    cases: int = 0

    def __call__(
        self, _showings: object, _case: Case, records: dict[str, calibration.PathRecord], _: float
    ) -> None:
        """Break, or note a ratio."""
        self.cases += 1
        if self.cases == 1:
            raise ZeroDivisionError
        records["optimized"].ratios.append(0.5)


def test_a_calibration_measures_the_other_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """The defect is told in the record of its path."""
    monkeypatch.setattr(calibration, "World", Silent)
    monkeypatch.setattr(calibration, "_measure", Broken())
    records = calibrate_paths(2, ep_sizes=(1,), transports=("p2p",), dtype=torch.bfloat16)
    assert [len(record.defects) for record in records] == [0, 1, 0]
    assert [len(record.ratios) for record in records] == [0, 1, 2]
