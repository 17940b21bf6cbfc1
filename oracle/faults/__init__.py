"""Planted faults: small patches at declared seams, to prove that the judge sees them."""

from twinmoe.oracle.faults.fault import FAULTS, Fault
from twinmoe.oracle.faults.registry import planted, require_fault

__all__ = ["FAULTS", "Fault", "planted", "require_fault"]
