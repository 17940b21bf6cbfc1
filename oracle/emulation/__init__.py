"""Single-process emulations of expert-parallel layers: correct ones, and wrong ones."""
