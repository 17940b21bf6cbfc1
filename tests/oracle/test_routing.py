"""What a correct router may answer: against the reference, and against brute force.

Legend: T tokens, H hidden_size, E experts, G groups, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from tests.reference.inputs import fp64_configs, tokens
from twinmoe.oracle.comparison import compare
from twinmoe.oracle.contract import storage_contract
from twinmoe.oracle.envelope import Enclosure, Grade
from twinmoe.oracle.rounding import FP32
from twinmoe.oracle.routing import RoutingTruth
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.router import TopKRouter
from twinmoe.reference.weights import MoEWeights

seeds = st.integers(0, 2**32)


def config_of(experts: int, k: int, **settings: object) -> MoEConfig:
    """Return a small fp32 layer; only its routing matters."""
    sizes = {"hidden_size": 4, "moe_intermediate_size": 1, "dtype": torch.float32}
    return MoEConfig(
        **(sizes | {"num_experts": experts, "num_experts_per_tok": k} | settings)  # type: ignore[arg-type]
    )


def truth_of(config: MoEConfig, weights: MoEWeights, x_TH: Tensor) -> RoutingTruth:
    """Return the routing truth of exact inputs in the arithmetic of ``config``."""
    return RoutingTruth.of(
        config,
        Enclosure.exact(x_TH),
        weights.router_EH,
        weights.correction_bias_E,
        storage_contract("any", config.dtype, config.router_dtype),
        Grade.SHARP,
    )


def truth_of_logits(config: MoEConfig, logits_TE: Sequence[Sequence[float]]) -> RoutingTruth:
    """Return the routing truth of given logits, which the router computes without error."""
    config = replace(config, hidden_size=config.num_experts)
    weights = MoEWeights.random(config, 0)
    identity = replace(weights, router_EH=torch.eye(config.num_experts), correction_bias_E=None)
    return truth_of(config, identity, torch.tensor(logits_TE, dtype=torch.float32))


def truth_of_scores(config: MoEConfig, value_E: Tensor, radius_E: Tensor) -> RoutingTruth:
    """Return the truth of one token whose scores are known to lie in given intervals."""
    scores = Enclosure(value_E[None].double(), radius_E[None].double())
    inexact = Enclosure(scores.value, torch.ones_like(scores.value))
    bias_E = torch.zeros(config.num_experts, dtype=torch.float64)
    ids_1K = TopKRouter(config, MoEWeights.random(config, 0)).select(scores.value)
    return RoutingTruth(config, inexact, scores, scores, bias_E, ids_1K, FP32)


# --- brute force: every score on a grid inside its interval, every way to break a tie --------


def reachable(config: MoEConfig, value_E: Tensor, radius_E: Tensor) -> set[tuple[int, ...]]:
    """Return every set that some scores inside the intervals can lead to."""
    steps = [
        [float(v)] if not r else (float(v) + float(r) * torch.linspace(-1, 1, 5)).tolist()
        for v, r in zip(value_E, radius_E, strict=True)
    ]
    scores_NE = torch.tensor(list(product(*steps)), dtype=torch.float64)
    size = config.num_experts // config.n_group
    best = 2 if config.group_score == "top2_sum" and size > 1 else 1
    grouped_NGE = scores_NE.view(-1, config.n_group, size)
    group_NG = grouped_NGE.sort(dim=2, descending=True).values[..., :best].sum(dim=2)
    found = set()
    for kept in combinations(range(config.n_group), config.topk_group):
        rows_NE = scores_NE[_may_win(group_NG, kept)]
        open_to = [e for e in range(config.num_experts) if e // size in kept]
        for chosen in combinations(open_to, config.num_experts_per_tok):
            own = [open_to.index(e) for e in chosen]
            if _may_win(rows_NE[:, open_to], own).any():
                found.add(chosen)
    return found


def _may_win(values_NM: Tensor, chosen: Sequence[int]) -> Tensor:
    """Rows in which no other column exceeds a chosen one."""
    rest = [m for m in range(values_NM.shape[1]) if m not in chosen]
    weakest = values_NM[:, list(chosen)].amin(dim=1)
    return (values_NM[:, rest] <= weakest[:, None]).all(dim=1)


def admitted(truth: RoutingTruth) -> set[tuple[int, ...]]:
    """Return every set of k experts that the judge would accept for the first token."""
    config = truth.config
    return {
        chosen
        for chosen in combinations(range(config.num_experts), config.num_experts_per_tok)
        if truth.admissible(torch.tensor([chosen]).expand(len(truth.ids_TK), -1))[0]
    }


@st.composite
def uncertain_scores(draw: st.DrawFn, grouped: bool) -> tuple[MoEConfig, Tensor, Tensor]:
    """Draw a small config and integer scores of six experts, at most five of them uncertain."""
    n_group = draw(st.sampled_from([2, 3])) if grouped else 1
    topk_group = draw(st.integers(1, n_group))
    k = draw(st.integers(1, min(5, topk_group * 6 // n_group)))
    score = draw(st.sampled_from(["max", "top2_sum"]))
    config = config_of(6, k, n_group=n_group, topk_group=topk_group, group_score=score)
    value_E = torch.tensor([draw(st.integers(1, 9)) for _ in range(6)])
    radius_E = torch.tensor([draw(st.sampled_from([0, 0, 1, 2])) for _ in range(5)] + [0])
    return config, value_E, radius_E


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
def test_a_nan_token_may_go_anywhere_once(scoring):
    """Nothing ranks a token of NaN: any distinct experts do, and its neighbours are unaffected."""
    nan = torch.nan
    config = config_of(4, 2, scoring_func=scoring)
    truth = truth_of_logits(config, [[nan, nan, nan, nan], [4, 3, 2, 1]])
    assert truth.admissible(torch.tensor([[3, 1], [0, 1]])).tolist() == [True, True]
    assert truth.admissible(torch.tensor([[3, 3], [0, 2]])).tolist() == [False, False]
    assert truth.weights(torch.tensor([[3, 1], [0, 1]])).value[0].isnan().all()


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


# --- selection and weights against the reference ---------------------------------------------


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
