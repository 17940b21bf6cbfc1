"""A check's outcome for people (a table) and for programs (JSON)."""

import json
import math
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from twinmoe.oracle.case import Case
from twinmoe.oracle.cell_result import CellResult
from twinmoe.oracle.check import Summary
from twinmoe.oracle.failures import WorkerFailure, WorkerHang, account
from twinmoe.oracle.layer_space import standing_still
from twinmoe.oracle.strategies import Cell
from twinmoe.reference.config import dtype_name

#: Of a ratio from here on, the size alone is told.
_ENORMOUS = 1e4


def cell_table(summary: Summary) -> Table:
    """One row per EP size, transport and mode; a column of worst ratios per dtype.

    Anyone's layer has one path, which needs no name.
    """
    ours = summary.plan.subject is None
    dtypes = list(dict.fromkeys(dtype_name(result.cell.dtype) for result in summary.results))
    table = Table(title="error / allowed error, worst case (<= 1 is inside)", title_justify="left")
    for name in ("EP", "transport", "mode") if ours else ("EP",):
        table.add_column(name)
    table.add_column("cases", justify="right")
    for name in dtypes:
        table.add_column(name, justify="right")
    table.add_column("flips, 16 bit", justify="right")
    table.add_column("slots seen", justify="right")
    if ours:
        table.add_column("what ran")
    _keep_every_letter(table)

    def row(result: CellResult) -> tuple[int, str, str]:
        cell = result.cell
        return cell.ep_size, cell.transport, cell.mode

    for (ep_size, transport, mode), group in groupby(summary.results, key=row):
        results = list(group)
        by_dtype = {dtype_name(result.cell.dtype): result for result in results}
        cells = [_ratio(by_dtype[name]) if name in by_dtype else "" for name in dtypes]
        table.add_row(
            *((str(ep_size), transport, mode) if ours else (str(ep_size),)),
            str(sum(result.cases for result in results)),
            *cells,
            _flips(results),
            _percent(sum(r.slots_visible for r in results), sum(r.slots for r in results)),
            *([_ran(results)] if ours else []),
        )
    return table


def _ratio(result: CellResult) -> str:
    if result.worker_failure is not None:
        return "[red]failed[/red]"
    ratio = result.worst_ratio
    text = f"{ratio:.2f}" if ratio < _ENORMOUS else f"{ratio:.1e}"
    return text if result.passed else f"[red]{text}[/red]"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _flips(results: list[CellResult]) -> str:
    """Of 16-bit outputs alone: in fp32 hardly any two orders of summation agree."""
    narrow = [result for result in results if result.cell.dtype.itemsize == 2]
    return _percent(sum(r.flips for r in narrow), sum(r.elements for r in narrow))


def _ran(results: list[CellResult]) -> str:
    counts: Counter[tuple[str, str]] = sum((result.ran for result in results), Counter())
    by_transport: dict[str, list[str]] = {}
    for (transport, experts), count in sorted(counts.items()):
        by_transport.setdefault(transport, []).append(f"{experts} x{count}")
    return "; ".join(f"{name}: {', '.join(parts)}" for name, parts in by_transport.items())


def _keep_every_letter(table: Table) -> None:
    """Break long words: a log is 80 columns wide, and an ellipsis there hides a name for good."""
    for column in table.columns:
        column.overflow = "fold"


def throughput(summary: Summary) -> str:
    """Cases per minute for each EP size, and the judge's share of the time."""
    parts = []
    for ep_size in dict.fromkeys(result.cell.ep_size for result in summary.results):
        mine = [result for result in summary.results if result.cell.ep_size == ep_size]
        seconds = sum(result.seconds for result in mine)
        cases = sum(result.cases for result in mine)
        parts.append(f"EP {ep_size}: {60 * cases / seconds:.0f}" if seconds else f"EP {ep_size}: -")
    total = sum(result.seconds for result in summary.results)
    judging = sum(result.judge_seconds for result in summary.results)
    share = f"; {judging / total:.0%} of the time was spent judging" if total else ""
    return "cases per minute at " + ", ".join(parts) + share


def failures(summary: Summary) -> list[str]:
    """One account for each failed cell: the simplest failure found, and how to replay it."""
    told = []
    for result in summary.results:
        if result.worker_failure is not None:
            told.append(_failed(result, *result.worker_failure, summary))
        if result.failure is not None:
            text = f"{_named(result.cell, summary)}: {result.failure.explain()}"
            first = result.first_failure
            if first is not None and str(first.case) != str(result.failure.case):
                text += f"\n  first seen as: '{first.case}'"
            told.append(text)
    return told


