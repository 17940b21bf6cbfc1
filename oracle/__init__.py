"""The judge: runs layers side by side and decides numerical equivalence.

Two functions serve without the rest: ``judge`` decides, ``assert_equivalent`` raises.
``docs/judging.md`` shows both in worked examples.
"""

import twinmoe.oracle.first_signal  # noqa: F401 - before what takes seconds to import

# isort: split
from twinmoe.oracle.assertion import assert_equivalent
from twinmoe.oracle.contract import RoundingContract, Wire, storage_contract
from twinmoe.oracle.envelope import Grade
from twinmoe.oracle.judgement import judge
from twinmoe.oracle.observation import RankObservation, Taps
from twinmoe.oracle.truth import Truth
from twinmoe.oracle.verdict import Finding, Verdict

__all__ = [
    "Finding",
    "Grade",
    "RankObservation",
    "RoundingContract",
    "Taps",
    "Truth",
    "Verdict",
    "Wire",
    "assert_equivalent",
    "judge",
    "storage_contract",
]
