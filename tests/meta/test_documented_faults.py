"""The failures that docs/faults.md shows are what one gets, up to the numbers."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from twinmoe.oracle import cli
from twinmoe.oracle.faults import FAULTS, UNPLANTED

PAGE = (Path(__file__).parents[2] / "docs" / "faults.md").read_text()
SHOWN = re.findall(r"```console\n\$ twinmoe replay '([^']+)'\n(.*?)\n```", PAGE, re.DOTALL)

#: What differs between machines, and between runs.
_NUMBER = re.compile(r"-?\d[\d.]*(e[+-]\d+)?|nan")


def masked(text: str) -> Iterator[str]:
    """Each line without its numbers."""
    return (_NUMBER.sub("#", line.strip()) for line in text.splitlines())


def test_the_page_counts_the_registry() -> None:
    """Rows planted and not planted, and a failure of every class that is built."""
    planted = [fault.id for fault in FAULTS.values() if fault.id]
    assert f"{len(planted) + len(UNPLANTED)} rows: {len(planted)} are planted" in PAGE
    assert f"{len(UNPLANTED)} are listed with the reason" in PAGE
    shown = {line.rpartition("fault=")[2] for line, _ in SHOWN}
    classes = {FAULTS[name].id[:2] for name in shown if FAULTS[name].id}
    assert classes == {name[:2] for name in planted}


@pytest.mark.slow
@pytest.mark.parametrize(("line", "expected"), SHOWN, ids=[line[-24:] for line, _ in SHOWN])
def test_a_documented_failure_is_what_one_gets(line: str, expected: str) -> None:
    """Every line that the page shows stands in the output of the command above it."""
    result = CliRunner().invoke(cli.main, ["replay", line])
    assert result.exit_code == cli.NOT_EQUIVALENT, result.output
    told = set(masked(result.output))
    missing = [shown for shown in masked(expected) if shown not in told]
    assert not missing, result.output