def _failed(result: CellResult, case: Case, failure: WorkerFailure, summary: Summary) -> str:
    """A worker's failure: of anyone's layer, its own line first, and what it did answer."""
    cell, answered, again = result.cell, result.answered, result.recurrence
    note = f"\n  {again.note}" if again.note else ""
    replay = f"{note}\n  reproduce: {again.line(summary.plan.asked, case)}"
    if summary.plan.subject is None:
        return f"{cell}: {type(failure).__name__}: {failure}{replay}"
    hang = isinstance(failure, WorkerHang)
    patience = "\n  if it was compiling, it wants a larger --timeout" if hang else ""
    return (
        f"{account(failure)}{patience}\n"
        f"  {_named(cell, summary)}: no answer to this case; before it {answered} "
        f"{'was' if answered == 1 else 'were'} answered, after it none was asked{replay}"
    )


def _named(cell: Cell, summary: Summary) -> str:
    """What distinguishes the cell: anyone's layer has one path."""
    ours = summary.plan.subject is None
    return str(cell) if ours else f"EP {cell.ep_size} {dtype_name(cell.dtype)}"


def show(summary: Summary, console: Console, verified: str) -> None:
    """Print table, failures, throughput, verdict, and what was not verified, last."""
    console.print(cell_table(summary))
    told = failures(summary)
    for each in told[:5]:
        console.print(f"\n{each}", markup=False, highlight=False, soft_wrap=True)
    if len(told) > 5:
        console.print(f"\n... and {len(told) - 5} more failing cells", markup=False)
    console.print(f"\n{throughput(summary)}", highlight=False)
    for case, what in summary.cut_off[:5]:
        console.print(f"\nended from outside in '{case}': {what}", markup=False, soft_wrap=True)
    for defect in summary.defects[:5]:
        console.print(f"\n{defect}", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"{_verdict(summary)}: {summary.cases} cases in {len(summary.results)} cells, "
        f"{summary.seconds:.0f} s, seed {summary.plan.seed}",
        highlight=False,
    )
    if summary.stopped:
        console.print(f"not run: the cells after these: {summary.stopped}", markup=False)
    if verified:
        console.print(verified, highlight=False, soft_wrap=True)


def _verdict(summary: Summary) -> str:
    if summary.wrong:
        return "NOT equivalent"
    if summary.interrupted:
        return f"no verdict (interrupted before {summary.plan.total} cases, nothing wrong so far)"
    if summary.defects:
        return f"no verdict ({len(summary.defects)} not judged: a defect of twinmoe)"
    if summary.cut_off:
        return f"no verdict ({len(summary.cut_off)} ended from outside, nothing else wrong)"
    return "equivalent"


def as_json(summary: Summary) -> dict[str, Any]:
    """Everything the table shows, and the failures, for a program to read."""
    return {
        "equivalent": summary.equivalent and not summary.cut_off and not summary.interrupted,
        "interrupted": summary.interrupted,
        "cases": summary.cases,
        "seconds": round(summary.seconds, 3),
        "seed": summary.plan.seed,
        "fault": summary.plan.fault or None,
        "cells": [_cell_json(result.cell, result) for result in summary.results],
        "failures": failures(summary),
        "not_judged": summary.defects,
        "ended_from_outside": [f"'{case}': {what}" for case, what in summary.cut_off],
        "stood_still": standing_still(summary.configs),
        "left_out": dict(summary.left_out),
    }


def _cell_json(cell: Cell, result: CellResult) -> dict[str, Any]:
    return {
        "ep_size": cell.ep_size,
        "transport": cell.transport,
        "mode": cell.mode,
        "dtype": dtype_name(cell.dtype),
        "cases": result.cases,
        "passed": result.passed,
        "worst_ratio": _number(result.worst_ratio),
        "elements": result.elements,
        "flips": result.flips,
        "slots": result.slots,
        "slots_visible": result.slots_visible,
        "tokens": result.tokens,
        "ambiguous": result.ambiguous,
        "seconds": round(result.seconds, 3),
        "ran": {" + ".join(names): count for names, count in result.ran.items()},
    }


def _number(value: float) -> float | str:
    """Write infinity, for which JSON has no number, as a word."""
    return value if math.isfinite(value) else str(value)


def write_json(summary: Summary, path: Path) -> None:
    """Write the JSON report."""
    path.write_text(json.dumps(as_json(summary), indent=2) + "\n")
