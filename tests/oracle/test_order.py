"""The judge ranks NaN, infinities and ties as the routers do, and admits nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.oracle.routers import admitted, config_of
from twinmoe.oracle.contract import Ties, storage_contract
from twinmoe.oracle.envelope import Enclosure, Grade
from twinmoe.oracle.routing import RoutingTruth
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.config_checks import GROUP_SCORES, SCORING_FUNCS
from twinmoe.reference.router import TopKRouter
from twinmoe.reference.weights import MoEWeights

NAN, INF = torch.nan, torch.inf

#: Two groups of three: inf - inf among a group's two best, and NaN beside -inf.
GROUPED = (2, 1, 3, "sigmoid", "top2_sum", Ties.LOWEST_ID)


@st.composite
def settings(draw: st.DrawFn) -> tuple[Any, ...]:
    """Draw groups, kept groups, k, both functions and the tie rule, for six experts."""
    n_group = draw(st.sampled_from([1, 2, 3, 6]))
    topk_group = draw(st.integers(1, n_group))
    k = draw(st.integers(1, topk_group * 6 // n_group))
    rules = (st.sampled_from(SCORING_FUNCS), st.sampled_from(GROUP_SCORES), st.sampled_from(Ties))
    return n_group, topk_group, k, *(draw(rule) for rule in rules)


def judged(config: MoEConfig, logits: list[float], bias: list[float], ties: Ties) -> RoutingTruth:
    """Return the truth of one token of these logits, which the router computes without error."""
    return RoutingTruth.of(
        config,
        Enclosure.exact(torch.ones(1, 1)),
        torch.tensor(logits)[:, None],
        torch.tensor(bias),
        replace(storage_contract("any", torch.float32), ties=ties),
        Grade.SHARP,
    )


@example(GROUPED, [0.0] * 6, [INF, -INF, -INF, 0.0, -INF, -INF])
@example(GROUPED, [0.0] * 6, [NAN, NAN, NAN, -INF, 10.0, -INF])
@given(
    settings(),
    st.lists(st.sampled_from((0.0, 2.0, 4.0, NAN, INF, -INF)), min_size=6, max_size=6),
    st.lists(st.sampled_from((0.0, 0.0, 10.0, NAN, INF, -INF)), min_size=6, max_size=6),
)
def test_exactly_the_references_experts_are_admissible(drawn, logits, bias):
    """Whatever the scores; where one overflows, or ties are open, others besides.

    Finite biases double from expert to expert, so that two sums are equal only if they tie.
    """
    n_group, topk_group, k, scoring, group_score, ties = drawn
    groups = {"n_group": n_group, "topk_group": topk_group, "group_score": group_score}
    sizes = {"hidden_size": 1, "use_correction_bias": True}
    config = config_of(6, k, scoring_func=scoring, **groups, **sizes)
    bias = [value * 2.0**expert for expert, value in enumerate(bias)]
    truth = judged(config, logits, bias, ties)
    weights = MoEWeights.random(config, 0)
    weights = replace(weights, correction_bias_E=torch.tensor(bias))
    routing = TopKRouter(config, weights).choose(torch.tensor([logits]))
    assert truth.admissible(routing.ids_TK).all()
    if ties is Ties.LOWEST_ID and INF not in logits and -INF not in logits:
        assert torch.equal(truth.ids_TK, routing.ids_TK)
        assert admitted(truth) == {tuple(sorted(routing.ids_TK[0].tolist()))}
        assert not truth.ambiguous().any()
        assert len(truth.candidates(0, limit=4)) == 1


@pytest.mark.parametrize(
    ("bias", "expected"),
    [([0.0, -INF, -INF, 0.0], (0, 3)), ([-INF, -INF, 0.0, -INF], (2, 3))],
)
def test_a_nan_score_beside_disabled_experts_has_one_place(bias, expected):
    """The expert of router row 3, which is NaN, is taken before those at -inf, of any id."""
    config = config_of(4, 2, hidden_size=1, scoring_func="sigmoid", use_correction_bias=True)
    assert admitted(judged(config, [0.0, 0.0, 0.0, NAN], bias, Ties.LOWEST_ID)) == {expected}


def test_the_best_rival_is_nobody_who_was_chosen():
    """A disabled expert left out is the rival of disabled ones that were taken."""
    config = config_of(4, 3, hidden_size=1, scoring_func="sigmoid", use_correction_bias=True)
    truth = judged(config, [0.0] * 4, [-INF] * 4, Ties.LOWEST_ID)
    assert truth.ids_TK.tolist() == [[0, 1, 2]]
    rival_T = truth.best_rival(truth.ids_TK)
    assert rival_T is not None
    assert rival_T.tolist() == [3]
