"""``twinmoe calibrate``: how much slack the bounds leave, and what they see that others miss."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import click
from rich.table import Table

from twinmoe.oracle import cost, plots
from twinmoe.oracle import doctor as diagnosis
from twinmoe.oracle.calibrate import BACKENDS, EP_SIZES, PathRecord, calibrate_paths
from twinmoe.oracle.compare_criteria import (
    CORRECT,
    SIZES,
    SUBJECTS,
    CriteriaTable,
    compare_criteria,
)
from twinmoe.oracle.criteria import CRITERIA, OURS
from twinmoe.oracle.exit_codes import verdict_code
from twinmoe.oracle.strategies import DEVICE_TRANSPORTS
from twinmoe.oracle.subject_cli import subject_option
from twinmoe.oracle.suggest_cli import ranks_option, suggest, suggest_option
from twinmoe.oracle.terminal import (
    Finite,
    Report,
    check_writable,
    console,
    device_option,
    finish,
    json_option,
    progress,
    say,
    timeout_option,
)
from twinmoe.reference.config import DTYPES, ConfigError


@click.command()
@click.option(
    "--compare-criteria",
    "comparing",
    is_flag=True,
    help="Measure common criteria and ours on the same correct and wrong emulated layers.",
)
@click.option(
    "--cost",
    "costing",
    is_flag=True,
    help="Measure seconds and memory of a judgement, at a small size and at DeepSeek-V3's.",
)
@click.option(
    "--draws", type=click.IntRange(1), default=8, show_default=True,
    help="Layers to compare criteria on, or cases for each path and EP size.",
)  # fmt: skip
@click.option(
    "--size", type=click.Choice(list(SIZES)), default="small", show_default=True,
    help="Of the layers that criteria are compared on.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["bf16", "fp16"]), default="bf16", show_default=True,
    help="Of the cases that paths run.",
)  # fmt: skip
@click.option(
    "--loosen", type=Finite(min=0, min_open=True), default=1.0, show_default=True,
    help="Multiply every radius by this: judges the judge.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True)
@device_option
@click.option("--plot", type=click.Path(path_type=Path), help="Save a picture.")
@json_option
@timeout_option(15.0)
@suggest_option
@ranks_option
@subject_option
def calibrate(comparing: bool, costing: bool, suggesting: bool, **options: Any) -> None:
    """Measure the judge: error over allowed error, flips and their signs, path by path.

    With --compare-criteria: the share of mistakes that common criteria and ours see.  With
    --cost: what a judgement costs.  With --suggest-contract: where somebody's layer rounds.
    Exit codes: 0 measured, 1 a correct layer was called wrong, or no contract fits
    somebody's layer, 2 could not run, or a case could not be judged.
    """
    diagnosis.require(options["device"])
    _check_modes(comparing, costing, suggesting, options)
    check_writable(options["json_file"], "--json")
    if options["plot"] is not None:
        plots.require_matplotlib(options["plot"])
        check_writable(options["plot"], "--plot")
    measure = _compare if comparing else _costs if costing else _calibrate
    if suggesting:
        finish(verdict_code(wrong=suggest(**options)))
    code, *reports = measure(**options)
    finish(code, *reports)


def _check_modes(comparing: bool, costing: bool, suggesting: bool, options: dict[str, Any]) -> None:
    """Raise ConfigError for options that would be passed over."""
    modes = {
        "--compare-criteria": comparing,
        "--cost": costing,
        "--suggest-contract": suggesting,
    }
    asked = [name for name, wanted in modes.items() if wanted]
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(asked)} measure different things: ask for one at a time")
    mode = asked[0] if asked else "a measurement of our own paths"
    unused = {
        "--subject": options["subject"] is not None and not suggesting,
        "--plot": options["plot"] is not None and (costing or suggesting),
        "--json": options["json_file"] is not None and suggesting,
    }
    if extra := [name for name, ignored in unused.items() if ignored]:
        raise ConfigError(f"{' and '.join(extra)} would be ignored by {mode}: leave it out")


def _compare(
    draws: int,
    size: str,
    seed: int,
    loosen: float,
    plot: Path | None,
    json_file: Path | None,
    **_unused: Any,
) -> tuple[int, Report, Report]:
    with progress("comparing criteria", draws * len(SUBJECTS)) as advance:
        table = compare_criteria(draws, size, seed, loosen=loosen, advance=advance)
    console.print(criteria_table(table))
    code = verdict_code(wrong=table.flagged[OURS][CORRECT] > 0)
    plotted = Report("--plot", plot, partial(plots.draw_criteria, table))
    return code, plotted, _json_report(json_file, asdict(table))


def _calibrate(
    draws: int,
    dtype: str,
    seed: int,
    loosen: float,
    device: str,
    timeout: float,
    plot: Path | None,
    json_file: Path | None,
    **_unused: Any,
) -> tuple[int, Report, Report]:
    total = draws * len(EP_SIZES) * len(DEVICE_TRANSPORTS[device]) * len(BACKENDS)
    with progress("running paths", total) as advance:
        records = calibrate_paths(
            draws,
            seed,
            dtype=DTYPES[dtype],
            device=device,
            loosen=loosen,
            timeout_s=timeout,
            advance=advance,
        )
    console.print(path_table(records))
    alarms = [line for record in records for line in record.alarms]
    defects = [told for record in records for told in record.defects]
    for line in (*alarms, *defects):
        say(line)
    plotted = Report("--plot", plot, partial(plots.draw_paths, records))
    measured = _json_report(json_file, [asdict(record) for record in records])
    return verdict_code(wrong=bool(alarms), not_judged=bool(defects)), plotted, measured


def _costs(seed: int, json_file: Path | None, **_unused: Any) -> tuple[int, Report]:
    with progress("judging", len(cost.SIZES)) as advance:
        costs = list(cost.measure_costs(seed, advance))
    console.print(cost_table(costs))
    measured = [
        {
            "size": one.size,
            "seconds": one.seconds,
            "making": one.making,
            "peak_mib": one.peak_mib,
        }
        for one in costs
    ]
    code = verdict_code(wrong=any(not one.verdict.equivalent for one in costs))
    return code, _json_report(json_file, measured)


def _json_report(path: Path | None, content: Any) -> Report:
    text = json.dumps(content, indent=2)
    return Report("--json", path, lambda file: file.write_text(text, encoding="utf-8"))


def criteria_table(table: CriteriaTable) -> Table:
    """One row per subject, one column per criterion, in percent of the draws."""
    shown = Table(
        title=f"% of {table.draws} layers called wrong ({table.size}, bf16, seed {table.seed})",
        title_justify="left",
    )
    shown.add_column("subject", no_wrap=True)
    for name in CRITERIA:
        shown.add_column(name, justify="right", overflow="fold")
    for subject in SUBJECTS:
        cells = []
        for name in CRITERIA:
            share = table.share(name, subject)
            right = share == 0 if subject == CORRECT else share == 1
            cells.append(f"{100 * share:.0f}" if right else f"[red]{100 * share:.0f}[/red]")
        shown.add_row(subject, *cells)
    return shown


def path_table(records: Sequence[PathRecord]) -> Table:
    """One row per path and EP size: the slack of its bounds, and what its flips look like."""
    shown = Table(title="error / allowed error and flips of correct paths", title_justify="left")
    shown.add_column("path", no_wrap=True)
    for name in ("EP", "cases", "worst ratio", "median", "flips", "expected at most", "sign score"):
        shown.add_column(name, justify="right")
    for record in records:
        if not record.ratios:
            shown.add_row(record.path, str(record.ep_size), "0", *["-"] * 5)
            continue
        worst = max(record.ratios)
        shown.add_row(
            record.path,
            str(record.ep_size),
            str(len(record.ratios)),
            f"[red]{worst:.2f}[/red]" if record.alarms else f"{worst:.2f}",
            f"{median(record.ratios):.2f}",
            f"{100 * mean(record.flips):.2f} %",
            f"{100 * mean(record.expected):.2f} %",
            f"{record.sign_score:+.1f}",
        )
    return shown


def cost_table(costs: Sequence[cost.Cost]) -> Table:
    """One row per size: the time of one judgement, and the memory that it took."""
    shown = Table(
        title=f"one judgement of {cost.TOKENS} tokens with all their experts", title_justify="left"
    )
    shown.add_column("size", no_wrap=True)
    for name in ("seconds", "of them drawing weights", "peak memory", "flips", "expected at most"):
        shown.add_column(name, justify="right")
    for one in costs:
        elements = max(one.verdict.elements, 1)
        shown.add_row(
            one.size,
            f"{one.seconds:.2f}",
            f"{one.making:.2f}",
            f"{one.peak_mib:.0f} MiB",
            f"{100 * one.verdict.flips / elements:.2f} %",
            f"{100 * one.verdict.expected_flips / elements:.2f} %",
        )
    return shown
