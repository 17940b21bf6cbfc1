"""Copy beside your tests: Hypothesis profiles by name, and a database that a CI cache can keep.

TWINMOE_PROFILE=nightly pytest tests/test_moe.py -n auto
"""

import os

from hypothesis import settings
from hypothesis.database import DirectoryBasedExampleDatabase

#: Failing cases are files here, written by every pytest-xdist worker, tried first by the next run.
FOUND = DirectoryBasedExampleDatabase(".hypothesis/examples")

settings.register_profile("quick", max_examples=20, database=FOUND)
settings.register_profile("ci", max_examples=50, derandomize=True, database=None)
settings.register_profile("nightly", max_examples=2000, database=FOUND, print_blob=True)
settings.load_profile(os.environ.get("TWINMOE_PROFILE", "quick"))
