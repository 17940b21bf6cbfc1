"""The inference router: same selection and weights as the reference, in two launches.

Where a test needs exact logits, hidden_size equals num_experts and the router is the
identity, so that a token's logits are its features.

Legend: T tokens, H hidden_size, E experts, K experts per token.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from twinmoe.optimized import launch
from twinmoe.optimized.router import InferenceTopKRouter, Routing
from twinmoe.reference.config import ConfigError, MoEConfig
from twinmoe.reference.config_checks import GROUP_SCORES, SCORING_FUNCS
from twinmoe.reference.router import TopKRouter
from twinmoe.reference.weights import MoEWeights

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def make(seed: int = 0, **settings: Any) -> tuple[MoEConfig, MoEWeights]:
    """Return a config and its random weights."""
    defaults: dict[str, Any] = {"hidden_size": 32, "moe_intermediate_size": 1}
    config = MoEConfig(**(defaults | settings))
    return config, MoEWeights.random(config, seed)


def make_identity(num_experts: int, **settings: Any) -> tuple[MoEConfig, MoEWeights]:
    """Return an fp32 layer whose logits are its input, with a bias of zeros if it has one."""
    config, weights = make(
        hidden_size=num_experts, num_experts=num_experts, dtype=torch.float32, **settings
    )
    weights.router_EH.copy_(torch.eye(num_experts))
    if weights.correction_bias_E is not None:
        weights.correction_bias_E.zero_()
    return config, weights


def randn(*shape: int, seed: int) -> Tensor:
    """Draw seeded standard normal values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same_weights(config: MoEConfig, ours: Tensor, reference: Tensor) -> None:
    """Both sides may err by a few roundings per score, one per summand, a few to finish.

    Softmax sums E terms, the normalisation K; all terms are positive, so relative errors
    only add up.  Logits are equal on both sides.
    """
    roundings = 2 * (16 + config.num_experts_per_tok + config.num_experts)
    torch.testing.assert_close(ours, reference, rtol=roundings * 2.0**-24, atol=0.0)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Draw every router option, group counts and sizes that are no powers of two included."""
    n_group = draw(st.integers(1, 6))
    members = draw(st.integers(1, 7))
    topk_group = draw(st.integers(1, n_group))
    return {
        "num_experts": n_group * members,
        "num_experts_per_tok": draw(st.integers(1, topk_group * members)),
        "n_group": n_group,
        "topk_group": topk_group,
        "group_score": draw(st.sampled_from(GROUP_SCORES)),
        "scoring_func": draw(st.sampled_from(SCORING_FUNCS)),
        "norm_topk_prob": draw(st.booleans()),
        "use_correction_bias": draw(st.booleans()),
        "routed_scaling_factor": draw(st.sampled_from((0.0, 1.0, 2.5))),
    }


@given(configs(), st.integers(0, 9), st.integers(0, 2**20))
def test_ids_equal_the_reference_on_exact_logits_full_of_ties(settings, num_tokens, seed):
    """With integer logits both routers see the same scores, so ids agree, ties included."""
    config, weights = make_identity(**settings)
    generator = torch.Generator().manual_seed(seed)
    # Positive: sigmoid(-z) + sigmoid(z) is 1 for every z, a tie that rounding would decide.
    x_TH = torch.randint(1, 8, (num_tokens, config.num_experts), generator=generator).float()
    if weights.correction_bias_E is not None:
        # Negative too: where every kept expert is below 0, a mask of zeros would show.
        bias_E = torch.randint(-3, 2, (config.num_experts,), generator=generator)
        weights.correction_bias_E.copy_(bias_E)
    ours = InferenceTopKRouter(config, weights)(x_TH)
    reference = TopKRouter(config, weights)(x_TH)
    assert ours.ids_TK.dtype == torch.int32
    assert torch.equal(ours.ids_TK.long(), reference.ids_TK)
    assert_same_weights(config, ours.weights_TK, reference.weights_TK)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "settings",
    [
        {"num_experts": 8, "num_experts_per_tok": 2},
        {"num_experts": 160, "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3},
        {"num_experts": 60, "num_experts_per_tok": 4, "scoring_func": "sigmoid"},
    ],
    ids=["mixtral", "deepseek-v2", "plain-60"],
)
def test_random_tokens_are_routed_as_by_the_reference(dtype, settings):
    """Real-valued logits: same ids wherever no near tie leaves the choice to rounding."""
    config, weights = make(hidden_size=200, dtype=dtype, **settings)
    x_TH = randn(24, 200, seed=1).to(dtype)
    ours = InferenceTopKRouter(config, weights)(x_TH)
    reference = TopKRouter(config, weights)(x_TH)
    logits_TE = x_TH.double() @ weights.router_EH.double().T
    ranked_TE = logits_TE.sort(dim=1, descending=True).values
    clear_T = (ranked_TE[:, :-1] - ranked_TE[:, 1:]).amin(dim=1) > 1e-4
    assert clear_T.sum() >= 4
    assert torch.equal(ours.ids_TK[clear_T].long(), reference.ids_TK[clear_T])
    # Logits differ by their summation; a softmax moves by at most twice that.
    weights_error = (ours.weights_TK[clear_T] / reference.weights_TK[clear_T] - 1).abs().max()
    mass_TE = x_TH.double().abs() @ weights.router_EH.double().abs().T
    assert weights_error <= 4 * 200 * 2.0**-24 * mass_TE.max() + 1e-5


def test_exact_ties_go_to_the_lowest_expert_and_the_lowest_group():
    """An all-equal row takes experts 0, 1 of groups 0, 1."""
    settings = {"num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "scoring_func": "sigmoid"}
    config, weights = make_identity(8, **settings)
    routing = InferenceTopKRouter(config, weights)(torch.ones(3, 8))
    assert routing.ids_TK.tolist() == [[0, 1, 2, 3]] * 3


def test_bias_moves_the_selection_but_not_the_weights():
    """The biased expert is chosen, and weighs what its unbiased score says."""
    settings = {"num_experts_per_tok": 1, "scoring_func": "sigmoid", "norm_topk_prob": False}
    config, weights = make_identity(4, use_correction_bias=True, **settings)
    assert weights.correction_bias_E is not None
    weights.correction_bias_E.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0]))
    routing = InferenceTopKRouter(config, weights)(torch.tensor([[3.0, 1.0, 0.0, 2.0]]))
    assert routing.ids_TK.tolist() == [[2]]
    assert routing.weights_TK.tolist() == [[0.5]]


def test_refused_groups_stay_refused_even_against_minus_infinity():
    """Experts of a kept group win over refused ones whatever their bias."""
    settings = {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "group_score": "max"}
    config, weights = make_identity(4, use_correction_bias=True, **settings)
    assert weights.correction_bias_E is not None
    weights.correction_bias_E.copy_(torch.tensor([-1.0, -1.0, 5.0, -torch.inf]))
    routing = InferenceTopKRouter(config, weights)(torch.zeros(1, 4))
    assert routing.ids_TK.tolist() == [[2, 3]]


@pytest.mark.parametrize("scoring_func", SCORING_FUNCS)
def test_nan_row_yields_distinct_ids_and_nan_weights_and_touches_no_other_row(scoring_func):
    """A NaN token keeps K different experts and spoils nobody else."""
    settings = {"num_experts_per_tok": 4, "n_group": 3, "topk_group": 2}
    config, weights = make(num_experts=12, scoring_func=scoring_func, **settings)
    router = InferenceTopKRouter(config, weights)
    x_TH = randn(5, 32, seed=2).bfloat16()
    clean = router(x_TH)
    x_TH[3] = torch.nan
    poisoned = router(x_TH)
    assert poisoned.ids_TK[3].tolist() == [0, 1, 2, 3]
    assert poisoned.weights_TK[3].isnan().all()
    others = [0, 1, 2, 4]
    assert torch.equal(poisoned.ids_TK[others], clean.ids_TK[others])
    assert torch.equal(poisoned.weights_TK[others], clean.weights_TK[others])


def test_expert_with_a_nan_score_is_chosen_last():
    """One expert's NaN score ranks below every real one."""
    config, weights = make_identity(4, num_experts_per_tok=4, scoring_func="sigmoid")
    weights.router_EH[1] = torch.nan
    x_TH = torch.tensor([[-80.0, 5.0, 1.0, 2.0]])
    assert InferenceTopKRouter(config, weights)(x_TH).ids_TK.tolist() == [[3, 2, 0, 1]]


