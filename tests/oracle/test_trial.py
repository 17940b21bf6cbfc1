"""One trial: worlds kept and ended, verdicts on both twins, and claims that are checked."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from twinmoe.oracle.case import Case
from twinmoe.oracle.failures import WorkerDied
from twinmoe.oracle.session import Answer
from twinmoe.oracle.showing import judge_showings
from twinmoe.oracle.trial import Trial
from twinmoe.oracle.verdict import Verdict

SIZES = "H=32,I=16,E=4,k=2,rsf=2.5"


@pytest.fixture(scope="module")
def trial() -> Iterator[Trial]:
    """Share worlds between the tests of this file."""
    with Trial() as shared:
        yield shared


def running(pid: int) -> bool:
    """Whether a process with this id exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def pids_of(trial: Trial) -> dict[int, list[int]]:
    """Return the process ids of each world of a trial."""
    return {size: world.pids for size, world in trial._worlds.items()}


@pytest.mark.parametrize(
    ("line", "ran"),
    [
        (f"T=3,{SIZES}", "graphed: p2p, grouped_mm experts, fused router, bucket 4"),
        (f"T=3/0,{SIZES},mode=graphed", "bucket 4, replay 1"),
        (f"T=3/0,{SIZES},mode=replayed,padding=nan", "bucket 4, replay 2"),
        (f"T=1/5,{SIZES},transport=nvls", "graphed: nvls (emulated)"),
        (f"T=1/5,{SIZES},transport=gloo,wire=model", "graphed: gloo"),
        (f"T=1/5,{SIZES},transport=alltoall", "eager: alltoall"),
        (f"T=0/0,{SIZES}", "bucket 1"),
    ],
)
def test_both_twins_are_judged_on_the_path_that_was_asked_for(
    trial: Trial, line: str, ran: str
) -> None:
    """The reference and the optimized twin are each equivalent; the path says what ran."""
    outcome = trial.run(Case.parse(line))
    assert outcome.equivalent, outcome.explain()
    assert list(outcome.verdicts) == ["reference", "optimized"]
    assert outcome.paths["reference"] == "reference alltoall"
    assert ran in outcome.paths["optimized"]
    assert outcome.run_seconds > 0
    assert outcome.judge_seconds > 0


def test_a_case_has_the_same_verdict_twice(trial: Trial) -> None:
    """Run again in the same workers, a case over an ordered transport is as close as before."""
    case = Case.parse(f"T=7/2,{SIZES},mode=replayed,seed=5")
    first, second = (trial.run(case).verdicts["optimized"] for _ in range(2))
    assert first.elements == 2 * 9 * 32  # both batches
    assert (first.worst_ratio, first.flips) == (second.worst_ratio, second.flips)


def test_an_outcome_explains_failing_twins_only(trial: Trial) -> None:
    """The account names the twin, the path and the stage, then the line that replays it."""
    case = Case.parse(f"T=3/1,{SIZES},fault=zeros")
    account = trial.run(case).explain().splitlines()
    assert account[0].startswith("optimized: out[token ")
    assert "stage: output" in account[1]
    assert account[-1] == f"  reproduce: twinmoe replay '{case}'"
    assert not any(line.startswith("reference") for line in account)


def test_subjects_can_be_judged_alone() -> None:
    """A trial of the reference alone builds no other layer."""
    with Trial(subjects=["reference"]) as alone:
        outcome = alone.run(Case.parse(f"T=3,{SIZES}"))
    assert outcome.equivalent
    assert list(outcome.verdicts) == ["reference"]


# --- worlds ----------------------------------------------------------------------------------


def test_worlds_are_kept_by_size_and_ended_together() -> None:
    """The second case of a size meets the same processes; closing ends every one of them."""
    with Trial() as trial:
        trial.run(Case.parse(f"T=3,{SIZES}"))
        trial.run(Case.parse(f"T=3/1,{SIZES}"))
        before = pids_of(trial)
        trial.run(Case.parse(f"T=1/1,{SIZES}"))
        assert pids_of(trial) == before
        pids = [pid for world in before.values() for pid in world]
        assert len(pids) == 3
        assert all(map(running, pids))
    assert not any(map(running, pids))


def test_a_dead_worker_is_raised_and_the_next_case_runs(trial: Trial) -> None:
    """A killed rank is WorkerDied naming it; the same trial then judges on."""
    line = f"T=3/1,{SIZES}"
    with pytest.raises(WorkerDied, match="rank 1 was killed by signal 9") as caught:
        trial.run(Case.parse(f"{line},fault=killed_worker"))
    assert caught.value.rank == 1
    assert trial.run(Case.parse(line)).equivalent


