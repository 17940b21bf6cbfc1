"""The command line: ``twinmoe check``, ``replay``, ``doctor``, ``contracts``, ``calibrate``.

Exit codes: 0 equivalent, 1 not equivalent, 2 could not run, 130 interrupted.  Anyone's layer
that raises is not equivalent if it answered other cases, and could not run if it answered none.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click
import torch
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from twinmoe.oracle import doctor as diagnosis
from twinmoe.oracle import report, torchrun
from twinmoe.oracle.bench_cli import bench
from twinmoe.oracle.calibrate_cli import calibrate
from twinmoe.oracle.case import MODES, Case, CaseError
from twinmoe.oracle.check import Plan, Summary, check, plan_cells
from twinmoe.oracle.contracts_cli import contracts
from twinmoe.oracle.failures import WorkerFailure, account
from twinmoe.oracle.faults_cli import faults
from twinmoe.oracle.golden_cli import golden
from twinmoe.oracle.interrupts import heard_once
from twinmoe.oracle.killswitch_cli import killswitch
from twinmoe.oracle.strategies import DEVICE_TRANSPORTS, EP_SIZES, Cell
from twinmoe.oracle.subject import SUBJECTS
from twinmoe.oracle.subject_cli import (
    MORE_CASES,
    asked_of_subject,
    could_not_run,
    not_judged,
    plain_name,
    subject_option,
    timeout_option,
)
from twinmoe.oracle.subject_spec import PlainName
from twinmoe.oracle.trial import Trial
from twinmoe.reference.config import DTYPES, ConfigError, MoEConfig, dtype_name
from twinmoe.reference.published import PUBLISHED, published, scaled

EQUIVALENT, NOT_EQUIVALENT, COULD_NOT_RUN, INTERRUPTED = 0, 1, 2, 130

#: Random cases in each cell, by profile; pinned corners come on top.
PROFILES = {"quick": 2, "ci": 2, "nightly": 40}

_console = Console()


class _Program(click.Group):
    """Ends bad input in one line on stderr, and Ctrl-C in a code that is no verdict."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Run the command line and exit the process."""
        try:
            with heard_once():
                super().main(*args, **{**extra, "standalone_mode": False})
            sys.exit(EQUIVALENT)
        except click.UsageError as error:
            asked = error.ctx.command_path if error.ctx else "twinmoe"
            _end(f"{error.format_message().rstrip('.')}; see {asked} --help", COULD_NOT_RUN)
        except (ConfigError, CaseError) as error:
            _end(str(error), COULD_NOT_RUN)
        except click.Abort:
            _end("interrupted; no verdict", INTERRUPTED)


def _end(message: str, code: int) -> NoReturn:
    click.echo(f"twinmoe: {message}", err=True)
    sys.exit(code)


def _listed(known: Sequence[str]) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """A callback for a comma-separated option whose parts are in ``known``."""

    def parse(_context: click.Context, _parameter: click.Parameter, text: str) -> list[str]:
        parts = [part.strip() for part in text.split(",")]
        for part in parts:
            if part not in known:
                raise click.BadParameter(f"{part!r} is unknown: choose from {', '.join(known)}")
        return parts

    return parse


def _ep_sizes(context: click.Context, parameter: click.Parameter, text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of sizes: write 1,2,4,8") from None
    if min(sizes) < 1:
        raise click.BadParameter(f"{min(sizes)} is not a group size: use 1 or more")
    if context.get_parameter_source(parameter.name or "") is ParameterSource.DEFAULT:
        largest = torchrun.largest_world() or max(sizes)
        return [size for size in sizes if size <= largest]
    return sizes


@click.group(
    cls=_Program, no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]}
)
def main() -> None:
    """One MoE layer implemented twice, and a judge that decides whether they are equivalent."""
    # The judge's tensors are small, and the workers want the cores.
    torch.set_num_threads(1)
    if torchrun.serve():
        sys.exit(EQUIVALENT)


