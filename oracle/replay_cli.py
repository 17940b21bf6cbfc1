"""``twinmoe replay``: run case lines again and print their verdicts."""

import traceback

import click

from twinmoe.oracle import doctor as diagnosis
from twinmoe.oracle.case import Case
from twinmoe.oracle.defects import JudgeDefectError
from twinmoe.oracle.exit_codes import verdict_code
from twinmoe.oracle.failures import WorkerFailure, account
from twinmoe.oracle.strategies import transports_on
from twinmoe.oracle.subject_cli import plain_name, subject_option, subjects_of
from twinmoe.oracle.terminal import (
    console,
    device_option,
    finish,
    say,
    say_what_was_ended,
    timeout_option,
)
from twinmoe.oracle.trial import Outcome, Trial
from twinmoe.reference.config import ConfigError


@click.command()
@click.argument("cases", metavar="CASE...", nargs=-1, required=True)
@device_option
@timeout_option(15.0)
@subject_option
def replay(cases: tuple[str, ...], device: str, timeout: float, subject: str | None) -> None:
    """Run CASE lines again, in this order by the same workers, and print their verdicts.

    Exit codes are those of check.  What layers printed comes after, on standard error.
    """
    parsed = [Case.parse(case) for case in cases]
    for case in parsed:
        diagnosis.require_case(case, device)
        transports_on(device, case.transport)
    defects: list[JudgeDefectError] = []
    with Trial(device, timeout, subjects_of(plain_name(subject))) as trial:
        replayed = [_replayed(trial, case, subject, defects) for case in parsed]
        for size in {case.ep_size for case in parsed}:
            trial.require_alive(size)
    say_what_was_ended(trial.cut_off)
    for defect in defects:
        traceback.print_exception(defect)
    wrong, cut_off = not all(replayed), bool(trial.cut_off)
    finish(verdict_code(wrong=wrong, not_judged=bool(defects), cut_off=cut_off))


def _replayed(
    trial: Trial, case: Case, subject: str | None, defects: list[JudgeDefectError]
) -> bool:
    """Run and show one case; whether it is equivalent, as far as anything is known."""
    try:
        outcome = trial.run(case)
        if subject is not None:
            _diagnose(trial, outcome, defects)
    except JudgeDefectError as defect:
        defects.append(defect)
        return True
    except WorkerFailure as failure:
        trial.require_subjects_own(case, failure)
        say(f"{type(failure).__name__}: {failure}" if subject is None else account(failure))
        return failure.outside is not None
    if not outcome.fault_met:
        raise ConfigError(
            f"fault ({case.fault!r}) was met by no rank: the verdicts say nothing of it"
        )
    for name, verdict in outcome.verdicts.items():
        console.print(f"{name} ({outcome.paths[name]})", style="bold", soft_wrap=True)
        say(f"  {verdict}")
    for mistake in outcome.diagnosis:
        say(f"this is what one gets if {mistake}")
    return outcome.equivalent


def _diagnose(trial: Trial, outcome: Outcome, defects: list[JudgeDefectError]) -> None:
    try:
        trial.diagnose(outcome)
    except JudgeDefectError as defect:  # what was found stands
        defects.append(defect)
