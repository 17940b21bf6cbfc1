#!/usr/bin/env python3
"""What a test run must answer for once pytest is gone; ci/test calls it with its scratch folder.

Reads ``report.xml`` (pytest's JUnit report) and ``shm-before`` (names that lay in /dev/shm before
the run).  Says what was skipped and why, and exits 1 if no test passed, if a process that carries
the run's mark is still alive, or if a shared-memory segment was orphaned.  The last line counts.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

#: Servers of multiprocessing notice by themselves that their parent is gone; not instantly.
GRACE_SECONDS = 5.0


def tally(report: Path) -> tuple[Counter[str], Counter[str]]:
    """Return how many cases had each outcome, and the reasons of those skipped."""
    outcomes: Counter[str] = Counter(passed=0, failed=0, skipped=0)
    reasons: Counter[str] = Counter()
    if not report.exists():
        return outcomes, reasons
    for case in ElementTree.parse(report).iter("testcase"):
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            outcomes["failed"] += 1
        elif skipped is not None:
            outcomes["skipped"] += 1
            reasons[skipped.get("message") or "no reason given"] += 1
        else:
            outcomes["passed"] += 1
    return outcomes, reasons


def processes_marked(mark: str) -> list[str]:
    """Return ``pid command`` of each living process whose environment carries ``mark``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile, or it is not ours to read
            if f"TWINMOE_TEST_RUN={mark}".encode() in (folder / "environ").read_bytes():
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found.append(f"process {folder.name}: {command.strip()}")
    return found


def orphaned_segments(before: set[str], shm: Path) -> list[str]:
    """Return the segments in ``shm`` that are new and that no living process maps.

    A new segment that somebody maps belongs to another job of this machine: the run's own
    processes are gone by then, or are reported themselves.
    """
    new = {entry.name for entry in shm.iterdir()} - before
    for maps in Path("/proc").glob("[0-9]*/maps") if new else ():
        with suppress(OSError):
            text = maps.read_text()
            new = {name for name in new if f"{shm}/{name}\n" not in text}
    return [f"shared memory {shm}/{name}" for name in sorted(new)]


def left_behind(mark: str, before: set[str], shm: Path) -> list[str]:
    """Return what is still there after the grace period."""
    deadline = time.monotonic() + GRACE_SECONDS
    while found := processes_marked(mark) + orphaned_segments(before, shm):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return found


def main(scratch: Path, shm: Path = Path("/dev/shm")) -> int:
    """Print the account of the run and return the exit status."""
    outcomes, reasons = tally(scratch / "report.xml")
    before = set((scratch / "shm-before").read_text().splitlines())
    found = left_behind(str(scratch), before, shm)
    for reason, count in reasons.most_common():
        print(f"skipped {count}: {reason}")
    for leftover in found:
        print(f"left behind: {leftover}")
    if not outcomes["passed"]:
        print("no test passed: a run that shows nothing is a failed run")
    failed = f"{outcomes['failed']} failed, " if outcomes["failed"] else ""
    print(f"{failed}{outcomes['passed']} passed, {outcomes['skipped']} skipped")
    return 1 if found or not outcomes["passed"] else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
