"""The judge: runs layers side by side and decides numerical equivalence."""
