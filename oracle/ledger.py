"""Known failures, each with the public issue that tracks it; an unexpected pass is a failure too.

A ledger is a TOML file of entries::

    [[known]]
    what = "swapped_segments"            # a fault's name or id, or a cell as a report prints it
    issue = "owner/repository#123"       # where the world can read about it
    why = "the judge cannot see it before that is fixed"

It keeps a known failure from hiding a new one, and itself from outliving its reason.
"""

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from twinmoe.reference.config import ConfigError
from twinmoe.reference.files import read_text

_ISSUE = re.compile(r"[\w.-]+/[\w.-]+#[1-9][0-9]*")


@dataclass(frozen=True)
class Known:
    """One entry: what is known to fail, the public issue, and why it may."""

    what: str
    issue: str
    why: str


@dataclass(frozen=True)
class Ledger:
    """The known failures of one run; empty without a file."""

    entries: tuple[Known, ...] = ()

    @classmethod
    def load(cls, path: Path | None) -> "Ledger":
        """Read a ledger; raises ConfigError for a file or an entry that is not one."""
        if path is None:
            return cls()
        try:
            content = tomllib.loads(read_text(path))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"ledger ({path}) cannot be read: {error!s:.200}; write [[known]] entries in TOML"
            ) from None
        listed = content.get("known", [])
        if set(content) - {"known"} or not isinstance(listed, list):
            raise ConfigError(f"ledger ({path}) holds more than [[known]] entries: remove the rest")
        return cls(tuple(_entry(path, number, entry) for number, entry in enumerate(listed, 1)))

    def known(self, *names: str) -> Known | None:
        """The entry about any of ``names``, if there is one."""
        return next((entry for entry in self.entries if entry.what in names), None)

    def unknown_names(self, names: Iterable[str]) -> list[str]:
        """Entries that speak of nothing in ``names``: a typing error, or something gone."""
        present = set(names)
        return [entry.what for entry in self.entries if entry.what not in present]


def _entry(path: Path, number: int, entry: object) -> Known:
    wanted = [field.name for field in fields(Known)]
    if not isinstance(entry, dict) or set(entry) != set(wanted):
        raise ConfigError(
            f"ledger ({path}), entry {number}, must have exactly {', '.join(wanted)}: what fails, "
            "the public issue that tracks it, and why it may"
        )
    if not all(isinstance(entry[name], str) and entry[name] for name in wanted):
        raise ConfigError(f"ledger ({path}), entry {number}, has an empty value: fill all in")
    if not _ISSUE.fullmatch(entry["issue"]):
        raise ConfigError(
            f"ledger ({path}), entry {number}: issue ({entry['issue']!r:.80}) is no public issue: "
            "a known failure is tracked where others can read it; write owner/repository#number"
        )
    return Known(**entry)
