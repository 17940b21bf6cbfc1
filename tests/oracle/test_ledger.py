"""The ledger of known failures: each entry cites a public issue, or is refused."""

from pathlib import Path

import pytest

from twinmoe.oracle.ledger import Ledger
from twinmoe.reference.config import ConfigError

ENTRY = '[[known]]\nwhat = "zeros"\nissue = "owner/layer#12"\nwhy = "not fixed yet"\n'


def written(tmp_path: Path, text: str) -> Path:
    """Return a ledger file with this text."""
    path = tmp_path / "known.toml"
    path.write_text(text)
    return path


def test_entries_are_found_by_name(tmp_path: Path) -> None:
    """By any of the names that a thing has; without a file nothing is known."""
    ledger = Ledger.load(written(tmp_path, ENTRY))
    known = ledger.known("RT01", "zeros")
    assert known is not None
    assert known.issue == "owner/layer#12"
    assert ledger.known("dropped_slot") is None
    assert Ledger.load(None).known("zeros") is None
    assert ledger.unknown_names(["dropped_slot"]) == ["zeros"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (ENTRY.replace("owner/layer#12", "a colleague said so"), "is no public issue"),
        (ENTRY.replace("#12", "#0"), "is no public issue"),
        (ENTRY.replace("not fixed yet", ""), "has an empty value"),
        (ENTRY + "since = 2026\n", "must have exactly what, issue, why"),
        ('[known]\nwhat = "zeros"\n', "holds more than"),
        ("[[known]\n", "cannot be read"),
        ("known = " + "[" * 5000, "cannot be read"),
        ("known = 3\n", "holds more than"),
    ],
)
def test_what_is_no_entry_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    """With the file, the entry and the remedy."""
    with pytest.raises(ConfigError, match=complaint):
        Ledger.load(written(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """An empty ledger would hide the typing error."""
    with pytest.raises(ConfigError, match="cannot be read"):
        Ledger.load(tmp_path / "absent.toml")
