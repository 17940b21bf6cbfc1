"""What a check says: a table for people, JSON for programs, and never more than is known."""

import json
import math
from dataclasses import replace
from io import StringIO
from pathlib import Path

import torch
from rich.console import Console

from twinmoe.oracle.case import Case
from twinmoe.oracle.case_figures import CaseFigures
from twinmoe.oracle.cell_result import CellResult
from twinmoe.oracle.check import Summary
from twinmoe.oracle.contracts import reference_contract
from twinmoe.oracle.corners import CORNERS
from twinmoe.oracle.failures import WorkerHang
from twinmoe.oracle.plan import Plan, plan_cells
from twinmoe.oracle.report import (
    as_json,
    failures,
    show,
    throughput,
    write_json,
)
from twinmoe.oracle.strategies import Cell
from twinmoe.oracle.trial import Outcome
from twinmoe.oracle.verdict import Finding, Verdict

PATH = "graphed: p2p, grouped_mm experts, fused router, bucket 4"
LAST = "not verified here: everything that was not run"


def outcome_of(case: Case, ratio: float = 0.5, message: str = "") -> Outcome:
    """Return an outcome, failed at the experts if there is a message."""
    findings = [Finding("experts", 1, 0, 2, message)] if message else []
    verdict = Verdict(
        reference_contract(case.config), PATH, findings, worst_ratio=ratio,
        elements=200, flips=3, tokens=4, slots=8, slots_visible=7,
    )  # fmt: skip
    return Outcome(case, {"optimized": verdict}, {"optimized": PATH}, 0.75, 0.25)


def result_of(cell: Cell, ratio: float = 0.5, message: str = "") -> CellResult:
    """Return a cell's result over one case."""
    result = CellResult(cell)
    case = CORNERS["k = E"](cell)
    outcome = outcome_of(case, ratio, message)
    result.add(case, CaseFigures.of(outcome))
    if message:
        result.failure = result.first_failure = outcome
    return result


def summary_of(*results: CellResult) -> Summary:
    """Return the summary of a check over the results' cells."""
    plan = Plan(tuple(result.cell for result in results), 1, seed=11)
    return Summary(plan, list(results), 3.4)


def cells(*modes: str, ep_sizes: tuple[int, ...] = (2,)) -> list[Cell]:
    """Return bf16 and fp32 cells over p2p."""
    return list(plan_cells(ep_sizes, ["p2p"], modes, [torch.bfloat16, torch.float32]))


def shown(summary: Summary, width: int = 100) -> list[str]:
    """Return the lines that a person sees on a terminal of that width."""
    console = Console(width=width, record=True, file=StringIO())
    show(summary, console, LAST)
    return console.export_text().rstrip().splitlines()


def hung(cell: Cell) -> CellResult:
    """Return the result of a cell in which rank 1 kept the others waiting."""
    result = CellResult(cell)
    case = CORNERS["k = E"](cell)
    result.worker_failure = case, WorkerHang([1], 3.0, {}, "rank 0: waiting in all_gather")
    result.add(case, None)
    return result


# --- for people ------------------------------------------------------------------------------


def test_the_verdict_and_what_was_not_verified_come_last() -> None:
    """The last line is the honest one, verbatim; before it the verdict with counts and seed."""
    lines = shown(summary_of(*map(result_of, cells("eager", "graphed"))))
    assert lines[-1] == LAST
    assert lines[-2] == "equivalent: 4 cases in 4 cells, 3 s, seed 11"


def test_dtypes_of_one_path_share_a_row() -> None:
    """A row per group size, transport and mode; a column per dtype with its worst ratio."""
    bf16, fp32 = cells("eager")
    lines = shown(summary_of(result_of(bf16, 0.25), result_of(fp32, 0.75)))
    (row,) = [line for line in lines if "p2p" in line and "eager" in line]
    fields = [field.strip() for field in row.split("│")]
    assert fields[1:7] == ["2", "p2p", "eager", "2", "0.25", "0.75"]
    assert fields[7:9] == ["1.5 %", "87.5 %"]
    assert "grouped_mm x2" in row


def test_a_narrow_terminal_loses_nothing_of_what_ran() -> None:
    """Long cells fold; nothing is cut off with an ellipsis."""
    text = "\n".join(shown(summary_of(*map(result_of, cells("replayed"))), width=70))
    assert "…" not in text


