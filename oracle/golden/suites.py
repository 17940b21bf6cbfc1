"""Suites: named lists of case lines that are worth recording, from ``suites.toml`` beside this."""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from twinmoe.oracle.case import Case
from twinmoe.reference.config import ConfigError


@dataclass(frozen=True)
class Suite:
    """What a suite is for, in a few words, and its cases in order."""

    about: str
    cases: tuple[Case, ...]


@cache
def suites() -> dict[str, Suite]:
    """All suites by name."""
    told = tomllib.loads((files("twinmoe.oracle.golden") / "suites.toml").read_text())
    return {
        name: Suite(suite["about"], tuple(map(Case.parse, suite["cases"])))
        for name, suite in told.items()
    }


def suite(name: str) -> Suite:
    """Return a suite; raises ConfigError naming the known ones."""
    if name not in suites():
        raise ConfigError(
            f"suite ({name!r}) is unknown: use one of {', '.join(suites())}, or --case LINE for a "
            "case of your own"
        )
    return suites()[name]
