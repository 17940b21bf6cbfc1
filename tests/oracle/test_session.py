"""Sessions: every classic history on every kind of path, and what a step does."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from twinmoe.oracle.case import Case
from twinmoe.oracle.history import HISTORIES
from twinmoe.oracle.session import FILLERS, Answer, other_shape
from twinmoe.oracle.trial import Trial

LAYER = "H=32,I=24,E=8,k=2,scoring_func=sigmoid,rsf=2.5,shared=8,dtype=bf16,seed=2"
PATHS = ("mode=replayed", "transport=nvls,mode=graphed", "transport=alltoall", "transport=gloo")


@pytest.fixture(scope="module")
def trial() -> Iterator[Trial]:
    """Share worlds between the tests of this file."""
    with Trial() as shared:
        yield shared


def answers(trial: Trial, line: str, rank: int = 0) -> list[Answer]:
    """Return the optimized twin's answers of one rank."""
    showings = trial.observe(Case.parse(line), ("optimized",))
    return [answer for answer in showings[rank]["optimized"].answers if answer is not None]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("history", list(HISTORIES.values()), ids=list(HISTORIES))
def test_both_twins_live_through_every_history(trial: Trial, history: str, path: str) -> None:
    """On two ranks with unequal batches, every forward is judged."""
    case = Case.parse(f"T=5/2,{LAYER},{path},history={history}")
    outcome = trial.run(case)
    assert outcome.equivalent, outcome.explain()
    forwards = sum(step.is_forward for step in case.steps())
    assert outcome.verdicts["optimized"].elements >= forwards * 3 * 16


def test_the_switch_and_the_swap_change_what_runs(trial: Trial) -> None:
    """Contracts and launches follow the steps."""
    seen = answers(trial, f"T=5/2,{LAYER},mode=replayed,history=f0.k1.f0.a0.k0.g0")
    assert [answer.contract.name for answer in seen] == [
        "p2p + grouped_mm",
        "gloo + grouped_mm",
        "alltoall + grouped_mm",
        "p2p + grouped_mm",
    ]
    gathers = [
        {name for name in answer.observation.launches if name.startswith("all_gather[")}
        for answer in seen
    ]
    assert gathers == [{"all_gather[p2p]"}, {"all_gather[gloo]"}, set(), {"all_gather[p2p]"}]


def test_acts_say_where_in_the_history_they_stand(trial: Trial) -> None:
    """Number, length and step; a lone forward needs no name."""
    seen = answers(trial, f"T=5/2,{LAYER},mode=replayed,history=f0.w1.f1")
    assert [answer.act for answer in seen] == ["step 1 of 3 (f0)", "step 3 of 3 (f1)"]
    assert [answer.scenario.version for answer in seen] == [0, 1]
    assert [answer.call.is_last for answer in seen] == [False, True]
    assert [answer.act for answer in answers(trial, f"T=5/2,{LAYER}")] == [""]


def test_only_the_last_forward_shows_its_padded_buffers(trial: Trial) -> None:
    """Before that a faster rank may be at the next batch."""
    first, last = answers(trial, f"T=5/2,{LAYER},history=f0.f1", rank=1)
    assert first.observation.taps.gathered_ids is None
    assert first.observation.taps.ids_TK is not None
    assert last.observation.taps.gathered_ids is not None


def test_in_step_every_forward_shows_its_padded_buffers(trial: Trial) -> None:
    """All ranks wait for each other: nobody writes before all have looked, in relations too."""
    for story in ("history=f0.f1.f0", "relation=alone"):
        case = Case.parse(f"T=5/2,{LAYER},{story}")
        for showing in trial.observe(case, ("optimized",), in_step=True):
            for answer in showing["optimized"].answers:
                assert answer is None or answer.observation.taps.partial is not None


def test_padding_is_filled_as_asked(trial: Trial) -> None:
    """Each number of the step has its content, in the order of the program."""
    seen = answers(trial, f"T=5/2,{LAYER},history=f0.x1.f0.x2.f0.x3.f0.x0.f0")
    fillers = [str(answer.call.filler) for answer in seen]
    assert fillers == [str(FILLERS[number]) for number in (0, 1, 2, 3, 0)]


def test_memory_is_poisoned_for_one_case_alone(trial: Trial) -> None:
    """The mode that fills new memory is put back when the case is over."""
    assert trial.run(Case.parse(f"T=5/2,{LAYER},history=p.f0")).equivalent
    assert trial._worlds[2].run(_deterministic) == [False, False]


def _deterministic(_context: object) -> bool:
    return torch.are_deterministic_algorithms_enabled()


def test_a_change_of_fewer_ranks_leaves_the_others_out(trial: Trial) -> None:
    """Alone, rank 0 answers for all; rank 1 shows that it had no part."""
    case = Case.parse(f"T=5/2,{LAYER},relation=alone")
    first, second = (
        showing["optimized"].answers for showing in trial.observe(case, ("optimized",))
    )
    assert second[1] is None
    assert first[1] is not None
    assert len(first[1].observation.output_TH) == 7


def test_the_other_layer_differs_in_every_width() -> None:
    """So that a buffer sized or strided for the first does not fit the second."""
    case = Case.parse(f"T=5/2,{LAYER}")
    for wide in (case, replace(case, config=replace(case.config, hidden_size=384))):
        other = other_shape(wide)
        assert other.config.hidden_size != wide.config.hidden_size
        assert other.config.moe_intermediate_size != wide.config.moe_intermediate_size
        assert not other.config.has_shared_expert
        assert other.tokens == wide.tokens
