"""The same question gets the same bits: which answers are compared, and what is told."""

from collections import Counter
from dataclasses import replace

import torch

from twinmoe.oracle.case import Case
from twinmoe.oracle.contracts import eager_contract, graphed_contract
from twinmoe.oracle.observation import RankObservation, Taps
from twinmoe.oracle.repeats import changed_answers
from twinmoe.oracle.scenario import Scenario
from twinmoe.oracle.session import Answer
from twinmoe.oracle.subject import Call

CASE = Case.parse("T=2,H=4,I=4,E=4,k=1,dtype=fp32")
P2P = graphed_contract(CASE.config, "triton", "p2p", torch.float32)
NVLS = graphed_contract(CASE.config, "triton", "nvls", torch.float32)
EAGER = eager_contract(CASE.config, "triton")


def answer(act: str, value: float = 1.0, **changes: object) -> list[Answer]:
    """Return one rank's answer whose outputs and sums are ``value``."""
    rows = torch.full((2, 4), value)
    taps = Taps(ids_TK=torch.zeros(2, 1), weights_TK=torch.ones(2, 1), routed_TH=rows)
    observation = RankObservation(rows, taps, "", Counter())
    call = Call("captured", max_tokens=2)
    plain = Answer(act, Scenario(CASE), P2P, frozenset(), call, observation)
    return [replace(plain, **changes)]  # type: ignore[arg-type]


def test_equal_answers_pass() -> None:
    """However often it is asked."""
    assert not list(changed_answers([answer("a"), answer("b"), answer("c")]))


def test_a_changed_answer_is_told_with_both_acts_and_values() -> None:
    """Against the first time it was asked, at the first stage that differs."""
    (finding,) = changed_answers([answer("first"), answer("second"), answer("third", 1.5)])
    assert finding.stage == "combine"
    assert finding.relation == "same bits again"
    assert finding.message.startswith("third answers otherwise than first")
    assert "8 of 8 elements differ" in finding.message
    assert "1, then 1.5" in finding.message


def test_other_questions_are_not_compared() -> None:
    """Another batch, version, bucket or path may well have another answer."""
    others = [
        answer("batch", 2.0, scenario=Scenario(CASE, step=1)),
        answer("weights", 3.0, scenario=Scenario(CASE, version=1)),
        answer("bucket", 4.0, call=Call("captured", max_tokens=5)),
        answer("path", 5.0, contract=EAGER, call=Call("alltoall", max_tokens=2)),
    ]
    assert not list(changed_answers([answer("first"), *others]))


def test_a_graph_and_the_same_kernels_without_one_are_one_path() -> None:
    """Replay must equal eager, bit for bit."""
    eager = answer("eager", 2.0, call=Call("graphed", max_tokens=2))
    assert list(changed_answers([answer("replay"), eager]))


def test_a_sum_in_any_order_promises_the_routing_alone() -> None:
    """A multicast sum may differ between calls; the chosen experts may not."""
    first, again = answer("first", contract=NVLS), answer("again", 1.5, contract=NVLS)
    assert not list(changed_answers([first, again]))
    taps = replace(again[0].observation.taps, ids_TK=torch.ones(2, 1))
    again = [replace(again[0], observation=replace(again[0].observation, taps=taps))]
    (finding,) = changed_answers([first, again])
    assert finding.stage == "router"


def test_an_output_that_changed_alone_is_told_whichever_rank_gave_it() -> None:
    """The taps are as before, on both ranks."""

    def ranks(act: str, value: float) -> list[Answer]:
        one, two = answer(act)[0], answer(act)[0]
        seen = replace(two.observation, output_TH=torch.full((2, 4), value))
        return [one, replace(two, observation=seen)]

    (finding,) = changed_answers([ranks("first", 1.0), ranks("second", 1.5)])
    assert (finding.stage, finding.rank) == ("output", 1)
