"""``twinmoe golden``: record cases with their truth, and compare with a recording.

Exit codes of ``compare``: 0 equivalent, 1 not equivalent, 2 the file, or the request, is unusable.
"""

import json
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
    GoldenError,
    Target,
    compare,
    drawn_cases,
    load,
    record,
    report,
    save,
)
from twinmoe.oracle.golden.record import SUBJECT, NotEquivalentError, check_recordable
from twinmoe.oracle.trial import Trial
from twinmoe.reference.config import ConfigError
from twinmoe.reference.published import PUBLISHED, published, scaled

_DRAWN = {"cpu": ("p2p", "nvls", "gloo", "alltoall"), "cuda": ("p2p", "nccl", "alltoall")}

_console = Console()

_FILE = click.Path(dir_okay=False, path_type=Path)
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


@golden.command(name="record")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--cases", type=click.IntRange(1), help="Draw so many cases; 8 by default.")
@click.option("--case", "lines", multiple=True, help="Record this case line; may be repeated.")
@click.option("--model", type=click.Choice(list(PUBLISHED)), help="Draw of a published geometry.")
@click.option("--scale", type=click.IntRange(1), default=1, help="Divide the model's widths.")
@click.option(
    "--ep", type=click.IntRange(1), default=2, show_default=True, help="Ranks of drawn cases."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the drawn cases.")
@_device
@_timeout
def record_command(
    file: Path,
    cases: int | None,
    lines: Sequence[str],
    model: str | None,
    scale: int,
    ep: int,
    seed: int,
    device: str,
    timeout: float,
) -> None:
    """Record cases into FILE: their truth, and what the optimized layer shows now."""
    diagnosis.require(device)
    chosen = [Case.parse(line) for line in lines]
    if cases or not chosen:
        geometry = scaled(published(model), scale) if model else None
        chosen += drawn_cases(
            cases or 8, ep_size=ep, transports=_DRAWN[device], draw_seed=seed, model=geometry,
            device=device,
        )  # fmt: skip
    elif model:
        raise ConfigError(
            f"--model ({model}) is for drawn cases, but only --case is given: the line has its own "
            "layer; add --cases N, or drop one of the two"
        )
    for case in chosen:
        check_recordable(case)
        diagnosis.require_case(case, device)
    if not file.parent.is_dir():
        raise ConfigError(f"FILE ({file}) has no folder to lie in: create {file.parent} first")
    with _bar() as progress, Trial(device, timeout, (SUBJECT,)) as trial:
        task = progress.add_task("recording", total=len(chosen))
        try:
            recording = record(chosen, trial, device, lambda _: progress.advance(task))
        except (NotEquivalentError, WorkerFailure) as failure:
            _tell(f"{type(failure).__name__}: {failure}")
            sys.exit(1)
    save(recording, file)
    _tell(f"recorded {len(chosen)} cases into {file}, {file.stat().st_size} bytes")


@golden.command(name="compare")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--transport", type=click.Choice(TRANSPORTS), help="Instead of each case's own.")
@click.option("--ep", type=click.IntRange(1), help="Share the tokens of each case by so many.")
@click.option("--subject", default=SUBJECT, show_default=True, help="The layer to compare.")
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
        if option is not None and not option.parent.is_dir():
            raise ConfigError(f"a report ({option}) has no folder to lie in: create it first")
    target = Target(device, transport, ep, subject, fault)
    try:
        recording = load(file)
        with _bar() as progress, Trial(device, timeout, (subject,)) as trial:
            task = progress.add_task("comparing", total=len(recording.cases))
            comparison = compare(recording, trial, target, lambda _: progress.advance(task))
    except GoldenError as error:
        raise ConfigError(str(error)) from None
    report.show(comparison, _console)
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_json(comparison), indent=2) + "\n")
    if junit_file is not None:
        report.write_junit(comparison, junit_file)
    sys.exit(0 if comparison.equivalent else 1)


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
