"""A line draws the same tensors in every process, with every set of vector instructions."""

import os
import subprocess
import sys
from functools import cache
from itertools import cycle, islice

import pytest

from tests.oracle.digests import of_line
from twinmoe.oracle.case import BIASES, ROUTINGS, VALUES, Case
from twinmoe.oracle.emulation import KINDS
from twinmoe.reference.config import DTYPES

#: Fourteen cases with every value, routing, bias, dtype and score; every kind in every dtype.
CASES = [
    f"T=7/0/33,H=100,I=17,E=24,k=3,scoring_func={scoring},use_correction_bias=1,shared=13,"
    f"shared_expert_gate=1,dtype={dtype},values={values},routing={routing},bias={bias},seed={seed}"
    for seed, scoring, dtype, values, routing, bias in islice(
        zip(
            range(14),
            cycle(("softmax", "sigmoid", "sqrtsoftplus")),
            cycle(DTYPES),
            cycle(VALUES),
            cycle(ROUTINGS),
            cycle(BIASES[::-1]),
        ),
        14,
    )
]
LINES = [*CASES, *(f"{kind}/{dtype}" for kind in KINDS for dtype in DTYPES)]

#: Digests that change only when a line shall mean other numbers, which spoils every replay line
#: and golden file there is.
OF_RECORD = [
    (
        "T=3/5,H=96,I=64,E=6,k=2,dtype=bf16,seed=1",
        "af0e90ca02623ea694f0023581c876a6c38190dec5134709315aaa731e152437",
    ),
    (
        "T=4,H=33,I=17,E=8,k=3,scoring_func=sigmoid,use_correction_bias=1,"
        "shared=24,shared_expert_gate=1,dtype=fp32,values=outlier,routing=one_rank,bias=large,seed=2",
        "6d60daf76cd3eac3682e65144b20bb1b2654d32bed94df96004a7acdf8becfe5",
    ),
    (
        "T=0/9,H=400,I=40,E=8,k=2,gated=0,dtype=fp16,values=recorded,routing=near_ties,seed=3",
        "4c62d747cc405d400ccc8e1366ef3502229ff61b1a21da66bf40f1d79ed942a1",
    ),
    (
        "T=6,H=64,I=16,E=8,k=2,dtype=fp64,values=integers,routing=ties,layout=strided,seed=4",
        "f98ed9d6c8dbd0db1dbe25d10018d1cfaa4db1987e0ecd5ef03fa269a3eb6212",
    ),
    (
        "heavy_tailed/bf16",
        "9c81a30841d19fd515999fb61202e7d2873da6d84a433caed9f5873db2c5b2c4",
    ),
]


@cache
def _here() -> list[str]:
    return [of_line(line) for line in LINES]


def test_the_cases_cover_the_axes_of_drawing() -> None:
    """No value, routing or bias is left out."""
    cases = [Case.parse(line) for line in CASES]
    assert {case.values for case in cases} == set(VALUES)
    assert {case.routing for case in cases} == set(ROUTINGS)
    assert {case.bias for case in cases} == set(BIASES)


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONHASHSEED": "17"},
        {"ATEN_CPU_CAPABILITY": "default"},
        {"OMP_NUM_THREADS": "3"},
    ],
    ids=lambda variables: next(iter(variables)),
)
def test_another_process_draws_the_same_tensors(variables: dict[str, str]) -> None:
    """With another hash seed, without torch's vector instructions, with more threads."""
    told = subprocess.run(
        [sys.executable, "-m", "tests.oracle.digests", *LINES],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert dict(zip(LINES, told.stdout.split(), strict=True)) == dict(
        zip(LINES, _here(), strict=True)
    )


@pytest.mark.parametrize(("line", "digest"), OF_RECORD, ids=[line for line, _ in OF_RECORD])
def test_a_line_draws_what_it_always_drew(line: str, digest: str) -> None:
    """Old lines keep their meaning."""
    assert of_line(line) == digest
