"""``twinmoe golden``: record cases with their truth, and compare with a recording.

Exit codes of ``compare``: 0 equivalent, 1 not equivalent, 2 the file, or the request, is unusable.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click

from twinmoe.oracle import doctor as diagnosis
from twinmoe.oracle.case import TRANSPORTS, Case
from twinmoe.oracle.exit_codes import NOT_EQUIVALENT, verdict_code
from twinmoe.oracle.failures import WorkerFailure
from twinmoe.oracle.golden import (
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
from twinmoe.oracle.terminal import (
    Report,
    check_writable,
    console,
    device_option,
    finish,
    json_option,
    progress,
    say,
    say_what_was_ended,
    timeout_option,
)
from twinmoe.oracle.trial import Trial
from twinmoe.reference.config import ConfigError
from twinmoe.reference.published import PUBLISHED, published, scaled

#: Cases that are drawn, and ranks that share them, unless said otherwise.
_CASES, _RANKS = 8, 2

_FILE = click.Path(path_type=Path)


@click.group(no_args_is_help=False)
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
@device_option
@timeout_option(30.0)
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
    check_writable(file, "file")
    if file.exists():
        raise ConfigError(occupied(file))
    with progress("recording", len(chosen)) as advance, Trial(device, timeout, (SUBJECT,)) as trial:
        try:
            recording = record(chosen, trial, device, lambda _: advance())
        except (NotEquivalentError, WorkerFailure) as failure:
            say(f"{type(failure).__name__}: {failure}")
            sys.exit(NOT_EQUIVALENT)
    try:
        save(recording, file)
    except OSError as error:
        raise ConfigError(
            f"file ({file}) cannot be written: {error.strerror}, and nothing of it is left; make "
            "room, or choose another place"
        ) from None
    count = "1 case" if len(chosen) == 1 else f"{len(chosen)} cases"
    say(f"recorded {count} into {file}, {file.stat().st_size} bytes")


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
@json_option
@click.option("--junit", "junit_file", type=_FILE, help="Write a JUnit XML report.")
@device_option
@timeout_option(30.0)
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
    check_writable(json_file, "--json")
    check_writable(junit_file, "--junit")
    target = Target(device, transport, ep, subject, fault)
    try:
        recording = load(file)
        questions(recording, target)  # refuses before workers start
        count = len(recording.cases)
        with progress("comparing", count) as advance, Trial(device, timeout, (subject,)) as trial:
            comparison = compare(recording, trial, target, lambda _: advance())
    except GoldenError as error:
        raise ConfigError(str(error)) from None
    say_what_was_ended(trial.cut_off)
    report.show(comparison, console)
    code = verdict_code(
        wrong=bool(comparison.failed),
        # nothing was shown, or the judge broke at a case
        not_judged=not comparison.equivalent,
        cut_off=bool(trial.cut_off),
    )
    finish(
        code,
        Report("--json", json_file, partial(export.write_json, comparison)),
        Report("--junit", junit_file, partial(export.write_junit, comparison)),
    )
