"""Planted faults: small patches at declared seams, to prove that the judge sees them.

And correct variations, planted the same way, to prove that it sees nothing else.
"""

from twinmoe.oracle.faults.fault import FAULTS, VARIANTS, Fault
from twinmoe.oracle.faults.registry import patch_named, planted, require_fault
from twinmoe.oracle.faults.unplanted import UNPLANTED, Unplanted

__all__ = [
    "FAULTS",
    "UNPLANTED",
    "VARIANTS",
    "Fault",
    "Unplanted",
    "patch_named",
    "planted",
    "require_fault",
]