# --- claims ----------------------------------------------------------------------------------

CASE = Case.parse(f"T=3/1,{SIZES}")

Forge = Callable[[Answer], Answer]


def judged(trial: Trial, forge: Forge) -> Verdict:
    """Judge the optimized twin's answers to CASE after rank 1's was forged."""
    showings = [showing["optimized"] for showing in trial.observe(CASE, ("optimized",))]
    (answer,) = showings[1].answers
    assert answer is not None
    showings[1] = replace(showings[1], answers=(forge(answer),))
    return judge_showings(CASE, showings)


def test_a_claim_without_launches_is_refused(trial: Trial) -> None:
    """A path whose collectives were never counted did not run, whatever it says it ran."""

    def forge(answer: Answer) -> Answer:
        launches = Counter({"all_gather[p2p]": 1})
        return replace(answer, observation=replace(answer.observation, launches=launches))

    culprit = judged(trial, forge).culprit
    assert culprit is not None
    assert (culprit.stage, culprit.rank) == ("experts", 1)
    assert "rank 1 claims 'graphed: p2p" in culprit.message
    assert "never launched" in culprit.message
    assert "sort_slots" in culprit.message


def test_another_transport_than_the_claimed_one_is_refused(trial: Trial) -> None:
    """A rank that ran its claimed collectives and those of another tier is found out."""

    def forge(answer: Answer) -> Answer:
        launches = answer.observation.launches + Counter({"all_gather[gloo]": 1})
        return replace(answer, observation=replace(answer.observation, launches=launches))

    culprit = judged(trial, forge).culprit
    assert culprit is not None
    assert "but also launched all_gather[gloo]" in culprit.message


def test_ranks_on_different_paths_are_refused(trial: Trial) -> None:
    """One rank that rounds by another contract is a finding, even where its numbers fit."""

    def forge(answer: Answer) -> Answer:
        return replace(answer, contract=replace(answer.contract, name="nvls + triton"))

    culprit = judged(trial, forge).culprit
    assert culprit is not None
    assert "rank 1 runs nvls + triton, rank 0 p2p + grouped_mm" in culprit.message


def test_true_claims_pass(trial: Trial) -> None:
    """The same answers, not forged, are equivalent."""
    assert judged(trial, lambda answer: answer).equivalent


def test_a_fault_of_an_earlier_forward_is_named_at_its_stage(trial: Trial) -> None:
    """Outputs alone tell of it while ranks run ahead; in step, the share that is wrong is seen."""
    case = Case.parse(
        "T=0/2,H=192,I=16,E=8,k=1,scoring_func=sqrtsoftplus,n_group=4,topk_group=2,"
        "group_score=max,use_correction_bias=1,dtype=fp32,mode=graphed,values=positive,bias=nan,"
        "padding=nan,seed=239,history=p.f0.p.f0.f1,fault=untranslated_ids"
    )
    blurred = judge_showings(
        case, [each["optimized"] for each in trial.observe(case, ["optimized"])]
    )
    assert blurred.culprit is not None
    outcome = trial.run(case)
    culprit = outcome.verdicts["optimized"].culprit
    assert culprit is not None
    assert (blurred.culprit.stage, culprit.stage) == ("output", "experts")
    assert outcome.diagnosis == []


class _RaceTrial(Trial):
    """A trial whose fault goes away once all ranks are in step, as a race does."""

    def observe(self, case: Case, *args: Any, in_step: bool = False, **more: Any) -> Any:
        return super().observe(replace(case, fault="") if in_step else case, *args, **more)


def test_what_is_right_in_step_is_told_as_a_race() -> None:
    """The verdict stays, and says that a rank ran ahead of another."""
    case = Case.parse(f"T=3/1,{SIZES},history=f0.f1,fault=zeros")
    with _RaceTrial(subjects=("optimized",)) as trial:
        outcome = trial.run(case)
    assert not outcome.equivalent
    assert "if a rank runs into what another has not finished" in outcome.explain()


@pytest.mark.parametrize(("transport", "met"), [("alltoall", False), ("p2p", True)])
def test_a_planted_fault_says_whether_it_was_met(trial: Trial, transport: str, met: bool) -> None:
    """By a count on the ranks, whatever is believed of its reach: unmet, a verdict says nothing."""
    line = f"T=3,{SIZES},dtype=bf16,transport={transport},fault=late_fill"
    assert trial.run(Case.parse(line)).fault_met is met
