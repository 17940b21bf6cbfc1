"""The judge is judged: each gross fault is seen, named at its place, and seen again on replay."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from twinmoe.oracle.case import Case
from twinmoe.oracle.check import check
from twinmoe.oracle.failures import WorkerDied, WorkerHang
from twinmoe.oracle.faults import FAULTS
from twinmoe.oracle.plan import Plan, plan_cells
from twinmoe.oracle.trial import Outcome, Trial

#: Faults that any case shows; ``test_caught.py`` has a case for each of the others.
WRONG = ["zeros", "dropped_slot", "swapped_segments", "bias_in_weights", "swapped_gate_up"]

#: A layer in which nothing is neutral, so that every fault has something to spoil.
LAYER = (
    "H=96,I=40,k=3,scoring_func=sigmoid,norm_topk_prob=0,rsf=2.5,use_correction_bias=1,shared=24"
)
TOKENS = {2: "4/2", 4: "4/2/0/5"}
PATHS = {
    "p2p": "transport=p2p,mode=eager",
    "p2p replayed": "transport=p2p,mode=replayed,padding=nan",
    "gloo": "transport=gloo,mode=eager",
    "alltoall": "transport=alltoall",
}
#: As the report writes them.
RAN = {
    "p2p": r"graphed: p2p, grouped_mm experts, fused router, bucket \d ",
    "p2p replayed": r"graphed: p2p, grouped_mm experts, fused router, bucket \d, replay 2 ",
    "gloo": r"graphed: gloo, grouped_mm experts, fused router, bucket \d ",
    "alltoall": r"eager: alltoall, grouped_mm experts, torch router ",
}

#: What a hang may cost here, in workers that have run before: a fifth of what a person waits.
HANG_S = 3.0


@pytest.fixture(scope="module")
def trial() -> Iterator[Trial]:
    """Share worlds between the tests of this file."""
    with Trial() as shared:
        yield shared


@contextmanager
def impatient(trial: Trial, ep_size: int) -> Iterator[None]:
    """Tell hangs of one world after HANG_S; only of a warm one, since first calls take longer."""
    assert trial.run(case_for("p2p replayed", ep_size)).equivalent
    world = trial._worlds[ep_size]
    patience, world.timeout_s = world.timeout_s, HANG_S
    try:
        yield
    finally:
        world.timeout_s = patience


def case_for(path: str, ep_size: int, fault: str = "") -> Case:
    """Return a case of LAYER on ``path``, with ``fault`` planted."""
    line = f"T={TOKENS[ep_size]},E={3 * ep_size},{LAYER},{PATHS[path]}"
    return replace(Case.parse(line), fault=fault)


WHERE = [
    *[(fault, path, 2) for fault in WRONG for path in ("p2p", "p2p replayed", "alltoall")],
    *[(fault, "p2p replayed", 4) for fault in WRONG],
    *[(fault, "gloo", 4) for fault in ("dropped_slot", "swapped_segments")],
]
REACHED = [where for where in WHERE if FAULTS[where[0]].reaches(case_for(where[1], where[2]))]


def place_of(outcome: Outcome) -> tuple[str, int, int | None, int | None]:
    """Return stage, rank, token and dim of an outcome's first finding in the data flow."""
    culprit = outcome.verdicts["optimized"].culprit
    assert culprit is not None
    return culprit.stage, culprit.rank, culprit.token, culprit.dim


# --- wrong numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize(("fault", "path", "ep_size"), REACHED)
def test_a_fault_is_seen_named_and_seen_again(
    trial: Trial, fault: str, path: str, ep_size: int
) -> None:
    """The stage at fault is named with token, rank and path; the printed line shows it again."""
    case = case_for(path, ep_size, fault)
    outcome = trial.run(case)
    assert not outcome.equivalent
    assert outcome.verdicts["reference"].equivalent
    stage, rank, token, _ = place_of(outcome)
    assert stage == FAULTS[fault].stage
    assert token is not None
    assert token < case.tokens[rank]

    account = outcome.explain()
    assert f"token {token} on rank {rank}" in account
    assert re.search(f"path: {RAN[path]}", account)
    assert f"stage: {stage}" in account
    replay_line = re.search(r"reproduce: twinmoe replay '(.*)'$", account)
    assert replay_line is not None

    again = trial.run(Case.parse(replay_line[1]))
    assert again.case == case
    assert place_of(again) == place_of(outcome)


