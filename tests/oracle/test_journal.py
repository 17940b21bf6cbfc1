"""What is on disk after each case, and what a journal refuses to go on with."""

import json
import math
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from twinmoe.oracle.case_figures import CaseFigures
from twinmoe.oracle.journal import Entry, Journal
from twinmoe.reference.config import ConfigError

FIGURES = CaseFigures(("p2p", "triton"), 1.5, 0.25, math.inf, 200, 3, 8, 7, 1, 4)
ENTRIES = (
    Entry("EP 2", "T=3/0", FIGURES),
    Entry("EP 2", "T=3/1", None, "WorkerDied: rank 1"),
    Entry("EP 1", "T=3", FIGURES, undecided=True),
)
PLAN = {"seed": 0, "cells": ["EP 2", "EP 1"]}


def written(path: Path) -> None:
    """Write a journal of three cases."""
    with Journal(path, PLAN) as journal:
        for entry in ENTRIES:
            journal.add(entry)


def known(journal: Journal) -> list[bool]:
    """Return for each entry whether the journal has it."""
    return [journal.recorded(entry.cell, entry.case) == entry for entry in ENTRIES]


def test_entries_come_back_as_they_were(tmp_path: Path) -> None:
    """Figures, infinity too, failures and open answers are what they were; others are unknown."""
    written(tmp_path / "journal")
    with Journal(tmp_path / "journal", PLAN, resume=True) as journal:
        assert known(journal) == [True, True, True]
        assert journal.recorded("EP 1", "T=3/0") is None


def test_an_entry_is_on_disk_before_the_next_case(tmp_path: Path) -> None:
    """Nothing waits for the end of the check, which may never come."""
    with Journal(tmp_path / "journal", PLAN) as journal:
        for count, entry in enumerate(ENTRIES, 2):
            journal.add(entry)
            assert len((tmp_path / "journal").read_text().splitlines()) == count


@pytest.mark.parametrize("lost", [1, 20])
def test_a_line_that_was_cut_short_is_dropped_and_written_anew(tmp_path: Path, lost: int) -> None:
    """A machine that died in the middle of a line costs that case, and leaves a sound journal."""
    path = tmp_path / "journal"
    written(path)
    os.truncate(path, path.stat().st_size - lost)
    for missing in (1, 0):
        with Journal(path, PLAN, resume=True) as journal:
            assert known(journal) == [True, True, not missing]
            if missing:
                journal.add(ENTRIES[-1])


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (0, ("no journal",)),
        (1, ("line 2", "no entry")),
        (2, ("line 3", "no entry")),
    ],
)
@pytest.mark.parametrize("content", ["[1]", "{}", "nonsense", "[" * 5000, '{"cell": 1}', "null"])
def test_a_damaged_line_is_refused_by_its_number(
    tmp_path: Path, line: int, parts: tuple[str, ...], content: str
) -> None:
    """Whatever a line holds that was not written there: ConfigError, and nothing is overwritten."""
    path = tmp_path / "journal"
    written(path)
    lines = path.read_text().splitlines()
    lines[line] = content
    path.write_text("\n".join(lines) + "\n")
    before = path.read_bytes()
    with pytest.raises(ConfigError) as caught:
        Journal(path, PLAN, resume=True)
    assert all(part in str(caught.value) for part in (str(path), *parts)) or line == 0
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("plan", PLAN | {"seed": 1}, "another check"),
        ("sources", "0", "another version"),
        ("version", 99, "another format"),
    ],
)
def test_results_of_another_check_are_refused(
    tmp_path: Path, key: str, value: Any, reason: str
) -> None:
    """Another plan, another format and other code mean other results."""
    path = tmp_path / "journal"
    written(path)
    header, *rest = path.read_text().splitlines()
    changed = json.dumps(json.loads(header) | {key: value})
    path.write_text("\n".join([changed, *rest]) + "\n")
    with pytest.raises(ConfigError, match=reason):
        Journal(path, PLAN, resume=True)


def test_results_are_never_mixed_with_others(tmp_path: Path) -> None:
    """A file that exists is not overwritten, and none is made up to go on with."""
    path = tmp_path / "journal"
    with pytest.raises(ConfigError, match="cannot be read"):
        Journal(path, PLAN, resume=True)
    written(path)
    with pytest.raises(ConfigError, match="--resume"):
        Journal(path, PLAN)
    with pytest.raises(ConfigError, match="cannot be written"):
        Journal(tmp_path / "nowhere" / "journal", PLAN)


def test_a_full_disk_is_remembered_and_costs_nothing_else(tmp_path: Path) -> None:
    """Once an entry could not be written, the journal says so and keeps what it holds whole."""
    path = tmp_path / "journal"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(path, PLAN) as journal:
        journal.add(ENTRIES[0])
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, limits[1]))
        try:
            journal.add(ENTRIES[1])
            journal.add(ENTRIES[2])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "large" in journal.error
    with Journal(path, PLAN, resume=True) as journal:
        assert known(journal) == [True, False, False]


def test_without_a_path_nothing_is_kept() -> None:
    """A journal of no file takes entries and knows none."""
    with Journal() as journal:
        journal.add(ENTRIES[0])
        assert known(journal) == [False, False, False]
        assert journal.error == ""
