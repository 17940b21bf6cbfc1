"""Answers of real ranks with one thing forged: each is told, by whoever has to tell it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from twinmoe.oracle import judge, killswitch, showing
from twinmoe.oracle.breadcrumbs import Issued
from twinmoe.oracle.case import Case
from twinmoe.oracle.contracts import reference_contract
from twinmoe.oracle.failures import WorkerHang
from twinmoe.oracle.killswitch import Result, validate
from twinmoe.oracle.killswitch_checks import Check, Place, checks
from twinmoe.oracle.showing import Showing, judge_showings
from twinmoe.oracle.trial import Trial
from twinmoe.oracle.verdict import Finding, Verdict
from twinmoe.oracle.world import World

PLACE = Place(2)
SIZES = "H=32,I=16,E=4,k=2,rsf=2.5"
CASE = Case.parse(f"T=3/1,{SIZES}")

#: What all ranks played -> the same with something changed.
Forge = Callable[[Any], Any]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Two ranks for the kill switch."""
    with World(2, timeout_s=10) as shared:
        yield shared


@pytest.fixture(scope="module")
def trial() -> Iterator[Trial]:
    """Workers for cases."""
    with Trial() as shared:
        yield shared


def named(*parts: str) -> list[Check]:
    """The checks of two ranks whose names contain all ``parts``."""
    return [check for check in checks(PLACE) if all(part in check.name for part in parts)]


class Forged:
    """A world that changes what its ranks say."""

    def __init__(self, world: World, forge: Forge) -> None:
        self._world, self._forge = world, forge

    def run(self, *task: Any) -> Any:
        """Run a task and forge the answers."""
        return self._forge(self._world.run(*task))


def validated(world: World, forge: Forge, only: Sequence[Check]) -> list[Result]:
    """Validate the kill switch by forged answers."""
    return validate(PLACE, Forged(world, forge), only=only)  # type: ignore[arg-type]


def observed(played: Any, rank: int, place: int, **changes: Any) -> Any:
    """Forge what one rank observed of one forward."""
    answers = list(played[rank].showing.answers)
    seen = replace(answers[place].observation, **changes)
    answers[place] = replace(answers[place], observation=seen)
    played[rank].showing = replace(played[rank].showing, answers=tuple(answers))
    return played


# --- the kill switch ------------------------------------------------------------------------


def test_a_fallback_that_computes_something_else_does_not_hold(world: World) -> None:
    """The transport ran, and its numbers are wrong: the rank is to blame."""

    def forge(played: Any) -> Any:
        out_TH = played[0].showing.answers[0].observation.output_TH
        return observed(played, 0, 0, output_TH=out_TH + 1)

    (result,) = validated(world, forge, named("switch before construction")[:1])
    assert not result.holds
    assert result.ranks == (0,)
    assert "stage: output" in result.wrong


