"""One total order of experts, whatever their scores: reference, fused kernel and dense agree.

Legend: T tokens, E experts, K experts per token.
"""

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.optimized.test_router import configs, make
from twinmoe.optimized.router import InferenceTopKRouter, RouterTiles
from twinmoe.reference.dense import dense_choice
from twinmoe.reference.router import TopKRouter

pytestmark = pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")

NAN, INF = torch.nan, torch.inf

#: Logits and biases full of ties; the lowest fp32 number is what many routers mask by.
LOGITS = (0.0, 0.0, 1.0, 2.0, NAN, INF, -INF)
BIASES = (0.0, 0.0, 1.0, -1.0, NAN, INF, -INF, torch.finfo(torch.float32).min)

#: Two groups of three: inf - inf among a group's two best, and NaN beside -inf.
GROUPED: dict[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "n_group": 2,
    "topk_group": 1,
    "group_score": "top2_sum",
    "scoring_func": "sigmoid",
}


@example(GROUPED, [INF, -INF, -INF, 0.0, -INF, -INF], 0)
@example(GROUPED, [NAN, NAN, NAN, -INF, 0.0, -INF], 0)
@given(configs(), st.lists(st.sampled_from(BIASES), min_size=42, max_size=42), st.integers(0, 999))
def test_every_path_ranks_any_scores_alike(settings, biases, seed):
    """NaN, infinities, masks and ties, in any places: the same experts, best first."""
    config, weights = make(hidden_size=1, **(settings | {"use_correction_bias": True}))
    assert weights.correction_bias_E is not None
    weights.correction_bias_E.copy_(torch.tensor(biases[: config.num_experts]))
    generator = torch.Generator().manual_seed(seed)
    drawn_TE = torch.randint(len(LOGITS), (64, config.num_experts), generator=generator)
    logits_TE = torch.tensor(LOGITS)[drawn_TE]
    reference = TopKRouter(config, weights).choose(logits_TE)
    ids_TK = torch.empty(64, config.num_experts_per_tok, dtype=torch.int32)
    weights_TK = torch.empty(64, config.num_experts_per_tok)
    tiles = RouterTiles.choose(64, config.num_experts, 1)
    fused = InferenceTopKRouter(config, weights)
    fused._select(logits_TE[None].contiguous(), None, ids_TK, weights_TK, tiles)
    assert torch.equal(ids_TK.long(), reference.ids_TK)
    torch.testing.assert_close(
        weights_TK, reference.weights_TK, rtol=2**-18, atol=1e-37, equal_nan=True
    )
    dense_TE, chosen_TE = dense_choice(config, weights, logits_TE)
    assert torch.equal(torch.zeros_like(chosen_TE).scatter(1, reference.ids_TK, True), chosen_TE)
    torch.testing.assert_close(
        dense_TE.gather(1, reference.ids_TK),
        reference.weights_TK,
        rtol=2**-18,
        atol=1e-37,
        equal_nan=True,
    )


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        ([0.0, -INF, -INF, 0.0], [0, 3]),
        ([-INF, -INF, -INF, 0.0], [3, 0]),
        ([0.0, INF, 1.0, NAN], [1, 2]),
        ([-INF, NAN, -INF, 0.0], [1, 3]),
    ],
)
def test_a_nan_score_ranks_above_a_disabled_expert_and_below_every_number(bias, expected):
    """Router row 3 is NaN: its expert is taken before those at -inf, after all others."""
    settings = {"num_experts": 4, "num_experts_per_tok": 2, "scoring_func": "sigmoid"}
    config, weights = make(hidden_size=4, dtype=torch.float32, use_correction_bias=True, **settings)
    weights.router_EH.copy_(torch.eye(4))
    weights.router_EH[3] = NAN
    assert weights.correction_bias_E is not None
    weights.correction_bias_E.copy_(torch.tensor(bias))
    x_TH = torch.zeros(2, 4)
    for router in (TopKRouter(config, weights), InferenceTopKRouter(config, weights)):
        assert router(x_TH).ids_TK.tolist() == [expected] * 2