def test_a_failure_is_told_with_its_replay_line() -> None:
    """The account names cell, subject, message, path and stage, and how to see it again."""
    cell = cells("eager")[0]
    result = result_of(cell, 5.0, "out[token 0 on rank 1, dim 2] = 0, allowed 1 .. 2")
    (account,) = failures(summary_of(result))
    assert account.startswith("EP 2 p2p eager bf16: optimized: out[token 0 on rank 1, dim 2] = 0")
    assert PATH in account
    assert "stage: experts" in account
    assert f"reproduce: twinmoe replay '{CORNERS['k = E'](cell)}'" in account
    assert "first seen as" not in account
    assert shown(summary_of(result))[-2].startswith("NOT equivalent: ")


def test_the_case_first_seen_is_kept_beside_the_simplest() -> None:
    """A shrunk failure also gives the line of the case that was drawn."""
    cell = cells("eager")[0]
    result = result_of(cell, 5.0, "out[...]")
    drawn = replace(CORNERS["k = E"](cell), seed=99)
    result.first_failure = outcome_of(drawn, 7.0, "out[...]")
    (account,) = failures(summary_of(result))
    assert f"first seen as: '{drawn}'" in account


def test_brackets_in_messages_are_text_and_not_markup() -> None:
    """A message full of square brackets is printed as it is."""
    result = result_of(cells("eager")[0], 5.0, "out[token 0 on rank 1, dim 2] = [red]0[/red]")
    assert any("dim 2] = [red]0[/red]" in line for line in shown(summary_of(result)))


def test_a_failed_worker_fails_its_cell() -> None:
    """A hang shows as failed in the table, by name and rank in the account, and in the verdict."""
    summary = summary_of(hung(cells("eager")[0]))
    lines = shown(summary)
    assert any("failed" in line and "p2p" in line for line in lines)
    assert any("WorkerHang: rank 1 " in line for line in lines)
    assert any("reproduce: twinmoe replay 'T=" in line for line in lines)
    assert lines[-2].startswith("NOT equivalent: 1 cases in 1 cells")


def test_a_failed_cell_never_looks_equivalent() -> None:
    """A failure in numbers and one in processes both count in the same cell."""
    result = hung(cells("eager")[0])
    result.failure = outcome_of(CORNERS["k = E"](result.cell), 3.0, "out[...]")
    assert len(failures(summary_of(result))) == 2
    assert not summary_of(result).equivalent


def test_many_failures_are_told_five_times() -> None:
    """Five accounts are enough to read; the rest is counted."""
    results = [result_of(cell, 5.0, "out[...]") for cell in cells("eager", ep_sizes=(1, 2, 4, 8))]
    lines = shown(summary_of(*results))
    assert sum("reproduce:" in line for line in lines) == 5
    assert "... and 3 more failing cells" in lines


def test_throughput_is_told_by_group_size() -> None:
    """Cases per minute for each size, '-' where none was judged, and the judge's share."""
    one = result_of(cells("eager", ep_sizes=(1,))[0])
    text = throughput(summary_of(one, hung(cells("eager")[0])))
    assert text == ("cases per minute at EP 1: 60, EP 2: -; 25% of the time was spent judging")


# --- for programs ----------------------------------------------------------------------------


def test_json_says_what_the_table_says(tmp_path: Path) -> None:
    """Every cell with its axes, counts and what ran; the failures; the verdict and the seed."""
    passed, failed = cells("eager")
    summary = summary_of(result_of(passed), result_of(failed, 5.0, "out[...]"))
    write_json(summary, tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["equivalent"] is False
    assert (report["cases"], report["seed"], report["fault"]) == (2, 11, None)
    assert len(report["failures"]) == 1
    good, bad = report["cells"]
    assert (good["ep_size"], good["transport"], good["mode"], good["dtype"]) == (
        2, "p2p", "eager", "bf16",
    )  # fmt: skip
    assert (good["passed"], bad["passed"]) == (True, False)
    assert good["worst_ratio"] == 0.5
    assert (good["elements"], good["flips"], good["slots"], good["slots_visible"]) == (200, 3, 8, 7)
    assert good["ran"] == {"p2p + grouped_mm": 1}


def test_json_stays_json_where_no_error_was_allowed() -> None:
    """An infinite ratio is a word: JSON has no number for it."""
    summary = summary_of(result_of(cells("eager")[0], math.inf, "out[...]"))
    text = json.dumps(as_json(summary), allow_nan=False)
    assert json.loads(text)["cells"][0]["worst_ratio"] == "inf"
