"""``twinmoe faults``: survivors and alarms as exit codes, refusals in one line."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from twinmoe.oracle import cli, faults_cli
from twinmoe.oracle.campaign import Hunt
from twinmoe.oracle.faults import FAULTS
from twinmoe.oracle.trial import Trial

Run = Callable[..., Result]


class _Open:
    """A trial that the command may use, and not close."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial

    def __enter__(self) -> Trial:
        return self._trial

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def trial() -> Iterator[Trial]:
    """Share worlds between the tests of this file."""
    with Trial(subjects=("optimized",)) as shared:
        yield shared


@pytest.fixture
def run(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs ``faults`` in this process, with the shared workers."""
    monkeypatch.setattr(faults_cli, "Trial", lambda *_: _Open(trial))
    return lambda *arguments: CliRunner().invoke(cli.main, ["faults", *arguments])


def test_a_fault_that_is_seen_passes(run: Run, tmp_path: Path) -> None:
    """By name or by catalogue id; the report says what saw it."""
    report = tmp_path / "faults.json"
    result = run("--only", "zeros,EX01", "--ep", "1,2", "--budget", "12", "--json", str(report))
    assert result.exit_code == 0, result.output
    assert "seen: 2 of 2 faults of output" in result.output
    found = json.loads(report.read_text())["faults"]
    assert [entry["name"] for entry in found] == ["zeros", "swapped_gate_up"]
    assert all(entry["seen_by"] and entry["account"] for entry in found)


def test_a_survivor_fails_unless_the_ledger_knows_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the judge cannot see is a failure of the judge; known, it may be."""
    survivor = Hunt(FAULTS["zeros"], "", "", 2, 1, 0.5, plain=None)
    monkeypatch.setattr(faults_cli, "hunt", lambda *_, **__: survivor)
    arguments = ["--only", "zeros", "--ep", "1", "--budget", "2"]
    result = run(*arguments)
    assert result.exit_code == 1
    assert "zeros survived 2 cases" in result.output
    ledger = tmp_path / "known.toml"
    ledger.write_text('[[known]]\nwhat = "zeros"\nissue = "owner/layer#1"\nwhy = "harmless"\n')
    result = run(*arguments, "--ledger", str(ledger))
    assert result.exit_code == 0, result.output
    assert "survived (owner/layer#1)" in result.output


def test_correct_variations_pass(run: Run) -> None:
    """None of them is taken for a fault."""
    result = run("--benign", "--only", "slots_by_id,late_rank", "--ep", "1,2", "--budget", "6")
    assert result.exit_code == 0, result.output
    assert "0 alarms over 2 correct variations" in result.output


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--only", "zeroes"], "--only (zeroes) names 'zeroes', which is not in the registry"),
        (["--only", "RT02,"], "--only (RT02,) names '', which is not in the registry"),
        (["--ep", "3"], "--ep ('3') has 1 size(s) that the stream does not draw"),
        (["--ep", "two"], "--ep ('two')"),
    ],
)
def test_bad_input_is_refused(run: Run, arguments: list[str], complaint: str) -> None:
    """In one line, with exit code 2, before any worker starts."""
    result = run(*arguments)
    assert result.exit_code == cli.COULD_NOT_RUN
    assert complaint in result.stderr


def test_a_ledger_about_nothing_is_refused(run: Run, tmp_path: Path) -> None:
    """An entry that names no planted fault is a typing error, or out of date."""
    ledger = tmp_path / "known.toml"
    ledger.write_text('[[known]]\nwhat = "zeroes"\nissue = "owner/layer#1"\nwhy = "typing"\n')
    result = run("--only", "zeros", "--ledger", str(ledger))
    assert result.exit_code == cli.COULD_NOT_RUN
    assert "speaks of zeroes, which is not planted here" in result.stderr
