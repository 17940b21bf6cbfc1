"""The router: selection, groups, ties, NaN and weights.

Logits are set exactly: the hidden size equals the number of experts, and token t is routed by the
identity, so that its logits are its features.
"""

import pytest
import torch

from tests.reference.inputs import fp64_config
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.router import Routing, TopKRouter
from twinmoe.reference.weights import MoEWeights


def route(logits: list[float], bias: list[float] | None = None, **settings: object) -> Routing:
    """Route one token that has exactly these logits."""
    size = len(logits)
    config = fp64_config(
        hidden_size=size,
        moe_intermediate_size=1,
        num_experts=size,
        use_correction_bias=bias is not None,
        **settings,
    )
    return TopKRouter(config, _identity_router(config, bias))(
        torch.tensor([logits], dtype=torch.float64)
    )


def _identity_router(config: MoEConfig, bias: list[float] | None) -> MoEWeights:
    weights = MoEWeights.random(config, 0)
    weights.router_EH.copy_(torch.eye(config.num_experts, dtype=torch.float64))
    if weights.correction_bias_E is not None:
        weights.correction_bias_E.copy_(torch.tensor(bias))
    return weights


def test_softmax_normalised_equals_softmax_over_the_chosen():
    """Mixtral's rule: the weights are the softmax of the chosen logits."""
    routing = route([0.0, 3.0, 1.0, 2.0], num_experts_per_tok=2)
    assert routing.ids_TK.tolist() == [[1, 3]]
    expected = torch.tensor([[3.0, 2.0]], dtype=torch.float64).softmax(dim=1)
    torch.testing.assert_close(routing.weights_TK, expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("scoring_func", "score"),
    [
        ("softmax", lambda z: z.exp() / z.exp().sum()),
        ("sigmoid", lambda z: 1 / (1 + (-z).exp())),
        ("sqrtsoftplus", lambda z: (1 + z.exp()).log().sqrt()),
    ],
)
def test_unnormalised_weights_are_the_scores(scoring_func, score):
    """Without normalisation the weights are the scores themselves, times the factor once."""
    logits = [0.5, -1.0, 30.0, 2.0]
    routing = route(
        logits,
        scoring_func=scoring_func,
        num_experts_per_tok=3,
        norm_topk_prob=False,
        routed_scaling_factor=2.5,
    )
    expected = 2.5 * score(torch.tensor(logits, dtype=torch.float64))[[2, 3, 0]]
    assert routing.ids_TK.tolist() == [[2, 3, 0]]
    torch.testing.assert_close(routing.weights_TK[0], expected, rtol=1e-13, atol=0)


