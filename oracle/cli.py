"""The command line: ``twinmoe check``, ``replay``, ``doctor``, ``contracts``, ``calibrate``.

Exit codes: 0 equivalent, 1 not equivalent, 2 could not run, 3 ended from outside, 4 equivalent but
for a report or output that could not be written, 130 interrupted.  A layer that raises, hangs or
dies is not equivalent; what fails before a layer is asked anything could not run; where the system
or somebody ended or stopped a rank, there is no verdict.  A case that twinmoe itself fails to judge
costs no other its verdict: exit 2, unless something is wrong.
"""

import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import click
import torch
from click.core import ParameterSource
from hypothesis.configuration import set_hypothesis_home_dir

from twinmoe.oracle import doctor as diagnosis
from twinmoe.oracle import printed_report, report, torchrun
from twinmoe.oracle.bench_cli import bench
from twinmoe.oracle.calibrate_cli import calibrate
from twinmoe.oracle.case import MODES, CaseError
from twinmoe.oracle.check import Summary, check
from twinmoe.oracle.contracts_cli import contracts
from twinmoe.oracle.exit_codes import (
    COULD_NOT_RUN,
    ENDED_FROM_OUTSIDE,
    EQUIVALENT,
    INTERRUPTED,
    NOT_EQUIVALENT,
    verdict_code,
)
from twinmoe.oracle.failures import SetUpError, WorkerFailure, account
from twinmoe.oracle.faults_cli import faults
from twinmoe.oracle.golden_cli import golden
from twinmoe.oracle.interrupts import heard_once
from twinmoe.oracle.journal import Journal
from twinmoe.oracle.killswitch_cli import killswitch
from twinmoe.oracle.plan import Plan, plan_cells
from twinmoe.oracle.plots import PlotError
from twinmoe.oracle.replay_cli import replay
from twinmoe.oracle.strategies import EP_SIZES, Cell, transports_on
from twinmoe.oracle.subject_cli import (
    MORE_CASES,
    asked_of_subject,
    not_judged,
    plain_name,
    subject_option,
    subjects_of,
)
from twinmoe.oracle.terminal import (
    Report,
    check_writable,
    console,
    device_option,
    finish,
    json_option,
    progress,
    ranks_of,
    timeout_option,
)
from twinmoe.oracle.trial import Trial
from twinmoe.reference.config import DTYPES, ConfigError, MoEConfig, dtype_name
from twinmoe.reference.published import PUBLISHED, published, scaled

#: Random cases in each cell, by profile; pinned corners come on top.
PROFILES = {"quick": 2, "ci": 2, "nightly": 40}


class _Program(click.Group):
    """Ends bad input in one line on stderr, and Ctrl-C in a code that is no verdict."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Run the command line and exit the process."""
        try:
            with heard_once():
                super().main(*args, **{**extra, "standalone_mode": False})
            finish(EQUIVALENT)
        except click.UsageError as error:
            asked = error.ctx.command_path if error.ctx else "twinmoe"
            _end(f"{error.format_message().rstrip('.')}; see {asked} --help", COULD_NOT_RUN)
        except (ConfigError, CaseError, PlotError) as error:
            _end(str(error), COULD_NOT_RUN)
        except SetUpError as error:
            click.echo(account(error.failure), err=True)
            _end("workers could not run; no verdict", COULD_NOT_RUN)
        except WorkerFailure as failure:
            click.echo(account(failure), err=True)  # anyone's file and line first, to click on
            if failure.outside is not None:
                _end("a worker was ended from outside; no verdict", ENDED_FROM_OUTSIDE)
            if failure.is_set_up:
                _end("a worker could not run; no verdict", COULD_NOT_RUN)
            _end("the layer failed", NOT_EQUIVALENT)
        except (click.Abort, KeyboardInterrupt):
            _end("interrupted; no verdict", INTERRUPTED)
        except OSError as error:  # a disk that is full, a reader that is gone
            _end(f"{error}; no verdict", COULD_NOT_RUN)
        except Exception:  # a mistake of this program is no verdict on anybody's layer
            traceback.print_exc()
            _end("this is a defect of twinmoe, and no verdict: please report it", COULD_NOT_RUN)


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
    sizes = ranks_of(text, "--ep")
    if context.get_parameter_source(parameter.name or "") is ParameterSource.DEFAULT:
        largest = torchrun.largest_world() or max(sizes)
        return [size for size in sizes if size <= largest]
    return sizes


