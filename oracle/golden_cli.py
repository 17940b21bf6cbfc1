"""``twinmoe golden``: record cases with their truth, and compare with a recording.

Exit codes of ``compare``: 0 equivalent, 1 not equivalent, 2 the file, or the request, is unusable.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from twinmoe.oracle import doctor as diagnosis
from twinmoe.oracle.case import TRANSPORTS, Case
from twinmoe.oracle.failures import WorkerFailure
from twinmoe.oracle.golden import (
    Comparison,
    GoldenError,
    Target,
    compare,
    drawn_cases,
    export,
    load,
    record,
    report,
    save,
)
from twinmoe.oracle.golden.file import occupied
from twinmoe.oracle.golden.record import SUBJECT, NotEquivalentError, check_recordable
from twinmoe.oracle.golden.suites import suite, suites
from twinmoe.oracle.golden.target import on_device, questions, shared_evenly
from twinmoe.oracle.strategies import DEVICE_TRANSPORTS
from twinmoe.oracle.trial import Trial
from twinmoe.reference.config import ConfigError
from twinmoe.reference.published import PUBLISHED, published, scaled

#: Cases that are drawn, and ranks that share them, unless said otherwise.
_CASES, _RANKS = 8, 2

_console = Console()

_FILE = click.Path(path_type=Path)
_device = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True
)
_timeout = click.option(
    "--timeout", type=click.FloatRange(min=1), default=30.0, show_default=True,
    help="Seconds without progress that count as a hang.",
)  # fmt: skip


@click.group()
def golden() -> None:
    """Record cases with their truth; compare with a recording elsewhere, later."""


def _list_of_suites() -> str:
    lines = [f"{name} ({len(one.cases)} cases): {one.about}" for name, one in suites().items()]
    return "Suites:\n\n" + "\n\n".join(lines)


@golden.command(name="record", epilog=_list_of_suites())
@click.argument("file", type=_FILE)
@click.option(
    "--suite", "suite_name", type=click.Choice(list(suites())),
    help="Record the cases of a suite; they are listed below.",
)  # fmt: skip
@click.option("--case", "lines", multiple=True, help="Record this case line; may be repeated.")
@click.option("--cases", type=click.IntRange(1), help=f"Draw so many cases; {_CASES} by default.")
@click.option("--model", type=click.Choice(list(PUBLISHED)), help="Draw of a published geometry.")
@click.option("--scale", type=click.IntRange(1), help="Divide the model's widths.")
@click.option("--seed", type=int, help="Of the drawn cases; 0 by default.")
@click.option(
    "--ep", type=click.IntRange(1), help=f"Ranks that share the tokens; {_RANKS} for drawn cases."
)
@_device
@_timeout
def record_command(
    file: Path,
    suite_name: str | None,
    lines: Sequence[str],
    cases: int | None,
    model: str | None,
    scale: int | None,
    seed: int | None,
    ep: int | None,
    device: str,
    timeout: float,
) -> None:
    """Record cases into FILE: their truth, and what the optimized layer shows now.

    Cases are those of a suite, or case lines, or drawn: of all layers, or of a --model.
    """
    diagnosis.require(device)
    drawing = {"--cases": cases, "--model": model, "--scale": scale, "--seed": seed}
    _check_one_way({"--suite": suite_name, "--case": lines or None, **drawing})
    if suite_name is not None:
        chosen = [on_device(case, device) for case in suite(suite_name).cases]
        chosen = [shared_evenly(case, ep or case.ep_size) for case in chosen]
    elif lines:
        if ep is not None:
            raise ConfigError(
                f"--ep ({ep}) contradicts --case, whose line has its own ranks: write as many "
                "counts into its T, or drop --ep"
            )
        chosen = [Case.parse(line) for line in lines]
    else:
        if scale is not None and model is None:
            raise ConfigError(
                f"--scale ({scale}) has nothing to scale: it divides a published model's widths; "
                f"add --model, one of {', '.join(PUBLISHED)}"
            )
        chosen = drawn_cases(
            cases or _CASES,
            ep_size=ep or _RANKS,
            transports=DEVICE_TRANSPORTS[device],
            draw_seed=seed or 0,
            model=scaled(published(model), scale or 1) if model else None,
            device=device,
        )
    for case in chosen:
        check_recordable(case)
        diagnosis.require_case(case, device)
    _check_place(file)
    if file.exists():
        raise ConfigError(occupied(file))
    with _bar() as progress, Trial(device, timeout, (SUBJECT,)) as trial:
        task = progress.add_task("recording", total=len(chosen))
        try:
            recording = record(chosen, trial, device, lambda _: progress.advance(task))
        except (NotEquivalentError, WorkerFailure) as failure:
            _tell(f"{type(failure).__name__}: {failure}")
            sys.exit(1)
    try:
        save(recording, file)
    except OSError as error:
        raise ConfigError(
            f"file ({file}) cannot be written: {error.strerror}, and nothing of it is left; make "
            "room, or choose another place"
        ) from None
    count = "1 case" if len(chosen) == 1 else f"{len(chosen)} cases"
    _tell(f"recorded {count} into {file}, {file.stat().st_size} bytes")


def _check_one_way(given: dict[str, object]) -> None:
    """Raise ConfigError for two ways of choosing cases at a time; the options of a draw are one."""
    named = [name for name, value in given.items() if value is not None]
    ways = {name if name in ("--suite", "--case") else "a draw": name for name in named}
    if len(ways) > 1:
        raise ConfigError(
            f"{' and '.join(ways.values())} choose cases in different ways: give --suite, or "
            "--case (as often as you like), or the options of a draw (--cases, --model, --scale, "
            "--seed)"
        )


@golden.command(name="compare")
@click.argument("file", type=_FILE)
@click.option("--transport", type=click.Choice(TRANSPORTS), help="Instead of each case's own.")
@click.option("--ep", type=click.IntRange(1), help="Share the tokens of each case by so many.")
@click.option(
    "--subject", default=SUBJECT, show_default=True, metavar="MODULE:FACTORY",
    help="Compare this layer instead: package.module:factory or file.py:factory; on one rank, "
    "unless --ep says otherwise.",
)  # fmt: skip
@click.option("--fault", default="", help="Plant this fault: the comparison must fail.")
@click.option("--json", "json_file", type=_FILE, help="Write a JSON report.")
@click.option("--junit", "junit_file", type=_FILE, help="Write a JUnit XML report.")
@_device
@_timeout
def compare_command(
    file: Path,
    transport: str | None,
    ep: int | None,
    subject: str,
    fault: str,
    json_file: Path | None,
    junit_file: Path | None,
    device: str,
    timeout: float,
) -> None:
    """Play the cases of FILE again, here, and judge each element by the recorded truth."""
    diagnosis.require(device)
    for option in (json_file, junit_file):
        if option is not None:
            _check_place(option)
    target = Target(device, transport, ep, subject, fault)
    try:
        recording = load(file)
        questions(recording, target)  # refuses before workers start
        with _bar() as progress, Trial(device, timeout, (subject,)) as trial:
            task = progress.add_task("comparing", total=len(recording.cases))
            comparison = compare(recording, trial, target, lambda _: progress.advance(task))
    except GoldenError as error:
        raise ConfigError(str(error)) from None
    report.show(comparison, _console)
    if json_file is not None:
        export.write_json(comparison, json_file)
    if junit_file is not None:
        export.write_junit(comparison, junit_file)
    sys.exit(_exit_code(comparison))


def _exit_code(comparison: Comparison) -> int:
    if comparison.equivalent:
        return 0
    return 1 if comparison.decided else 2


def _check_place(path: Path) -> None:
    """Raise ConfigError, before anything runs, unless a file can be written there."""
    folder = path.parent
    if not folder.is_dir():
        raise ConfigError(f"file ({path}) has no folder to lie in: create {folder} first")
    if path.is_dir():
        raise ConfigError(f"file ({path}) is a folder: name a file in it")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigError(f"file ({path}) cannot be written: no permission; choose another place")


def _bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=_console, transient=True)


def _tell(text: str) -> None:
    _console.print(text, markup=False, highlight=False, soft_wrap=True)