def test_other_bits_after_the_switch_came_back_do_not_hold(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A, B, A: even where every number lies in its interval."""
    right = Verdict(reference_contract(CASE.config), "")
    monkeypatch.setattr(killswitch, "judge_showings", lambda *_: right)

    def forge(played: Any) -> Any:
        out_TH = played[0].showing.answers[-1].observation.output_TH.clone()
        out_TH[0, 0] += 1
        return observed(played, 0, -1, output_TH=out_TH)

    (result,) = validated(world, forge, named("p2p", "between calls"))
    assert result.same_bits is False
    assert "got other bits" in result.wrong


def test_tiers_that_gather_other_bits_do_not_hold(world: World) -> None:
    """A gather is a copy on every tier."""

    def forge(played: Any) -> Any:
        if played[0].held[-1][0] != "p2p":
            return played
        taps = played[1].showing.answers[-1].observation.taps
        hidden = taps.gathered_hidden + 1
        return observed(played, 1, -1, taps=replace(taps, gathered_hidden=hidden))

    some = [*named("gloo by choice"), *named("p2p", "between calls")]
    *_, gathers = validated(world, forge, some)
    assert gathers.wrong == "gathered hidden states differ between gloo and p2p"


def test_a_reason_told_of_another_rank_is_missed(world: World) -> None:
    """Every report has to name the rank whose set-up failed."""

    def forge(played: Any) -> Any:
        for one in played:
            one.report = one.report.replace("rank 1:", "rank 0:")
        return played

    (result,) = validated(world, forge, named("rendezvous_failed"))
    assert "does not say 'rendezvous_failed'" in result.wrong


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_does_not_refuse_is_told(world: World, rank: int) -> None:
    """Ranks that want opposite things all have to refuse."""

    def forge(played: Any) -> Any:
        played[rank].refusal = ""
        return played

    (result,) = validated(world, forge, named("asks for the opposite"))
    assert "not all ranks refuse" in result.wrong


def test_a_hang_of_another_rank_than_the_one_that_switched_is_no_success() -> None:
    """The rank that switched alone has to be named, not whichever."""

    class Hangs:
        def run(self, *_: Any) -> None:
            raise WorkerHang([0], 3.0, {}, "rank 1: waiting in exchange")

    (result,) = validate(PLACE, Hangs(), only=named("switches alone"))  # type: ignore[arg-type]
    assert not result.holds
    assert result.ranks == (0,)


# --- cases ----------------------------------------------------------------------------------


def culprit_of(
    trial: Trial, case: Case, forge: Callable[[int, Showing], Showing]
) -> Finding | None:
    """Judge what the ranks showed, forged rank by rank."""
    shown = [each["optimized"] for each in trial.observe(case, ("optimized",))]
    return judge_showings(case, [forge(rank, one) for rank, one in enumerate(shown)]).culprit


def last_changed(shown: Showing, **changes: Any) -> Showing:
    """The last answer, changed."""
    place = max(i for i, answer in enumerate(shown.answers) if answer is not None)
    answers = list(shown.answers)
    answers[place] = replace(answers[place], **changes)  # type: ignore[type-var]
    return replace(shown, answers=tuple(answers))


def test_a_collective_that_one_rank_alone_issued_is_refused(trial: Trial) -> None:
    """Numbers may be right: the journals differ."""

    def forge(rank: int, shown: Showing) -> Showing:
        more = (Issued("all_gather[p2p]", "[1] int32"),) * rank
        return replace(shown, journal=shown.journal + more)

    culprit = culprit_of(trial, CASE, forge)
    assert culprit is not None
    assert (culprit.stage, culprit.relation) == ("dispatch", "collective contract")


def test_an_alltoall_that_exchanged_nothing_is_refused(trial: Trial) -> None:
    """A claim without a collective behind it."""
    case = Case.parse(f"T=3/1,{SIZES},transport=alltoall")
    culprit = culprit_of(trial, case, lambda _, shown: replace(shown, journal=()))
    assert culprit is not None
    assert "rank 0 claims the AlltoAll path" in culprit.message


def test_what_a_forward_overwrote_is_a_finding(trial: Trial) -> None:
    """Of the rank that complained."""

    def forge(rank: int, shown: Showing) -> Showing:
        told = ("the forward overwrote its input",) if rank == 1 else ()
        return last_changed(shown, complaints=told)

    culprit = culprit_of(trial, CASE, forge)
    assert culprit is not None
    assert (culprit.rank, culprit.message) == (1, "the forward overwrote its input")


@pytest.mark.parametrize(
    "relation", ["permuted_tokens", "halves", "on_one_rank", "alone", "poisoned_token"]
)
def test_a_changed_answer_that_does_not_map_back_is_a_finding(
    trial: Trial, relation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the relation itself, where no truth is asked."""
    case = Case.parse(f"T=4/1,{SIZES},relation={relation}")
    monkeypatch.setattr(
        showing,
        "judge",
        lambda seen, truth, contract: (
            Verdict(contract, "") if seen[0].path else judge(seen, truth, contract)
        ),
    )

    def forge(_rank: int, shown: Showing) -> Showing:
        place = max(i for i, answer in enumerate(shown.answers) if answer is not None)
        answer = shown.answers[place]
        assert answer is not None
        seen = answer.observation
        return last_changed(shown, observation=replace(seen, output_TH=seen.output_TH + 1))

    assert culprit_of(trial, case, lambda _, shown: shown) is None
    culprit = culprit_of(trial, case, forge)
    assert culprit is not None
    assert culprit.relation == relation