@pytest.mark.parametrize(("path", "ep_size"), sorted({where[1:] for where in WHERE}))
def test_the_same_cases_without_a_fault_are_equivalent(
    trial: Trial, path: str, ep_size: int
) -> None:
    """It is the fault that is seen: the case itself is inside its envelope, all slots visible."""
    outcome = trial.run(case_for(path, ep_size))
    assert outcome.equivalent, outcome.explain()
    verdict = outcome.verdicts["optimized"]
    assert verdict.slots_visible == verdict.slots > 0


def test_all_to_all_is_out_of_reach_of_the_gathers_fault_alone() -> None:
    """Of the faults in numbers only the swapped segments need an all-gather; no test is lost."""
    unreached = {(fault, path) for fault, path, _ in set(WHERE) - set(REACHED)}
    assert unreached == {("swapped_segments", "alltoall")}


@pytest.mark.parametrize("fault", WRONG)
def test_a_check_meets_every_fault_in_its_corners(trial: Trial, fault: str) -> None:
    """With one path and one random case, a check is not equivalent, and names the right stage."""
    plan = Plan(plan_cells((2,), ("p2p",), ("eager",), (torch.bfloat16,)), 1, fault=fault)
    summary = check(plan, trial)
    assert not summary.equivalent
    assert summary.planted > 0
    (result,) = summary.results
    assert result.failure is not None
    assert result.failure.case.fault == fault
    assert place_of(result.failure)[0] == FAULTS[fault].stage


# --- dead and missing ranks ------------------------------------------------------------------


@pytest.mark.parametrize("path", ["p2p replayed", "alltoall"])
def test_a_killed_worker_is_named_and_replaced(trial: Trial, path: str) -> None:
    """WorkerDied names the last rank and the signal; the next case finds a whole world."""
    start = time.monotonic()
    with pytest.raises(WorkerDied, match="rank 1 was killed by signal 9") as caught:
        trial.run(case_for(path, 2, "killed_worker"))
    assert time.monotonic() - start < 30
    assert caught.value.ranks == (1,)
    assert trial.run(case_for(path, 2)).equivalent


@pytest.mark.slow
@pytest.mark.parametrize(("path", "ep_size"), [("p2p", 2), ("p2p replayed", 4), ("alltoall", 2)])
def test_a_skipped_collective_is_a_hang_with_a_name(trial: Trial, path: str, ep_size: int) -> None:
    """WorkerHang names the rank that stayed away, and what the others wait in."""
    with impatient(trial, ep_size), pytest.raises(WorkerHang) as caught:
        trial.run(case_for(path, ep_size, "skipped_collective"))
    assert caught.value.seconds == HANG_S
    assert caught.value.ranks == (ep_size - 1,)
    awaited = "all_to_all" if path == "alltoall" else "reduce_scatter"
    assert awaited in caught.value.last_operations[0]
    assert str(caught.value).startswith(f"rank {ep_size - 1} kept rank")


@pytest.mark.slow
def test_a_check_goes_on_after_a_hang(trial: Trial) -> None:
    """The cell of two ranks fails with a hang; the next cell, of one rank, is judged whole."""
    cells = plan_cells((2, 1), ("p2p",), ("eager",), (torch.bfloat16,))
    with impatient(trial, 2):
        summary = check(Plan(cells, 1, fault="skipped_collective"), trial)
    hung, whole = summary.results
    assert not summary.equivalent
    assert hung.worker_failure is not None
    assert isinstance(hung.worker_failure[1], WorkerHang)
    assert whole.passed
    assert whole.cases == len(summary.plan.corners(cells[1])) + 1
    assert whole.planted == 0
    assert trial.run(case_for("p2p", 2)).equivalent
