"""``twinmoe killswitch``: does switching the symmetric-memory kernels off really fall back?"""

from collections.abc import Sequence

import click
from rich.table import Table

from twinmoe.oracle import doctor as diagnosis
from twinmoe.oracle.exit_codes import verdict_code
from twinmoe.oracle.failures import name_ranks
from twinmoe.oracle.killswitch import Result, validate
from twinmoe.oracle.killswitch_checks import Place
from twinmoe.oracle.terminal import (
    console,
    device_option,
    finish,
    say,
    timeout_option,
)
from twinmoe.oracle.torchrun import open_world


@click.command(name="killswitch")
@click.option("--ep", type=click.IntRange(1, 8), default=2, show_default=True, help="Ranks.")
@device_option
@click.option("--fault", default="", help="Let the last rank apply the switch by half.")
@timeout_option(10.0)
def killswitch(ep: int, device: str, fault: str, timeout: float) -> None:
    """Flip the kill switch in every way and show on all ranks what runs, and that it is right.

    Exit 0: fallback validated.  Exit 1: not validated, and which rank is to blame.  Exit 2: could
    not run.
    """
    diagnosis.require(device)
    place = Place(ep, device)
    with open_world(ep, device, timeout) as world, console.status("starting workers") as status:
        results = validate(
            place, world, fault, lambda result: status.update(f"done: {result.check}")
        )
    console.print(table(results))
    for result in results:
        if not result.holds:
            blamed = f"{name_ranks(result.ranks)}: " if result.ranks else ""
            told = f"\n{result.check}: {blamed}{result.wrong or result.defect}"
            say(told)
    say(verdict(results, place))
    wrong, defects = ([getattr(one, what) for one in results] for what in ("wrong", "defect"))
    finish(verdict_code(wrong=any(wrong), not_judged=any(defects)))


def table(results: Sequence[Result]) -> Table:
    """One row for each check."""
    shown = Table(title="what the launch counters of all ranks say", title_justify="left")
    for heading in ("check", "ran", "worst ratio", "A, B, A", "result"):
        shown.add_column(heading, overflow="fold")
    for result in results:
        ratio = "-" if result.verdict is None else f"{result.verdict.worst_ratio:.2g}"
        again = {None: "-", True: "same bits", False: "[red]other bits[/red]"}[result.same_bits]
        held = (
            "holds"
            if result.holds
            else f"[red]{name_ranks(result.ranks) if result.ranks else 'wrong'}[/red]"
        )
        shown.add_row(result.check, " > ".join(result.ran) or "-", ratio, again, held)
    return shown


def verdict(results: Sequence[Result], place: Place) -> str:
    """The last line: validated, or not and whose fault it is."""
    where = f"{place.ep_size} ranks, {place.device}"
    failed = [result for result in results if not result.holds]
    if not failed:
        return f"fallback validated: {len(results)} checks on {where}"
    ranks = sorted({rank for result in failed for rank in result.ranks})
    blamed = f", {name_ranks(ranks)} to blame" if ranks else ""
    return f"NOT validated: {len(failed)} of {len(results)} checks on {where} fail{blamed}"
