"""What a campaign tells: kill rates, survivors, and passes that nobody expected."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from twinmoe.oracle.campaign import Hunt
from twinmoe.oracle.faults import FAULTS, UNPLANTED, VARIANTS
from twinmoe.oracle.faults_report import show, show_benign, summary, unexpected, write_json
from twinmoe.oracle.ledger import Known, Ledger

CAUGHT = Hunt(FAULTS["bias_in_weights"], "truth", "router", 3, 2, 1.0, plain=False)
SURVIVOR = Hunt(FAULTS["swapped_gate_up"], "", "", 9, 4, 2.0, plain=True)
STATE = replace(CAUGHT, fault=FAULTS["judged_by_buffer"], cases=7, plain=None)
KNOWN = Ledger((Known("EX01", "owner/layer#3", "later"),))


def printed(console_width: int = 100) -> Console:
    """Return a console that records."""
    return Console(record=True, width=console_width, color_system=None)


def test_the_summary_counts_state_apart() -> None:
    """Kill rate, rows, cases until seen, and the contrast."""
    first, second, third = summary([CAUGHT, SURVIVOR, STATE], 12.0)
    assert first.startswith("seen: 1 of 2 faults of output, 1 of 1 of state alone; 3 catalogue")
    assert f"{len(UNPLANTED)} listed" in first
    assert second == "cases until seen: median 5, worst 7; 12 s"
    assert third.endswith("would have seen 1 of 2")


def test_survivors_must_be_known_and_known_survivors_must_survive() -> None:
    """The ledger excuses one, and is told when it is out of date."""
    (told,) = unexpected([CAUGHT, SURVIVOR], Ledger())
    assert told == "EX01 swapped_gate_up survived 9 cases, 4 of which could show it"
    assert not unexpected([CAUGHT, SURVIVOR], KNOWN)
    (told,) = unexpected([replace(SURVIVOR, seen_by="truth")], KNOWN)
    assert "remove the entry" in told
    assert "owner/layer#3" in told


def test_the_table_shows_survivors_and_their_issue() -> None:
    """In words, fault by fault."""
    console = printed()
    show([CAUGHT, SURVIVOR], 12.0, KNOWN, console)
    text = console.export_text()
    assert "RT01 bias_in_weights" in text
    assert "survived (owner/layer#3)" in text
    assert "NOT as expected" not in text


@pytest.mark.parametrize("seen_by", ["", "truth"])
def test_alarms_over_correct_variations_are_counted(seen_by: str) -> None:
    """With the account of each."""
    variation = next(iter(VARIANTS.values()))
    console = printed()
    show_benign([Hunt(variation, seen_by, "", 5, 5, 1.0, None, account="why")], 3.0, console)
    text = console.export_text()
    alarms = int(bool(seen_by))
    assert f"{alarms} alarms over 1 correct variations, 5 cases, 3 s" in text
    assert ("why" in text) == bool(seen_by)


def test_the_json_report_holds_everything(tmp_path: Path) -> None:
    """Each fault with its source, each unplanted row with its reason."""
    path = tmp_path / "faults.json"
    write_json([CAUGHT, SURVIVOR], 12.0, path)
    report = json.loads(path.read_text())
    assert [entry["id"] for entry in report["faults"]] == ["RT01", "EX01"]
    assert report["faults"][0]["source"] == "vllm-project/vllm#12002"
    assert report["unplanted"].keys() == UNPLANTED.keys()
