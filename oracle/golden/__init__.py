"""Golden files: cases, their truth and what one path showed, to compare with anywhere, later.

The norm in a golden file is the fp64 truth with its interval, never a low-precision output:
those are kept only to tell which bits changed.
"""

from twinmoe.oracle.golden.compare import Compared, Comparison, compare
from twinmoe.oracle.golden.content import Figures, Forward, Golden, Recorded
from twinmoe.oracle.golden.draw import drawn_cases
from twinmoe.oracle.golden.file import GoldenError, load, save
from twinmoe.oracle.golden.record import record
from twinmoe.oracle.golden.suites import Suite, suite, suites
from twinmoe.oracle.golden.target import NotRun, Question, Target

__all__ = [
    "Compared",
    "Comparison",
    "Figures",
    "Forward",
    "Golden",
    "GoldenError",
    "NotRun",
    "Question",
    "Recorded",
    "Suite",
    "Target",
    "compare",
    "drawn_cases",
    "load",
    "record",
    "save",
    "suite",
    "suites",
]