def test_the_bias_selects_but_does_not_weigh():
    """A large bias brings an expert in; its weight stays its plain score."""
    routing = route(
        [2.0, 1.0, 0.0, -1.0],
        bias=[0.0, 0.0, 0.0, 4.0],
        scoring_func="sigmoid",
        num_experts_per_tok=2,
        norm_topk_prob=False,
    )
    assert routing.ids_TK.tolist() == [[3, 0]]
    expected = torch.tensor([-1.0, 2.0], dtype=torch.float64).sigmoid()
    torch.testing.assert_close(routing.weights_TK[0], expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_exact_ties_go_to_the_lowest_ids(scoring_func):
    """Among equal scores the lowest expert ids win, at any position and any width."""
    routing = route([1.0] * 64, scoring_func=scoring_func, num_experts_per_tok=5)
    assert routing.ids_TK.tolist() == [[0, 1, 2, 3, 4]]
    routing = route([0.0, 2.0, 1.0, 2.0, 1.0, 1.0], num_experts_per_tok=4)
    assert routing.ids_TK.tolist() == [[1, 3, 2, 4]]


def test_tied_groups_go_to_the_lowest_group():
    """Groups of equal score are kept from the left, and so are their experts."""
    routing = route([1.0] * 8, num_experts_per_tok=2, n_group=4, topk_group=2)
    assert routing.ids_TK.tolist() == [[0, 1]]
    routing = route([0.0] * 2 + [1.0] * 6, num_experts_per_tok=4, n_group=4, topk_group=2)
    assert routing.ids_TK.tolist() == [[2, 3, 4, 5]]


def test_groups_are_ranked_by_their_two_best_or_their_best():
    """A group of two good experts beats one with a single excellent expert, unless max counts."""
    logits = [2.0, 2.0, 3.0, -9.0]
    chosen = {
        rule: route(
            logits,
            scoring_func="sigmoid",
            num_experts_per_tok=1,
            n_group=2,
            topk_group=1,
            group_score=rule,
        ).ids_TK.item()
        for rule in ("top2_sum", "max")
    }
    assert chosen == {"top2_sum": 0, "max": 2}


def test_groups_of_one_expert_are_ranked_by_it():
    """The sum of the two best of a single expert is that expert's score."""
    routing = route([0.0, 3.0, 1.0, 2.0], num_experts_per_tok=2, n_group=4, topk_group=2)
    assert routing.ids_TK.tolist() == [[1, 3]]


def test_experts_outside_the_kept_groups_are_out_of_reach():
    """Masked experts stand at -inf: not even all-negative biased scores let them back in."""
    routing = route(
        [0.0] * 8,
        bias=[-9.0, -9.0, -2.0, -3.0, -9.0, -9.0, -9.0, -9.0],
        scoring_func="sigmoid",
        num_experts_per_tok=2,
        n_group=4,
        topk_group=1,
    )
    assert routing.ids_TK.tolist() == [[2, 3]]


def test_a_nan_score_loses_against_every_other():
    """An expert whose bias is NaN is chosen only when nobody else is left, and ids are distinct."""
    bias = [0.0, float("nan"), -50.0, 0.1]
    some = route([0.0] * 4, bias=bias, scoring_func="sigmoid", num_experts_per_tok=3)
    assert some.ids_TK.tolist() == [[3, 0, 2]]
    everyone = route([0.0] * 4, bias=bias, scoring_func="sigmoid", num_experts_per_tok=4)
    assert everyone.ids_TK.tolist() == [[3, 0, 2, 1]]


def test_a_bias_that_disables_experts_opens_no_other_group():
    """Where a kept group has fewer live experts than k, its dead ones fill up, lowest id first."""
    bias = [0.0, 0.0, 0.0, 0.0, 9.0, -float("inf"), -float("inf"), -float("inf")]
    settings = {"scoring_func": "sigmoid", "n_group": 2, "topk_group": 1, "group_score": "max"}
    routing = route([0.0] * 8, bias, num_experts_per_tok=3, **settings)
    assert routing.ids_TK.tolist() == [[4, 5, 6]]


def test_a_nan_token_is_routed_like_a_tie():
    """All scores NaN: the lowest ids are taken within the groups, and the weights are NaN."""
    routing = route([float("nan")] * 8, num_experts_per_tok=3, n_group=4, topk_group=2)
    assert routing.ids_TK.tolist() == [[0, 1, 2]]
    assert routing.weights_TK.isnan().all()


@pytest.mark.parametrize("k", [1, 6])
def test_one_expert_and_all_experts(k):
    """With k = 1 the normalised weight is 1; with k = E every expert is chosen once."""
    routing = route([3.0, 1.0, 5.0, 0.0, 2.0, 4.0], num_experts_per_tok=k)
    assert routing.ids_TK.tolist() == [[2, 5, 0, 4, 1, 3][:k]]
    assert routing.weights_TK.sum().item() == pytest.approx(1.0, rel=1e-15)


def test_a_zero_factor_is_legal():
    """routed_scaling_factor 0.0 zeroes the weights and leaves the selection alone."""
    routing = route([1.0, 2.0], num_experts_per_tok=1, routed_scaling_factor=0.0)
    assert routing.ids_TK.tolist() == [[1]]
    assert routing.weights_TK.tolist() == [[0.0]]


def test_weights_come_in_the_router_dtype():
    """A bf16 layer is routed in fp32, or in fp64 where asked, ids in int64."""
    for router_dtype in (torch.float32, torch.float64):
        config = MoEConfig(
            hidden_size=4,
            moe_intermediate_size=4,
            num_experts=4,
            num_experts_per_tok=2,
            router_dtype=router_dtype,
        )
        router = TopKRouter(config, MoEWeights.random(config, 0))
        routing = router(torch.ones(3, 4, dtype=torch.bfloat16))
        assert routing.weights_TK.dtype == router_dtype
        assert routing.ids_TK.dtype == torch.int64
