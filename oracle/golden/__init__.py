"""Golden files: cases, their truth and what one path showed, to compare with anywhere, later.

The norm in a golden file is the fp64 truth with its interval, never a low-precision output:
those are kept only to tell which bits changed.
"""

from twinmoe.oracle.golden.compare import Compared, Comparison, Target, compare
from twinmoe.oracle.golden.content import Figures, Forward, Golden, Recorded
from twinmoe.oracle.golden.draw import drawn_cases
from twinmoe.oracle.golden.file import GoldenError, load, save
from twinmoe.oracle.golden.record import record

__all__ = [
    "Compared",
    "Comparison",
    "Figures",
    "Forward",
    "Golden",
    "GoldenError",
    "Recorded",
    "Target",
    "compare",
    "drawn_cases",
    "load",
    "record",
    "save",
]
