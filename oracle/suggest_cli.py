"""``twinmoe calibrate --suggest-contract --subject ...``: propose a contract, and show why."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from twinmoe.oracle.calibrate import calibration_cases
from twinmoe.oracle.case import Case
from twinmoe.oracle.subject_spec import PlainName
from twinmoe.oracle.suggest import Fit, Suggestion, suggest_contract
from twinmoe.reference.config import DTYPES

#: Contracts shown beside the best.
_SHOWN = 8

Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]

suggest_option = click.option(
    "--suggest-contract",
    "suggesting",
    is_flag=True,
    help="Guess where the layer of --subject rounds, for you to confirm.",
)


def suggest(
    console: Console,
    progress: Progress,
    subject: str | None,
    draws: int,
    dtype: str,
    seed: int,
    **_unused: Any,
) -> bool:
    """Run the layer, print the contracts that fit it, best first; whether none does."""
    if subject is None:
        raise click.ClickException(
            "--suggest-contract has no layer to look at: add --subject package.module:factory"
        )
    name = PlainName(subject)
    cases = _cases(name, draws, dtype, seed)
    with progress("running the layer", len(cases)) as advance:
        suggestion = suggest_contract(name, cases, advance=advance)
    console.print(fit_table(suggestion))
    console.print(_proposal(suggestion), markup=False, highlight=False, soft_wrap=True)
    return suggestion.best is None


def _cases(name: PlainName, draws: int, dtype: str, seed: int) -> list[Case]:
    """Dense cases on one rank; a relation or history would ask for more than a contract."""
    drawn = calibration_cases(1, ("alltoall",), DTYPES[dtype], draws, seed)[:draws]
    return [name.fit(replace(case, history="", relation="")) for case in drawn]


def fit_table(suggestion: Suggestion) -> Table:
    """The best contracts of the family, one a row."""
    table = Table(title="contracts that the layer was held to", title_justify="left")
    table.add_column("what differs from storing everything")
    for heading in ("cases inside", "worst ratio", "differ from the rounded truth"):
        table.add_column(heading, justify="right")
    for fit in suggestion.fits[:_SHOWN]:
        table.add_row(fit.name, f"{fit.fits} of {fit.cases}", f"{fit.worst_ratio:.2f}", _share(fit))
    return table


def _share(fit: Fit) -> str:
    return f"{100 * fit.flips / max(fit.elements, 1):.3f} %"


def _proposal(suggestion: Suggestion) -> str:
    best = suggestion.best
    if best is None:
        return (
            "no contract of the family fits every case: the layer rounds elsewhere, or is wrong; "
            "give it the nearest one and let twinmoe check name the stage"
        )
    told = [
        "a guess, to be confirmed in the layer's code; narrow = FORMATS[config.dtype]:",
        f"    contract = {best.code(suggestion.ranks)}",
    ]
    if suggestion.equals:
        told.append(f"these cases cannot tell it from: {'; '.join(suggestion.equals)}")
    return "\n".join(told)
