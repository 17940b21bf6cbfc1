"""The command line: recordings, verdicts as exit codes, reports, refusals in one line."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest
from click.testing import CliRunner, Result

from tests.oracle.golden.conftest import LINES
from twinmoe.oracle import cli, golden_cli
from twinmoe.oracle.golden import Golden, drawn_cases, save
from twinmoe.oracle.trial import Trial

LAYERS = Path(__file__).parents[1] / "plain_layers.py"
Run = Callable[..., Result]


@pytest.fixture
def run(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs ``twinmoe golden`` here, with the shared workers."""
    monkeypatch.setattr(golden_cli, "Trial", lambda *_: nullcontext(trial))
    return lambda *arguments: CliRunner().invoke(cli.main, ["golden", *map(str, arguments)])


@pytest.fixture
def file(golden: Golden, tmp_path: Path) -> Path:
    """Return a file with the shared recording."""
    path = tmp_path / "golden.safetensors"
    save(golden, path)
    return path


def test_record_then_compare(run: Run, tmp_path: Path) -> None:
    """Exit 0 twice; the comparison says what ran, what changed, and where each was made."""
    file = tmp_path / "mine.safetensors"
    result = run("record", file, "--case", LINES[0])
    assert result.exit_code == cli.EQUIVALENT, result.output
    assert f"recorded 1 case into {file}" in result.stdout
    result = run("compare", file)
    assert result.exit_code == cli.EQUIVALENT, result.output
    assert "ran: 1x EP 2 p2p + grouped_mm" in result.stdout
    assert "compared there" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("equivalent: 1 case, worst ratio 0.")


def test_a_fault_exits_one_and_names_the_stage(run: Run, file: Path, tmp_path: Path) -> None:
    """Exit 1 with the stage in the last line, in the JSON and in the JUnit report."""
    told, suite = tmp_path / "told.json", tmp_path / "suite.xml"
    result = run(
        "compare", file, "--ep", 1, "--fault", "swapped_gate_up", "--json", told, "--junit", suite
    )
    assert result.exit_code == cli.NOT_EQUIVALENT, result.output
    last = result.stdout.splitlines()[-1]
    assert last.startswith("NOT equivalent: 2 of 2 cases, at fault: experts")
    report = json.loads(told.read_text())
    assert report["equivalent"] is False
    assert [case["stage"] for case in report["cases"]] == ["experts", "experts"]
    assert all(case["ep_size"] == 1 and case["account"] for case in report["cases"])
    root = Xml.parse(suite).getroot()
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("2", "2", "0")
    failures = root.findall("testcase/failure")
    assert [failure.get("message") for failure in failures] == ["experts", "experts"]


def test_a_worker_that_dies_is_an_error_of_its_case(run: Run, file: Path, tmp_path: Path) -> None:
    """Exit 1; the JUnit report tells an error, not a failure, and the other cases ran."""
    suite = tmp_path / "suite.xml"
    result = run("compare", file, "--fault", "killed_worker", "--junit", suite)
    assert result.exit_code == cli.NOT_EQUIVALENT, result.output
    assert "WorkerDied" in result.stdout
    root = Xml.parse(suite).getroot()
    assert int(root.get("errors", "0")) > 0
    assert len(root.findall("testcase")) == 2


def test_a_layer_that_answers_nothing_is_not_equivalent(run: Run, file: Path) -> None:
    """Exit 1: what fails is the layer; each case tells where it raised."""
    result = run("compare", file, "--subject", f"{LAYERS}:raising")
    assert result.exit_code == cli.NOT_EQUIVALENT, result.output
    assert "no such kernel" in result.stdout
    assert "at fault: a worker failed" in result.stdout.splitlines()[-1]


_CHOICES = ("different ways", "--suite", "--case", "--model")
BAD: list[tuple[list[str], tuple[str, ...]]] = [
    (["compare", "/nowhere/x"], ("/nowhere/x", "cannot be read", "name a file")),
    (["record", "/nowhere/x"], ("/nowhere/x", "not a folder", "create it first")),
    (["record", "x", "--case", "what"], ("'what'", "not key=value")),
    (["record", "x", "--case", f"{LINES[0]},fault=zeros"], ("'zeros'", "no norm", "leave it out")),
    (["record", "x", "--case", LINES[0], "--model", "mixtral-8x7b"], _CHOICES),
    (["record", "x", "--suite", "quick", "--cases", "3"], _CHOICES),
    (["record", "x", "--suite", "quick", "--case", LINES[0]], _CHOICES),
    (["record", "x", "--suite", "quick", "--seed", "0"], _CHOICES),
    (["record", "x", "--case", LINES[0], "--ep", "2"], ("--ep (2)", "its own ranks", "drop --ep")),
    (["record", "x", "--scale", "2"], ("--scale (2)", "nothing to scale", "add --model")),
    (["record", "x", "--suite", "quick", "--ep", "3"], ("num_experts (8)", "ep_size (3)")),
    (["record", "x", "--suite", "slow"], ("'slow'", "'quick'", "--help")),
    (["record", "."], ("(.)", "is a folder", "name a file")),
    (["record", __file__, "--case", LINES[0]], (__file__, "exists", "remove it first")),
    (["compare", "x", "--json", "."], ("(.)", "is a folder", "name a file")),
    (["record", "x", "--cases", "0"], ("0", "range", "--help")),
]


@pytest.mark.parametrize(("arguments", "parts"), BAD, ids=lambda x: " ".join(map(str, x))[:40])
def test_bad_input_is_one_line_and_exit_two(
    run: Run, arguments: list[str], parts: tuple[str, ...]
) -> None:
    """One line on stderr with value, why and remedy; exit code 2."""
    result = run(*arguments)
    assert result.exit_code == cli.COULD_NOT_RUN
    (line,) = result.stderr.splitlines()
    assert all(part in line for part in parts), line


def test_drawn_cases_serve_many_ranks_and_are_the_same_again() -> None:
    """Equal arguments draw equal cases; eight ranks could share each; axes are taken in turn."""
    transports = ("p2p", "nvls", "gloo", "alltoall")
    cases = drawn_cases(6, ep_size=2, transports=transports)
    assert cases == drawn_cases(6, ep_size=2, transports=transports)
    assert all(len(case.tokens) == 2 and case.config.num_experts % 8 == 0 for case in cases)
    assert {case.transport for case in cases} == set(transports)
    assert len({case.config.dtype for case in cases}) == 3
