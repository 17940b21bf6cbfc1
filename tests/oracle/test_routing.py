"""Selection and weights against the reference; ambiguity; answers for subjects without ids.

Legend: T tokens, H hidden_size, E experts, G groups, K experts per token.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from tests.oracle.routers import (
    admitted,
    config_of,
    reachable,
    truth_of,
    truth_of_logits,
    truth_of_scores,
    uncertain_scores,
)
from tests.reference.inputs import fp64_configs, tokens
from twinmoe.oracle.comparison import compare
from twinmoe.oracle.routing import RoutingTruth
from twinmoe.reference.router import TopKRouter
from twinmoe.reference.weights import MoEWeights

seeds = st.integers(0, 2**32)


@given(config=fp64_configs(), seed=seeds)
def test_the_exact_selection_is_the_references_in_fp64(config, seed):
    """Same experts, best first, for every config, wherever scores do not tie nearly."""
    weights, x_TH = MoEWeights.random(config, seed), tokens(config, 16, seed)
    truth = truth_of(config, weights, x_TH)
    routing = TopKRouter(config, weights)(x_TH)
    assert truth.admissible(routing.ids_TK).all()
    clear = ~truth.ambiguous()
    assert torch.equal(truth.ids_TK[clear], routing.ids_TK[clear])
    if config.hidden_size > 2 and config.num_experts > 1:
        assert clear.double().mean() > 0.5 or config.n_group > 1


@pytest.mark.parametrize("router_dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@example(
    config=config_of(8, 1, scoring_func="sigmoid", hidden_size=9), seed=0, scale=100.0, factor=0.1
)
@given(
    config=fp64_configs(),
    seed=seeds,
    scale=st.sampled_from([1.0, 0.01, 30.0, 100.0]),
    factor=st.sampled_from([None, 0.1, 1.3, -2.0]),
)
def test_the_references_weights_are_inside(router_dtype, config, seed, scale, factor):
    """Any scoring, normalised or not, any factor, one expert or many, scores that underflow."""
    factor = config.routed_scaling_factor if factor is None else factor
    config = replace(
        config, dtype=torch.float32, router_dtype=router_dtype, routed_scaling_factor=factor
    )
    weights, x_TH = MoEWeights.random(config, seed), tokens(config, 16, seed) * scale
    truth = truth_of(config, weights, x_TH)
    routing = TopKRouter(config, weights)(x_TH)
    assert truth.admissible(routing.ids_TK).all()
    result = compare(routing.weights_TK, truth.weights(routing.ids_TK))
    assert not result.outside.any(), float(result.worst_ratio)


def test_a_factor_of_zero_leaves_exact_zeros():
    """0 times any weight is 0, with nothing allowed beside it."""
    config = config_of(8, 3, routed_scaling_factor=0.0)
    weights = MoEWeights.random(config, 0)
    truth = truth_of(config, weights, tokens(config, 8, 0))
    enclosure = truth.weights(truth.ids_TK)
    assert (enclosure.value == 0).all()
    assert (enclosure.radius == 0).all()


def test_padding_has_weight_zero():
    """Id -1 stands for no expert: its weight is exactly 0."""
    truth = truth_of_logits(config_of(4, 2), [[1, 2, 3, 4]])
    enclosure = truth.weights(torch.tensor([[-1, -1]]))
    assert enclosure.value.tolist() == enclosure.radius.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_weights_cast_to_the_models_dtype_are_outside(dtype):
    """The envelope of fp32 weights is far narrower than a bf16 or fp16 cast."""
    config = config_of(16, 4, hidden_size=32)
    weights, x_TH = MoEWeights.random(config, 1), tokens(config, 64, 2)
    routing = TopKRouter(config, weights)(x_TH)
    allowed = truth_of(config, weights, x_TH).weights(routing.ids_TK)
    assert compare(routing.weights_TK.to(dtype), allowed).outside.double().mean() > 0.7


# --- ambiguity -------------------------------------------------------------------------------


@given(drawn=uncertain_scores(grouped=False))
def test_without_groups_ambiguous_means_several_admissible_sets(drawn):
    """A token is ambiguous exactly when brute force finds more than one answer."""
    config, value_E, radius_E = drawn
    truth = truth_of_scores(config, value_E, radius_E)
    assert bool(truth.ambiguous()[0]) is (len(reachable(config, value_E, radius_E)) > 1)


@given(drawn=uncertain_scores(grouped=True))
def test_with_groups_a_token_with_several_answers_is_ambiguous(drawn):
    """No token that correct routers may send to different experts counts as certain."""
    config, value_E, radius_E = drawn
    truth = truth_of_scores(config, value_E, radius_E)
    assert truth.ambiguous()[0] or len(reachable(config, value_E, radius_E)) == 1


def test_an_expert_of_a_dropped_group_does_not_make_a_token_ambiguous():
    """A high score in a group that is certainly dropped competes with nobody."""
    config = config_of(4, 1, n_group=2, topk_group=1)
    value_E = torch.tensor([60, 50, 90, 0])
    truth = truth_of_scores(config, value_E, torch.tensor([1, 1, 1, 1]))
    assert admitted(truth) == {(0,)}
    assert not truth.ambiguous().any()


def test_saturated_scores_are_ambiguous():
    """Exact logits of 20 and 30 are both 1 under an fp32 sigmoid: either expert may come first."""
    config = config_of(2, 1, scoring_func="sigmoid")
    truth = truth_of_logits(config, [[20, 30]])
    assert admitted(truth) == {(0,), (1,)}
    assert truth.ambiguous().all()


def test_exact_ties_are_not_ambiguous():
    """The tie rule leaves one answer."""
    truth = truth_of_logits(config_of(4, 2), [[2, 2, 2, 2], [1, 2, 3, 1]])
    assert not truth.ambiguous().any()


# --- candidates for subjects without ids -----------------------------------------------------


@given(drawn=uncertain_scores(grouped=False))
def test_the_candidates_are_the_admissible_sets(drawn):
    """The exact selection first, then every other admissible set, each once."""
    config, value_E, radius_E = drawn
    truth = truth_of_scores(config, value_E, radius_E)
    found = [tuple(sorted(ids.tolist())) for ids in truth.candidates(0, limit=100)]
    assert found[0] == tuple(sorted(truth.ids_TK[0].tolist()))
    assert len(found) == len(set(found))
    assert set(found) == admitted(truth)


@given(drawn=uncertain_scores(grouped=True))
def test_with_groups_no_answer_within_reach_is_missing_from_the_candidates(drawn):
    """Another group may bring experts of lower scores than the exact selection's."""
    config, value_E, radius_E = drawn
    truth = truth_of_scores(config, value_E, radius_E)
    found = {tuple(sorted(ids.tolist())) for ids in truth.candidates(0, limit=100)}
    assert reachable(config, value_E, radius_E) <= found


def test_candidates_are_limited():
    """No more answers than asked for, however many experts tie nearly."""
    config = config_of(6, 3)
    truth = truth_of_scores(config, torch.full((6,), 5), torch.ones(6))
    assert len(truth.candidates(0, limit=7)) == 7


def test_candidates_are_found_without_trying_every_set(monkeypatch):
    """Eight near-tied groups of eight, one of them kept whole: 8 answers among 4 billion sets."""
    config = config_of(64, 8, n_group=8, topk_group=1)
    truth = truth_of_scores(config, torch.full((64,), 5), torch.ones(64))
    asked = []

    def counted(self: RoutingTruth, ids_TK: Tensor) -> Tensor:
        asked.append(len(ids_TK))
        if len(asked) > 1000:
            pytest.fail("asked about more than 1000 sets")
        return admissible(self, ids_TK)

    admissible = RoutingTruth.admissible
    monkeypatch.setattr(RoutingTruth, "admissible", counted)
    found = {tuple(ids.tolist()) for ids in truth.candidates(0, limit=16)}
    assert found == {tuple(range(8 * group, 8 * group + 8)) for group in range(8)}
