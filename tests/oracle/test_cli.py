"""The command line: verdicts as exit codes, refusals in one line.  Its processes: test_program."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from twinmoe.oracle import cli, replay_cli, terminal
from twinmoe.oracle.corners import CORNERS
from twinmoe.oracle.trial import Trial

LINE = "T=3/1,H=32,I=16,E=4,k=2,rsf=2.5"
NARROW = ["--transport", "p2p", "--mode", "eager", "--dtype", "bf16", "--cases", "1"]

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def trial() -> Iterator[Trial]:
    """Share worlds between the tests of this file."""
    with Trial() as shared:
        yield shared


@pytest.fixture
def run(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a command line in this process, with the shared workers."""
    for command in (cli, replay_cli):
        monkeypatch.setattr(command, "Trial", lambda *_: nullcontext(trial))
    return lambda *arguments: CliRunner().invoke(cli.main, arguments)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a command line in which starting any worker is a failure."""

    def no_trial(*_: object) -> None:
        pytest.fail("workers were about to be started for bad input")

    for command in (cli, replay_cli):
        monkeypatch.setattr(command, "Trial", no_trial)
    return lambda *arguments: CliRunner().invoke(cli.main, arguments)


# --- check -----------------------------------------------------------------------------------


def test_a_narrow_check_is_equivalent_and_honest(run: Run, tmp_path: Path) -> None:
    """Exit 0, every corner at each size, the verdict, what was not verified last, and the JSON."""
    report = tmp_path / "report.json"
    result = run("check", "--ep", "1,2", *NARROW, "--json", str(report))
    assert result.exit_code == cli.EQUIVALENT, result.output
    lines = result.stdout.splitlines()
    count = 2 * (len(CORNERS) + 1)
    assert re.fullmatch(rf"equivalent: {count} cases in 2 cells, \d+ s, seed 0", lines[-2])
    assert lines[-1].startswith("not verified here: CUDA")
    assert "multicast hardware" in lines[-1]
    assert any(line.startswith("cases per minute at EP 1: ") for line in lines)
    assert result.stderr == ""

    told = json.loads(report.read_text())
    assert told["equivalent"] is True
    assert told["cases"] == count
    assert told["failures"] == []
    assert [(cell["ep_size"], cell["cases"]) for cell in told["cells"]] == [
        (1, count // 2), (2, count // 2),
    ]  # fmt: skip
    assert all(cell["worst_ratio"] <= 1 for cell in told["cells"])
    assert all(sum(cell["ran"].values()) == cell["cases"] for cell in told["cells"])


@pytest.mark.parametrize(
    ("model", "scale"), [("deepseek-v3", "64"), ("qwen3-30b-a3b", "32"), ("mixtral-8x7b", "64")]
)
def test_a_published_geometry_is_equivalent(run: Run, model: str, scale: str) -> None:
    """--model runs the published layer with its widths divided, and no corner of another."""
    result = run("check", "--model", model, "--scale", scale, "--ep", "2", *NARROW)
    assert result.exit_code == cli.EQUIVALENT, result.output
    assert "equivalent: 1 cases in 1 cells" in result.stdout


def test_a_failing_check_prints_a_line_that_fails_again(run: Run) -> None:
    """Exit 1, an account with token, rank, path and stage, and a replay line that exits 1 too."""
    result = run("check", "--ep", "2", *NARROW, "--fault", "swapped_gate_up")
    assert result.exit_code == cli.NOT_EQUIVALENT
    assert re.search(r"token \d+ on rank \d", result.stdout)
    assert "path: graphed: p2p, grouped_mm experts" in result.stdout
    assert "stage: experts" in result.stdout
    assert "\nNOT equivalent: 1 cases in 1 cells" in result.stdout
    line = re.search(r"reproduce: twinmoe replay '(.*)'", result.stdout)
    assert line is not None
    again = run("replay", line[1])
    assert again.exit_code == cli.NOT_EQUIVALENT
    assert "stage: experts" in again.stdout


def test_a_fault_that_was_never_reached_shows_nothing(run: Run) -> None:
    """A check asked to plant what its paths cannot reach is no success: exit 2, and why."""
    result = run("check", "--ep", "1", *NARROW, "--fault", "swapped_segments")
    assert result.exit_code == cli.COULD_NOT_RUN
    assert re.search(r"fault \('swapped_segments'\) was reached by none of \d+", result.stderr)


# --- replay, doctor, contracts ---------------------------------------------------------------


def test_replay_tells_both_verdicts(run: Run) -> None:
    """A good line exits 0 and says for each twin what ran and how close it was."""
    result = run("replay", LINE)
    assert result.exit_code == cli.EQUIVALENT
    assert "reference (reference alltoall)" in result.stdout
    assert "optimized (graphed: p2p" in result.stdout
    assert result.stdout.count("equivalent under") == 2


def test_replay_of_a_faulty_line_tells_where(run: Run) -> None:
    """A line with a fault exits 1 with the place, the path and the stage."""
    result = run("replay", f"{LINE},fault=zeros")
    assert result.exit_code == cli.NOT_EQUIVALENT
    assert re.search(r"out\[token \d on rank \d, dim \d+\] = 0, allowed", result.stdout)
    assert "stage: output" in result.stdout


def test_replay_refuses_a_fault_that_the_case_cannot_reach(run: Run) -> None:
    """An AlltoAll case has no graphed path, whatever its history asks for: exit 2, and why."""
    result = run(
        "replay",
        "T=3/2,H=96,I=40,E=6,k=2,dtype=bf16,transport=alltoall,history=p0.g0.f0,fault=late_fill",
    )
    assert result.exit_code == cli.COULD_NOT_RUN
    assert "fault ('late_fill') is out of this case's reach" in result.stderr


def test_replay_of_a_deadly_line_names_the_rank(run: Run) -> None:
    """A line that kills a worker exits 1 and says which, and the next replay runs."""
    result = run("replay", f"{LINE},fault=killed_worker")
    assert result.exit_code == cli.NOT_EQUIVALENT
    assert "WorkerDied: rank 1 was killed by signal 9" in result.stdout
    assert run("replay", LINE).exit_code == cli.EQUIVALENT


def test_doctor_tells_what_runs_here(run: Run) -> None:
    """Exit 0 with every tier, every backend, and the versions."""
    result = run("doctor")
    assert result.exit_code == cli.EQUIVALENT
    for word in ("nvls", "p2p", "gloo", "grouped_mm", "triton", "emulated", "torch 2"):
        assert word in result.stdout


def test_contracts_are_shown_for_each_path(run: Run) -> None:
    """Exit 0 with a table of what each path rounds, for the dtype asked for."""
    result = run("contracts", "--dtype", "fp16")
    assert result.exit_code == cli.EQUIVALENT
    assert "stored formats, fp16 model" in result.stdout
    assert "…" not in result.stdout


@pytest.mark.parametrize("command", [[], ["check"], ["replay"], ["doctor"], ["contracts"]])
def test_help_is_no_error(run: Run, command: list[str]) -> None:
    """-h and --help exit 0 on every command."""
    for flag in ("-h", "--help"):
        result = run(*command, flag)
        assert result.exit_code == 0
        assert result.stdout.startswith("Usage: ")


# --- bad input -------------------------------------------------------------------------------

BAD: list[tuple[list[str], tuple[str, ...]]] = [
    (["check", "--transport", "tcp"], ("'tcp'", "does not run on cpu", "alltoall, nvls, p2p")),
    (["check", "--transport", "nccl"], ("'nccl'", "does not run on cpu", "alltoall, nvls, p2p")),
    (["check", "--transport", ""], ("''", "does not run on cpu", "alltoall, nvls, p2p")),
    (["check", "--mode", "fast"], ("'fast'", "unknown", "eager, graphed, replayed")),
    (["check", "--dtype", "int8"], ("'int8'", "unknown", "bf16, fp16, fp32")),
    (["check", "--dtype", "bf16,"], ("''", "unknown", "bf16, fp16, fp32")),
    (["check", "--model", "gpt-2"], ("'gpt-2'", "not one of", "mixtral-8x7b")),
    (["check", "--ep", "0"], ("--ep ('0')", "group sizes from 1 to 64", "write 1,2,4")),
    (["check", "--ep", "two"], ("--ep ('two')", "not a list of group sizes", "write 1,2,4")),
    (["check", "--ep", ""], ("--ep ('')", "not a list of group sizes", "write 1,2,4")),
    (["check", "--ep", "1,65"], ("'1,65'", "each rank is a process", "write 1,2,4")),
    (["check", "--timeout", "nan"], ("nan", "no finite number", "--help")),
    (["check", "--timeout", "inf"], ("inf", "no finite number", "--help")),
    (["calibrate", "--loosen", "nan"], ("nan", "no finite number", "--help")),
    (["calibrate", "--cost", "--compare-criteria"], ("--cost", "ask for one at a time")),
    (["calibrate", "--cost", "--subject", "x:y"], ("--subject", "ignored by --cost", "leave it")),
    (["calibrate", "--cost", "--plot", "x.png"], ("--plot", "ignored by --cost", "leave it out")),
    (["calibrate", "--plot", "x.foo"], ("x.foo", "no known format", ".png")),
    (
        ["check", "--model", "mixtral-8x7b", "--ep", "16"],
        ("num_experts (8)", "ep_size (16)", "use an ep_size that divides 8"),
    ),
    (["check", "--scale", "8"], ("--scale (8)", "nothing to scale", "add --model")),
    (["check", "--scale", "0", "--model", "deepseek-v3"], ("0", "range", "--help")),
    (["check", "--cases", "0"], ("0", "range", "--help")),
    (["check", "--seed", "x"], ("'x'", "not a valid integer", "--help")),
    (["check", "--timeout", "0"], ("0", "range", "--help")),
    (["check", "--json", "/nowhere/x.json"], ("/nowhere/x.json", "not a folder", "create it")),
    (["check", "--json", "/tmp"], ("--json (/tmp)", "is a folder", "name a file")),
    (["check", "--json", ""], ("--json (.)", "is a folder", "name a file")),
    (["check", "--fault", "gremlin"], ("'gremlin'", "not in the registry", "use one of zeros")),
    (
        ["check", "--transport", "alltoall", "--mode", "graphed"],
        ("alltoall", "no cell", "add mode eager"),
    ),
    (["check", "--speed", "9"], ("--speed", "No such option", "check --help")),
    (["cheque"], ("'cheque'", "No such command", "--help")),
    ([], ("Missing command", "--help")),
    (["replay"], ("CASE", "Missing argument", "replay --help")),
    (["replay", "what"], ("'what'", "not key=value", "separate parts")),
    (["replay", f"{LINE},speed=9"], ("'speed'", "not a key", "use T, H,")),
    (["replay", "T=1/1/1,H=8,I=8,E=4,k=1"], ("(4)", "ep_size (3)", "divides 4")),
    (["replay", f"{LINE},transport=nccl"], ("'nccl'", "does not run on cpu", "p2p")),
    (["replay", f"{LINE},dtype=fp64"], ("float64", "no inference kernels", "use bfloat16")),
    (["replay", f"{LINE},fault=gremlin"], ("'gremlin'", "not in the registry", "use one of")),
    (["contracts", "--dtype", "fp64"], ("'fp64'", "not one of", "'bf16'")),
]


@pytest.mark.parametrize(("arguments", "parts"), BAD, ids=lambda x: " ".join(map(str, x))[:40])
def test_bad_input_is_one_line_and_exit_two(
    refused: Run, arguments: list[str], parts: tuple[str, ...]
) -> None:
    """One line on stderr with value, why and remedy; exit code 2; no worker is started."""
    result = refused(*arguments)
    assert result.exit_code == cli.COULD_NOT_RUN
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("twinmoe: ")
    assert all(part in line for part in parts), line


def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    refused: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file without permission to write is found out first, not after minutes of checking."""
    monkeypatch.setattr(terminal.os, "access", lambda *_: False)
    result = refused("check", "--json", str(tmp_path / "report.json"))
    assert result.exit_code == cli.COULD_NOT_RUN
    assert "no permission" in result.stderr
    assert "choose another" in result.stderr
