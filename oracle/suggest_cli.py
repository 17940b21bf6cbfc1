"""``twinmoe calibrate --suggest-contract --subject ...``: propose a contract, and show why."""

from dataclasses import replace
from typing import Any

import click
from rich.table import Table

from twinmoe.oracle.calibrate import calibration_cases
from twinmoe.oracle.case import Case
from twinmoe.oracle.layer_space import standing_still
from twinmoe.oracle.subject_spec import PlainName
from twinmoe.oracle.suggest import Fit, Suggestion, suggest_contract
from twinmoe.oracle.terminal import console, progress, say
from twinmoe.reference.config import DTYPES, ConfigError

#: Contracts shown, the best with them.
_SHOWN = 5

#: Share of elements outside the nearest contract that looks like a mistake, not like a rounding.
_MISTAKEN = 0.75

suggest_option = click.option(
    "--suggest-contract",
    "suggesting",
    is_flag=True,
    help="Guess where the layer of --subject rounds, for you to confirm.",
)

ranks_option = click.option(
    "--ep", type=click.IntRange(1), default=1, show_default=True,
    help="Ranks that --suggest-contract runs the layer on.",
)  # fmt: skip


def suggest(
    subject: str | None,
    ep: int,
    draws: int,
    dtype: str,
    seed: int,
    device: str,
    timeout: float,
    **_unused: Any,
) -> bool:
    """Run the layer, print the contracts nearest to it, best first; whether none fits."""
    if subject is None:
        raise ConfigError(
            "--suggest-contract has no layer to look at: add --subject package.module:factory"
        )
    name = PlainName(subject)
    cases = _cases(name, ep, draws, dtype, seed)
    with progress("running the layer", len(cases)) as advance:
        suggestion = suggest_contract(
            name, cases, device=device, timeout_s=timeout, advance=advance
        )
    console.print(fit_table(suggestion))
    say(_proposal(suggestion))
    return suggestion.best is None


def _cases(name: PlainName, ep_size: int, draws: int, dtype: str, seed: int) -> list[Case]:
    """Dense cases; a relation or history would ask for more than a contract."""
    drawn = calibration_cases(ep_size, ("alltoall",), DTYPES[dtype], draws, seed)[:draws]
    return [name.fit(replace(case, history="", relation="", batches=())) for case in drawn]


def fit_table(suggestion: Suggestion) -> Table:
    """The nearest contracts, one a row."""
    table = Table(title="contracts that the layer was held to", title_justify="left")
    table.add_column("differs from storing everything", overflow="fold")
    for heading in ("cases inside", "outside", "unlike the truth"):
        table.add_column(heading, justify="right")
    for fit in suggestion.fits[:_SHOWN]:
        seen = fit.likeness
        table.add_row(
            suggestion.changes(fit) or "in nothing",
            f"{fit.fits} of {fit.cases}",
            _percent(seen.share_outside),
            _percent(seen.share_flipped),
        )
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _proposal(suggestion: Suggestion) -> str:
    best = suggestion.best
    if best is None:
        return _nearest(suggestion)
    told = ["a guess, to be confirmed in the layer's code:", *_paste(suggestion, best)]
    if suggestion.equals:
        others = " or ".join(suggestion.changes(fit) or "none" for fit in suggestion.equals)
        told.append(f"these cases cannot tell it from these differences: {others}")
    if still := standing_still(suggestion.configs):
        told.append(f"said of layers with {', '.join(f'{k}={v}' for k, v in still.items())} only")
    return "\n".join(told)


def _nearest(suggestion: Suggestion) -> str:
    nearest = suggestion.fits[0]
    share = _percent(nearest.likeness.share_outside)
    return "\n".join(
        [
            f"no contract fits every case.  The nearest does NOT fit: {share} of elements are "
            f"outside, {nearest.fits} of {nearest.cases} cases inside:",
            *_paste(suggestion, nearest),
            "so much is no matter of rounding alone: let twinmoe check name the mistake"
            if nearest.likeness.share_outside > _MISTAKEN
            else "the layer rounds elsewhere, or is wrong: with this contract, twinmoe check names "
            "what is left",
        ]
    )


def _paste(suggestion: Suggestion, fit: Fit) -> list[str]:
    """Lines for a factory, with the imports that they need."""
    written = suggestion.code(fit)
    code = "\n".join(written)
    uses = [name for name in ("Order", "Scales", "Ties", "Weighs", "Wire") if f"{name}." in code]
    lines = [
        "from dataclasses import replace",
        f"from twinmoe.oracle.contract import {', '.join([*uses, 'storage_contract'])}",
    ]
    formats = [name for name, used in (("FORMATS", "narrow"), ("FP32", "FP32")) if used in code]
    if formats:
        lines.append(f"from twinmoe.oracle.rounding import {', '.join(formats)}")
    if "narrow" in code:
        lines.append("narrow = FORMATS[config.dtype]")
    return [f"    {line}" for line in (*lines, *written)]
