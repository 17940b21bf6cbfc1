"""Named mistakes: each is recognised in a layer that makes it, and in no right one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from twinmoe.oracle import RankObservation, Taps, storage_contract
from twinmoe.oracle.case import Case
from twinmoe.oracle.diagnose import diagnosis_of
from twinmoe.oracle.hypotheses import HYPOTHESES, Supposed, suppositions
from twinmoe.oracle.scenario import Scenario
from twinmoe.oracle.session import Answer
from twinmoe.oracle.showing import Showing
from twinmoe.oracle.subject import Call
from twinmoe.reference import router
from twinmoe.reference.layer import MoELayer

#: A layer in which every mistake of meaning changes something.
LINE = (
    "T=12,H=32,I=16,E=8,k=3,rsf=2.5,dtype=bf16,scoring_func=sqrtsoftplus,n_group=4,topk_group=2,"
    "use_correction_bias=1,hidden_act=gelu_pytorch_tanh,swiglu_limit=0.5,shared=16,"
    "shared_expert_gate=1,router_weight_on_input=1,transport=alltoall,seed=5"
)
OTHER = LINE.replace("rsf=2.5", "rsf=2.5,norm_topk_prob=0")


def right(line: str) -> Supposed:
    """What is true of a case."""
    scenario = Scenario(Case.parse(line))
    contract = storage_contract("mine", scenario.config.dtype)
    return Supposed(scenario.config, scenario.weights(), contract, ranks=1)


def showing_of(line: str, layer: Supposed) -> Showing:
    """What the reference shows, built as somebody would who understood the case so."""
    scenario = Scenario(Case.parse(line))
    (hidden_TH,) = scenario.hidden()
    made = MoELayer(layer.config, layer.weights)
    with torch.no_grad():
        taps = Taps(ids_TK=made.router(hidden_TH).ids_TK)
        seen = RankObservation(made(hidden_TH), taps)
    call = Call("alltoall", len(hidden_TH))
    return Showing((Answer("", scenario, right(line).contract, frozenset(), call, seen),), ())


def of_meaning(line: str) -> dict[str, Supposed]:
    """The mistakes that a config or its weights can express."""
    true = right(line)
    return {
        sentence: supposed
        for sentence, supposed in suppositions(true).items()
        if supposed.contract == true.contract and supposed.truth is true.truth
    }


@pytest.mark.parametrize("sentence", of_meaning(LINE) | of_meaning(OTHER))
def test_a_mistake_is_named_in_a_layer_that_makes_it(sentence: str) -> None:
    """The sentence is among those that fit."""
    line = LINE if sentence in of_meaning(LINE) else OTHER
    assert sentence in diagnosis_of([showing_of(line, of_meaning(line)[sentence])])


VANISHING = (
    "T=12,H=32,I=16,E=8,k=3,scoring_func=sigmoid,routing=silent,dtype=bf16,transport=alltoall"
)


@pytest.mark.parametrize("value", [1e-6, 1e-9, 1e-12])
def test_another_epsilon_is_named(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """Where the scores of a token vanish."""
    monkeypatch.setattr(router, "NORM_EPSILON", value)
    (sentence,) = diagnosis_of([showing_of(VANISHING, right(VANISHING))])
    assert sentence.startswith(f"{value:g} is added to the sum")


def test_groups_ranked_without_the_bias_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best groups are found by other scores than the experts in them."""
    true = right(LINE)
    bias_E = true.weights.correction_bias_E
    assert bias_E is not None
    kept_experts = router.kept_experts
    monkeypatch.setattr(
        router, "kept_experts", lambda config, choice_TE: kept_experts(config, choice_TE - bias_E)
    )
    told = diagnosis_of([showing_of(LINE, true)])
    assert told == ["groups are ranked by scores without the correction bias"]


def test_a_right_layer_has_no_diagnosis() -> None:
    """Nothing is to be explained."""
    assert diagnosis_of([showing_of(LINE, right(LINE))]) == []


def test_an_unknown_mistake_has_no_diagnosis() -> None:
    """What no rule describes is not given a name."""
    true = right(LINE)
    broken = replace(true.weights, w2_LHI=true.weights.w2_LHI.flip(1))
    assert diagnosis_of([showing_of(LINE, replace(true, weights=broken))]) == []


def test_mistakes_that_change_nothing_are_not_supposed() -> None:
    """A layer without bias, groups, limit and shared expert cannot get them wrong."""
    found = suppositions(right("T=3,H=32,I=16,E=4,k=2,dtype=bf16,transport=alltoall"))
    assert not any(word in sentence for sentence in found for word in ("bias", "group", "shared"))
    assert any("gate and up are swapped" in sentence for sentence in found)


def test_every_sentence_fits_behind_the_message() -> None:
    """Sentences follow 'this is what one gets if' and have no full stop."""
    assert all(not sentence.endswith(".") for sentence in HYPOTHESES)