@main.command(name="check")
@click.option(
    "--ep", default=",".join(map(str, EP_SIZES)), callback=_ep_sizes,
    show_default=f"{','.join(map(str, EP_SIZES))}; 1 with --subject",
    help="Expert-parallel sizes.",
)  # fmt: skip
@click.option("--transport", default=None, help="Transports; all that this device has by default.")
@click.option(
    "--mode", default=",".join(MODES), callback=_listed(MODES), show_default=True,
    help="How the graphed path runs.",
)  # fmt: skip
@click.option(
    "--dtype", default="bf16,fp16,fp32", callback=_listed(("bf16", "fp16", "fp32")),
    show_default=True, help="Model dtypes.",
)  # fmt: skip
@click.option("--profile", type=click.Choice(list(PROFILES)), default="quick", show_default=True)
@click.option(
    "--cases", type=click.IntRange(1), help="Random cases a cell, instead of a profile's."
)
@click.option("--model", type=click.Choice(list(PUBLISHED)), help="A published geometry.")
@click.option("--scale", type=click.IntRange(1), help="Divide the model's widths by this.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--fault", default="", help="Plant this fault: the check must fail.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@timeout_option
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
@subject_option
def check_command(**options: Any) -> None:
    """Run both twins side by side over every path, and judge each output element."""
    summary = _run_check(**asked_of_subject(options))
    if options["json_file"] is not None:
        report.write_json(summary, options["json_file"])
    if summary.unanswered:
        click.echo(report.failures(summary)[0], err=True)
        _end(could_not_run(summary), COULD_NOT_RUN)
    if summary.plan.subject is None:
        verified = diagnosis.not_verified(options["device"])
    else:
        verified = not_judged(summary)
    report.show(summary, _console, verified)
    sys.exit(EQUIVALENT if summary.equivalent else NOT_EQUIVALENT)


def _run_check(**options: Any) -> Summary:
    device = options["device"]
    diagnosis.require(device)
    transports = _transports(options["transport"], device)
    dtypes = [DTYPES[name] for name in options["dtype"]]
    subject = plain_name(options["subject"])
    cases = options["cases"] or PROFILES[options["profile"]] * (MORE_CASES if subject else 1)
    plan = Plan(
        plan_cells(options["ep"], transports, options["mode"], dtypes),
        cases,
        _model(options["model"], options["scale"]),
        options["seed"],
        options["fault"],
        device,
        subject,
    )
    plan.check()
    if options["json_file"] is not None:
        _check_writable(options["json_file"])
    summary = _with_progress(plan, device, options["timeout"])
    if plan.fault and not summary.planted:
        raise ConfigError(
            f"fault ({plan.fault!r}) was reached by none of {summary.cases} cases: nothing was "
            "shown about it; check more cells or cases"
        )
    return summary


def _transports(text: str | None, device: str) -> list[str]:
    available = DEVICE_TRANSPORTS[device]
    if text is None:
        return list(available)
    transports = [part.strip() for part in text.split(",")]
    for transport in transports:
        if transport not in available:
            raise ConfigError(
                f"transport ({transport!r}) does not run on {device}: choose from "
                f"{', '.join(available)}"
            )
    return transports


def _model(name: str | None, scale: int | None) -> MoEConfig | None:
    if name is not None:
        return scaled(published(name), scale or 1)
    if scale is not None:
        raise ConfigError(
            f"--scale ({scale}) has nothing to scale: it divides a published model's widths; add "
            f"--model, one of {', '.join(PUBLISHED)}"
        )
    return None


def _check_writable(path: Path) -> None:
    if not path.parent.is_dir():
        raise ConfigError(
            f"--json ({path}) cannot be written: {path.parent} is not a directory; create it first"
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"--json ({path}) cannot be written: no permission; choose another file")


def _with_progress(plan: Plan, device: str, timeout_s: float) -> Summary:
    columns = (
        TextColumn("{task.description:32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with (
        Progress(*columns, console=_console, transient=True) as progress,
        Trial(device, timeout_s, _names(plan.subject)) as trial,
    ):
        task = progress.add_task("starting workers", total=plan.total)

        def advance(result: Any, _case: Case) -> None:
            progress.update(task, advance=1, description=_short(result.cell))

        return check(plan, trial, advance)


def _names(subject: PlainName | None) -> tuple[str, ...]:
    return tuple(SUBJECTS) if subject is None else (subject.text,)


def _short(cell: Cell) -> str:
    return f"EP {cell.ep_size} {cell.transport} {cell.mode} {dtype_name(cell.dtype)}"


@main.command()
@click.argument("case")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@timeout_option
@subject_option
def replay(case: str, device: str, timeout: float, subject: str | None) -> None:
    """Run one CASE line again and print its verdicts."""
    parsed = Case.parse(case)
    diagnosis.require_case(parsed, device)
    _transports(parsed.transport, device)
    with Trial(device, timeout, _names(plain_name(subject))) as trial:
        try:
            outcome = trial.run(parsed)
            if subject is not None:
                trial.diagnose(outcome)
        except WorkerFailure as failure:
            if subject is not None:
                click.echo(account(failure), err=True)
                _end(f"{subject} gave no answer, so there is no verdict", COULD_NOT_RUN)
            _console.print(f"{type(failure).__name__}: {failure}", markup=False, soft_wrap=True)
            sys.exit(NOT_EQUIVALENT)
    for name, verdict in outcome.verdicts.items():
        _console.print(f"{name} ({outcome.paths[name]})", style="bold", soft_wrap=True)
        _console.print(f"  {verdict}", markup=False, highlight=False, soft_wrap=True)
    for mistake in outcome.diagnosis:
        _console.print(f"this is what one gets if {mistake}", markup=False, soft_wrap=True)
    sys.exit(EQUIVALENT if outcome.equivalent else NOT_EQUIVALENT)


@main.command()
def doctor() -> None:
    """Say which transports and expert backends are available here, and why not the others."""
    _console.print(diagnosis.table(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    _console.print(diagnosis.versions(), highlight=False)


main.add_command(bench)
main.add_command(calibrate)
main.add_command(contracts)
main.add_command(faults)
main.add_command(golden)
main.add_command(killswitch)


if __name__ == "__main__":
    main()
