"""One small recording, made once, and workers to compare it with."""

from collections.abc import Iterator

import pytest

from twinmoe.oracle.case import Case
from twinmoe.oracle.golden import Golden, record
from twinmoe.oracle.trial import Trial

#: A replayed graph without a shared expert, and AlltoAll with one.
LINES = (
    "T=3/2,H=32,I=16,E=4,k=2,rsf=2.5,dtype=bf16,mode=replayed,seed=3",
    "T=5/0,H=24,I=16,E=4,k=2,shared=24,dtype=bf16,transport=alltoall,seed=4",
)


@pytest.fixture(scope="session")
def trial() -> Iterator[Trial]:
    """Share workers between the tests of this folder."""
    with Trial(timeout_s=30) as shared:
        yield shared


@pytest.fixture(scope="session")
def golden(trial: Trial) -> Golden:
    """Record both lines."""
    return record([Case.parse(line) for line in LINES], trial)
