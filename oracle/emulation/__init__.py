"""Emulated subjects for judging the judge: many correct implementations, and wrong ones.

An :class:`Emulation` executes a contract in one process, with every rounding explicit.
``PATHS`` are contracts with the choices they leave open, ``MISTAKES`` single steps gone
wrong, ``KINDS`` the inputs that both are tried on.
"""

from twinmoe.oracle.emulation.correct import PATHS, Path
from twinmoe.oracle.emulation.kinds import KINDS, Inputs, Kind, draw_inputs
from twinmoe.oracle.emulation.mistakes import MISTAKES, Mistake
from twinmoe.oracle.emulation.pipeline import Emulation

__all__ = [
    "KINDS",
    "MISTAKES",
    "PATHS",
    "Emulation",
    "Inputs",
    "Kind",
    "Mistake",
    "Path",
    "draw_inputs",
]
