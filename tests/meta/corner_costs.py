"""What each corner costs, and which wrong layers only it finds: the measure for thinning them.

``python -m tests.meta.corner_costs [EP_SIZE]`` prints CPU seconds of driver and workers for every
corner with our twins.  ``--layers`` prints, for every corner, which layers of
``tests/oracle/cornered_layers.py`` only it refutes, on one rank; that takes minutes.  Not a test.
"""

import argparse
import inspect
import os
import time
from pathlib import Path

import torch

from tests.oracle import cornered_layers
from twinmoe.oracle import descendants
from twinmoe.oracle.case import Case
from twinmoe.oracle.corners import CORNERS
from twinmoe.oracle.failures import WorkerFailure
from twinmoe.oracle.strategies import Cell
from twinmoe.oracle.subject_spec import PlainName
from twinmoe.oracle.trial import Trial

_TICKS = os.sysconf("SC_CLK_TCK")


def costs(ep_size: int) -> None:
    """Print every corner's CPU seconds in one cell, and their sum."""
    cell, sums = Cell(ep_size, "p2p", "replayed", torch.bfloat16), [0.0, 0.0]
    with Trial("cpu", 120.0) as trial:
        trial.run(CORNERS["one token"](cell))  # the start of the workers is nobody's cost
        print(f"{'driver':>8} {'workers':>8}  corner")
        for name, corner in CORNERS.items():
            before = time.process_time(), _below()
            trial.run(corner(cell))
            spent = time.process_time() - before[0], _below() - before[1]
            sums = [total + part for total, part in zip(sums, spent, strict=True)]
            print(f"{spent[0]:8.2f} {spent[1]:8.2f}  {name}", flush=True)
        print(f"{sums[0]:8.2f} {sums[1]:8.2f}  all {len(CORNERS)}")


def finders() -> None:
    """Print, for every wrong layer, which corners refute it."""
    cell = Cell(1, "alltoall", "eager", torch.bfloat16)
    for layer, made in inspect.getmembers(cornered_layers, inspect.isfunction):
        if made.__module__ != cornered_layers.__name__ or layer.startswith("_"):
            continue
        subject = PlainName(f"{cornered_layers.__file__}:{layer}")
        with Trial("cpu", 60.0, (subject.text,)) as trial:
            found = [
                name for name, corner in CORNERS.items() if _refutes(trial, subject, corner(cell))
            ]
        print(f"{layer}: {'only ' if len(found) == 1 else ''}{', '.join(found)}", flush=True)


def _refutes(trial: Trial, subject: PlainName, case: Case) -> bool:
    try:
        return bool(trial.run(subject.fit(case)).findings)
    except WorkerFailure:
        return True


def _below() -> float:
    """CPU seconds of all processes below this one, those that ended among them included."""
    ticks = 0
    for pid in descendants.below(os.getpid()):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += sum(map(int, fields[11:15]))
    return ticks / _TICKS


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ep_size", nargs="?", type=int, default=1)
    parser.add_argument("--layers", action="store_true")
    options = parser.parse_args()
    finders() if options.layers else costs(options.ep_size)
