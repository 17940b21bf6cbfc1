"""Sets of experts that correct routers may choose: against brute force, ties, and no answers.

Legend: T tokens, H hidden_size, E experts, G groups, K experts per token.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracle.routers import (
    admitted,
    config_of,
    reachable,
    truth_of,
    truth_of_logits,
    truth_of_scores,
    uncertain_scores,
)
from twinmoe.oracle.contract import Ties
from twinmoe.reference.router import TopKRouter
from twinmoe.reference.weights import MoEWeights

seeds = st.integers(0, 2**32)


@given(drawn=uncertain_scores(grouped=False))
def test_without_groups_the_admissible_sets_are_those_within_reach(drawn):
    """Exactly the sets that some scores inside the intervals lead to, no more, no fewer."""
    config, value_E, radius_E = drawn
    truth = truth_of_scores(config, value_E, radius_E)
    assert admitted(truth) == reachable(config, value_E, radius_E)


@given(drawn=uncertain_scores(grouped=True))
def test_with_groups_every_set_within_reach_is_admissible(drawn):
    """No answer of a correct router is refused, for either group score."""
    config, value_E, radius_E = drawn
    truth = truth_of_scores(config, value_E, radius_E)
    assert reachable(config, value_E, radius_E) <= admitted(truth)


@given(seed=seeds)
def test_with_groups_certain_scores_admit_one_set(seed):
    """Where all scores are certain and distinct, only the exact selection is admissible."""
    g = torch.Generator().manual_seed(seed)
    n_group = int(torch.randint(1, 4, (), generator=g))
    topk_group = int(torch.randint(1, n_group + 1, (), generator=g))
    k = int(torch.randint(1, min(5, topk_group * 6 // n_group) + 1, (), generator=g))
    config = config_of(6, k, n_group=n_group, topk_group=topk_group)
    # distinct sums of any two, too
    value_E = 2 ** torch.randperm(6, generator=g)
    truth = truth_of_scores(config, value_E, torch.zeros(6))
    assert admitted(truth) == reachable(config, value_E, torch.zeros(6))
    assert len(admitted(truth)) == 1


def test_some_group_fills_the_last_place():
    """With groups near-tied for the last place, one of them competes, whichever it is.

    Group 0 is certainly kept, and groups 1 and 2 tie for the other place.  Both hold an
    expert far above group 0's, so no correct router chooses from group 0.
    """
    config = config_of(6, 1, n_group=3, topk_group=2)
    value_E, radius_E = torch.tensor([50, 49, 80, 1, 79, 2]), torch.tensor([0, 0, 1, 0, 1, 0])
    assert reachable(config, value_E, radius_E) == {(2,), (4,)}
    assert admitted(truth_of_scores(config, value_E, radius_E)) == {(2,), (4,)}


# --- ties ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_of_exactly_tied_experts_only_the_lowest_ids_are_admissible(scoring):
    """Logits without error tie exactly under any scoring, so that the tie rule decides."""
    truth = truth_of_logits(config_of(4, 2, scoring_func=scoring), [[1, 2, 1, 1], [3, 3, 3, 3]])
    assert admitted(truth) == {(0, 1)}
    assert truth.admissible(torch.tensor([[0, 1], [0, 1]])).tolist() == [True, True]
    assert truth.admissible(torch.tensor([[2, 1], [0, 2]])).tolist() == [False, False]


def test_the_order_of_an_answer_does_not_matter():
    """An answer is a set: any order of the same experts is as good."""
    truth = truth_of_logits(config_of(5, 3), [[5, 4, 3, 2, 1]])
    for ids in ([0, 1, 2], [2, 0, 1]):
        assert truth.admissible(torch.tensor([ids])).all()


def test_of_exactly_tied_groups_only_the_lowest_is_admissible():
    """Equal scores make equal group scores: the tie rule holds among groups, too."""
    config = config_of(4, 1, n_group=2, topk_group=1)
    assert admitted(truth_of_logits(config, [[1, 1, 1, 1]])) == {(0,)}


def test_a_tie_with_another_bias_is_no_tie():
    """Equal logits under different biases are ranked by their biased scores."""
    config = config_of(3, 1, use_correction_bias=True, scoring_func="sigmoid", hidden_size=3)
    weights = replace(
        MoEWeights.random(config, 0),
        router_EH=torch.eye(3),
        correction_bias_E=torch.tensor([0.0, 0.5, 0.0]),
    )
    truth = truth_of(config, weights, torch.ones(1, 3))
    assert admitted(truth) == {(1,)}
    assert truth.ids_TK.tolist() == [[1]]


@given(seed=seeds)
def test_the_references_ties_are_admissible(seed):
    """Integer logits with many exact ties, groups included: the fp32 router is never refused."""
    g = torch.Generator().manual_seed(seed)
    config = config_of(8, 3, n_group=4, topk_group=2, hidden_size=8, scoring_func="sigmoid")
    router_EH = torch.randint(-1, 2, (8, 8), generator=g).float()[torch.arange(8) // 2]
    weights = replace(MoEWeights.random(config, 0), router_EH=router_EH)
    x_TH = torch.randint(-2, 3, (16, 8), generator=g).float()
    truth = truth_of(config, weights, x_TH)
    assert truth.admissible(TopKRouter(config, weights)(x_TH).ids_TK).all()


# --- what is no answer at all ----------------------------------------------------------------


@given(drawn=uncertain_scores(grouped=True))
def test_duplicates_are_never_admissible(drawn):
    """An expert named twice stands for a slot lost."""
    config, value_E, radius_E = drawn
    if config.num_experts_per_tok > 1:
        truth = truth_of_scores(config, value_E, radius_E)
        doubled = truth.ids_TK.clone()
        doubled[:, 0] = doubled[:, 1]
        assert not truth.admissible(doubled).any()


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_a_nan_token_is_a_tie_and_may_go_anywhere_once_where_ties_are_open(scoring):
    """All scores NaN: the lowest ids, or any distinct ones; its neighbours are unaffected."""
    nan = torch.nan
    config = config_of(4, 2, scoring_func=scoring)
    truth = truth_of_logits(config, [[nan, nan, nan, nan], [4, 3, 2, 1]])
    anywhere = replace(truth, contract=replace(truth.contract, ties=Ties.ANY))
    elsewhere = torch.tensor([[3, 1], [0, 1]])
    assert truth.admissible(elsewhere).tolist() == [False, True]
    assert truth.admissible(torch.tensor([[1, 0], [0, 1]])).tolist() == [True, True]
    assert anywhere.admissible(elsewhere).tolist() == [True, True]
    assert anywhere.admissible(torch.tensor([[3, 3], [0, 2]])).tolist() == [False, False]
    assert truth.weights(elsewhere).value[0].isnan().all()


@pytest.mark.parametrize("scoring", ["sigmoid", "sqrtsoftplus"])
def test_the_reference_is_admissible_when_one_expert_scores_nan(scoring):
    """A NaN score ranks last in the reference; the judge has to accept that."""
    config = config_of(6, 2, scoring_func=scoring, n_group=3, topk_group=2, hidden_size=6)
    router_EH = torch.eye(6)
    router_EH[1, 1] = torch.nan
    weights = replace(MoEWeights.random(config, 0), router_EH=router_EH)
    x_TH = torch.randn(16, 6, generator=torch.Generator().manual_seed(3))
    routing = TopKRouter(config, weights)(x_TH)
    assert not (routing.ids_TK == 1).any()
    assert truth_of(config, weights, x_TH).admissible(routing.ids_TK).all()


def test_of_tied_groups_beside_near_ties_the_lower_stays():
    """Groups 0 and 1 tie exactly, 2 and 3 nearly with both: wherever 1 is kept, so is 0."""
    config = config_of(8, 1, n_group=4, topk_group=2, scoring_func="sigmoid")
    near = 1 + 2.0**-23
    logits = [[1.0, 1.0, 1.0, 1.0, near, near, near, near]]
    assert admitted(truth_of_logits(config, logits)) == {(0,), (4,)}