@click.version_option(package_name="twinmoe")
@click.group(
    cls=_Program, no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]}
)
def main() -> None:
    """One MoE layer implemented twice, and a judge that decides whether they are equivalent."""
    # The judge's tensors are small, and the workers want the cores.
    torch.set_num_threads(1)
    printed_report.at_the_end()
    _keep_hypothesis_out_of_here()
    if torchrun.serve():
        sys.exit(EQUIVALENT)


def _keep_hypothesis_out_of_here() -> None:
    """Hypothesis would leave a folder where the user stands; no database of ours lies in it."""
    context = click.get_current_context()
    scratch = tempfile.TemporaryDirectory(prefix="twinmoe-")
    set_hypothesis_home_dir(context.with_resource(scratch))
    context.call_on_close(lambda: set_hypothesis_home_dir(None))


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
@click.option(
    "--profile", type=click.Choice(list(PROFILES)), default="quick", show_default=True,
    help="How many random cases a cell has.",
)  # fmt: skip
@click.option(
    "--cases", type=click.IntRange(1), help="Random cases a cell, instead of a profile's."
)
@click.option("--model", type=click.Choice(list(PUBLISHED)), help="A published geometry.")
@click.option("--scale", type=click.IntRange(1), help="Divide the model's widths by this.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random cases.")
@click.option("--fault", default="", help="Plant this fault: the check must fail.")
@device_option
@timeout_option(15.0)
@json_option
@click.option(
    "--journal", "journal_file", type=click.Path(path_type=Path),
    help="Keep each case's result in this file as it comes.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on from what --journal holds.")
@subject_option
def check_command(**options: Any) -> None:
    """Run both twins side by side over every path, and judge each output element.

    Exit 0: equivalent.  Exit 1: not equivalent.  Exit 2: could not run.  Exit 3: a rank was ended
    from outside, and nothing else is wrong.  Exit 130: interrupted.
    """
    summary, journal = _run_check(**asked_of_subject(options))
    if summary.plan.subject is None:
        verified = diagnosis.not_verified(options["device"])
    else:
        verified = not_judged(summary)
    report.show(summary, console, verified)
    if summary.interrupted:
        click.echo("twinmoe: interrupted; no verdict", err=True)
    code = verdict_code(
        wrong=summary.wrong, not_judged=bool(summary.defects), cut_off=bool(summary.cut_off)
    )
    finish(
        INTERRUPTED if summary.interrupted else code,
        Report("--json", options["json_file"], partial(report.write_json, summary)),
        incomplete=journal.error and f"--journal ({journal.path}) is incomplete: {journal.error}",
    )


def _run_check(**options: Any) -> tuple[Summary, Journal]:
    device = options["device"]
    diagnosis.require(device)
    transports = transports_on(device, options["transport"])
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
    check_writable(options["json_file"], "--json")
    if options["resume"] and options["journal_file"] is None:
        raise ConfigError("--resume has nothing to go on from: add the --journal of that run")
    with Journal(options["journal_file"], plan.identity, options["resume"]) as journal:
        summary = _with_progress(plan, device, options["timeout"], journal)
    if plan.fault and not summary.planted and not summary.interrupted:
        raise ConfigError(
            f"fault ({plan.fault!r}) was reached by none of {summary.cases} cases: nothing was "
            "shown about it; check more cells or cases"
        )
    return summary, journal


def _model(name: str | None, scale: int | None) -> MoEConfig | None:
    if name is not None:
        return scaled(published(name), scale or 1)
    if scale is not None:
        raise ConfigError(
            f"--scale ({scale}) has nothing to scale: it divides a published model's widths; add "
            f"--model, one of {', '.join(PUBLISHED)}"
        )
    return None


def _with_progress(plan: Plan, device: str, timeout_s: float, journal: Journal) -> Summary:
    with (
        progress("starting workers", plan.total, columns=32) as advance,
        Trial(device, timeout_s, subjects_of(plan.subject)) as trial,
    ):
        return check(plan, trial, lambda result, _case: advance(_short(result.cell)), journal)


def _short(cell: Cell) -> str:
    return f"EP {cell.ep_size} {cell.transport} {cell.mode} {dtype_name(cell.dtype)}"


@main.command()
def doctor() -> None:
    """Say which transports and expert backends are available here, and why not the others."""
    console.print(diagnosis.table(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    console.print(diagnosis.versions(), highlight=False)


main.add_command(bench)
main.add_command(calibrate)
main.add_command(contracts)
main.add_command(faults)
main.add_command(golden)
main.add_command(killswitch)
main.add_command(replay)


if __name__ == "__main__":
    main()
