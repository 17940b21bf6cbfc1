"""Planted faults: small patches at declared seams, to prove that the judge sees them."""

from twinmoe.oracle.faults.registry import FAULTS, Fault, planted

__all__ = ["FAULTS", "Fault", "planted"]
