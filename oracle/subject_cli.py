"""``--subject``: what the commands share that judge somebody else's layer."""

from typing import Any

import click
from click.core import ParameterSource

from twinmoe.oracle.check import Summary
from twinmoe.oracle.layer_space import SEMANTICS, standing_still
from twinmoe.oracle.offers import left_out
from twinmoe.oracle.subject import SUBJECTS
from twinmoe.oracle.subject_spec import PlainName
from twinmoe.reference.config import ConfigError

#: A layer of one path has few cells, so it gets so many more random cases in each.
MORE_CASES = 10

subject_option = click.option(
    "--subject", default=None, metavar="MODULE:FACTORY",
    help="Judge this layer instead: package.module:factory or file.py:factory.",
)  # fmt: skip


def plain_name(text: str | None) -> PlainName | None:
    """The layer that ``--subject`` names; raises ConfigError if it cannot be imported."""
    return None if text is None else PlainName(text)


def subjects_of(name: PlainName | None) -> tuple[str, ...]:
    """Whom a trial judges: anyone's layer, or our twins."""
    return tuple(SUBJECTS) if name is None else (name.text,)


def asked_of_subject(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a check as they are for anyone's layer, which has one path.

    It is run by one rank, unless ``--ep`` says otherwise.  Raises ConfigError for options that
    choose between paths of our own.
    """
    if options["subject"] is None:
        return options
    for name in ("transport", "mode"):
        if _given(name):
            raise ConfigError(
                f"--{name} ({options[name]}) chooses between this project's own paths, of which "
                f"{options['subject']} has none: drop --{name} or --subject"
            )
    ranks = options["ep"] if _given("ep") else [1]
    return options | {"ep": ranks, "transport": "alltoall", "mode": ["eager"]}


def _given(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name)
    return source is not ParameterSource.DEFAULT


def not_judged(summary: Summary) -> str:
    """Say what a check of anyone's layer left open: its last words."""
    told = []
    if summary.undecided:
        told.append(
            f"{summary.undecided} of {summary.cases} cases undecided: scores nearly tie, and the "
            "layer shows no expert ids; return (out, Taps(ids_TK=...)) to have them judged"
        )
    if summary.equivalent and all(one.cell.ep_size == 1 for one in summary.results):
        told.append("run by one rank alone: --ep 1,2,4 asks for experts that ranks share")
    if line := left_out(summary.left_out):
        told.append(line)
    still = standing_still(summary.configs)
    if still and summary.equivalent:  # a search that failed was cut short
        told.append(
            f"{len(still)} of {len(SEMANTICS)} settings were not varied, so not judged at other "
            "values (--json lists them): name those that the layer reads with @runs"
        )
    return "\n".join(told)