@pytest.mark.parametrize("scoring_func", SCORING_FUNCS)
def test_extreme_logits_neither_overflow_nor_lose_the_small_scores(scoring_func):
    """Scores stay finite and accurate out to logits of +-90."""
    settings = {"scoring_func": scoring_func, "norm_topk_prob": False}
    config, weights = make_identity(5, num_experts_per_tok=5, **settings)
    x_TH = torch.tensor([[90.0, 30.0, 0.0, -30.0, -80.0], [-90.0, -20.0, -1e-3, 1e-3, 89.0]])
    ours = InferenceTopKRouter(config, weights)(x_TH)
    reference = TopKRouter(config, weights)(x_TH)
    assert torch.equal(ours.ids_TK.long(), reference.ids_TK)
    # The reference's own softplus and exp lose a few bits more than ours far from zero.
    torch.testing.assert_close(ours.weights_TK, reference.weights_TK, rtol=1e-5, atol=1e-38)


@pytest.mark.parametrize("count_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("num_valid", [0, 1, 6, 7])
def test_padding_rows_are_marked_and_never_looked_at(num_valid, count_dtype):
    """Rows from num_valid on get id -1 and weight 0, whatever they hold."""
    config, weights = make(num_experts=6, num_experts_per_tok=3, use_correction_bias=True)
    router = InferenceTopKRouter(config, weights)
    x_TH = randn(7, 32, seed=3).bfloat16()
    expected = router(x_TH)
    x_TH[num_valid:] = torch.nan
    routing = router(x_TH, torch.tensor(num_valid, dtype=count_dtype))
    assert torch.equal(routing.ids_TK[:num_valid], expected.ids_TK[:num_valid])
    assert torch.equal(routing.weights_TK[:num_valid], expected.weights_TK[:num_valid])
    assert (routing.ids_TK[num_valid:] == -1).all()
    assert (routing.weights_TK[num_valid:] == 0).all()


def test_a_row_is_routed_alike_in_any_batch():
    """Neither the batch's size nor a row's place in it changes one bit of its routing.

    Logits are exact here: the interpreter leaves their sums to a library, which adds up a row in
    an order that depends on the rows around it.
    """
    config, weights = make_identity(16, num_experts_per_tok=4)
    router = InferenceTopKRouter(config, weights)
    x_TH = randn(140, 16, seed=4)
    whole = router(x_TH)
    for row in range(140):
        alone = router(x_TH[row : row + 1])
        assert torch.equal(whole.ids_TK[row : row + 1], alone.ids_TK)
        assert torch.equal(whole.weights_TK[row : row + 1], alone.weights_TK)


def test_no_tokens_no_launch():
    """An empty batch yields an empty routing without starting a kernel."""
    config, weights = make(num_experts=6, num_experts_per_tok=3)
    _, launched = _route_counting(config, weights, torch.empty(0, 32, dtype=config.dtype))
    assert launched == {}


def test_routing_takes_two_launches():
    """Logits and selection: the counters see one launch of each."""
    config, weights = make(num_experts=6, num_experts_per_tok=3)
    _, launched = _route_counting(config, weights, randn(3, 32, seed=5).bfloat16())
    assert launched == {"router_logits": 1, "router_select": 1}


def test_other_router_dtypes_are_refused():
    """The inference router scores in fp32 and says so."""
    config, weights = make(num_experts=4, num_experts_per_tok=1, router_dtype=torch.float64)
    with pytest.raises(ConfigError, match=r"router_dtype \(torch.float64\) must be torch.float32"):
        InferenceTopKRouter(config, weights)


def _route_counting(
    config: MoEConfig, weights: MoEWeights, x_TH: Tensor
) -> tuple[Routing, Counter[str]]:
    before = launch.COUNTS.copy()
    routing = InferenceTopKRouter(config, weights)(x_TH)
    return routing, launch.COUNTS - before


@pytest.mark.parametrize("depth", [-20.0, -60.0, -120.0])
def test_scores_that_vanish_are_normalised_as_the_references(depth):
    """The epsilon beside their sum is 1e-20: it drowns the sigmoid of -60, and keeps 0 / 0 away."""
    config, weights = make(num_experts=6, num_experts_per_tok=3, scoring_func="sigmoid")
    weights.router_EH.zero_()
    weights.router_EH[:, 0] = depth
    x_TH = torch.zeros(4, config.hidden_size, dtype=config.dtype)
    x_TH[:, 0] = 1
    expected = TopKRouter(config, weights)(x_TH)
    found = InferenceTopKRouter(config, weights)(x_TH, None)
    torch.testing.assert_close(found.weights_TK, expected.weights_TK, rtol=1e-5, atol=0)
