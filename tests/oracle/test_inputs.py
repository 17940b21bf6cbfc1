"""From a case to its tensors: the same everywhere, and of the kind that the case names.

Legend: T tokens, H hidden_size, E experts, K experts per token.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle.digests import of_case
from twinmoe.oracle.bits import same_bits
from twinmoe.oracle.case import BIASES, MODES, TRANSPORTS, VALUES, Case
from twinmoe.oracle.inputs import hidden_for, largest_batch, tokens_at, weights_for
from twinmoe.oracle.plan import plan_cells
from twinmoe.oracle.strategies import DTYPES, EP_SIZES, cases
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.placement import Placement
from twinmoe.reference.router import TopKRouter

any_case = st.sampled_from(plan_cells(EP_SIZES, TRANSPORTS, MODES, DTYPES)).flatmap(cases)


def case_of(tokens: tuple[int, ...] = (9, 5), **changes: object) -> Case:
    """Return a case of 12 experts; ``changes`` go to the case or to its config."""
    own = {name: changes.pop(name) for name in list(changes) if name in Case.__dataclass_fields__}
    sizes = {"hidden_size": 96, "moe_intermediate_size": 16, "num_experts": 24}
    config = MoEConfig(**{**sizes, "num_experts_per_tok": 3, "dtype": torch.float32, **changes})
    return Case(config=config, tokens=tokens, **own)


def chosen_experts(case: Case) -> list[tuple[int, ...]]:
    """Return the set of experts that the reference router picks, for each token of all ranks."""
    router = TopKRouter(case.config, weights_for(case))
    ids_TK = torch.cat([router(hidden_for(case, r)).ids_TK for r in range(case.ep_size)])
    return [tuple(sorted(ids)) for ids in ids_TK.tolist()]


# --- the same everywhere ---------------------------------------------------------------------


@given(any_case)
def test_a_case_has_the_same_tensors_twice(case: Case) -> None:
    """Nothing but the case decides: asked again, every tensor is the same, bit for bit."""
    assert of_case(case) == of_case(Case.parse(str(case)))


@given(any_case)
def test_a_ranks_own_weights_are_the_shard_of_all(case: Case) -> None:
    """Drawn for its own experts alone, a rank's weights are those cut from the whole layer."""
    placement = Placement(case.config.num_experts, case.ep_size)
    whole = weights_for(case)
    for rank in range(case.ep_size):
        mine = weights_for(case, placement.experts_of(rank)).tensors()
        cut = whole.shard(placement, rank).tensors()
        assert mine.keys() == cut.keys()
        assert all(same_bits(mine[name], cut[name]) for name in mine)


@given(any_case)
def test_tensors_have_the_shapes_and_dtype_of_the_case(case: Case) -> None:
    """Each rank's batch is [T, H] in the layer's dtype and finite."""
    for rank, tokens in enumerate(case.tokens):
        hidden_TH = hidden_for(case, rank)
        assert hidden_TH.shape == (tokens, case.config.hidden_size)
        assert hidden_TH.dtype == case.config.dtype
        assert hidden_TH.isfinite().all()


# --- mix-ups show ----------------------------------------------------------------------------


@pytest.mark.parametrize("values", VALUES)
def test_ranks_and_batches_and_seeds_differ(values: str) -> None:
    """No two ranks, no two batches of a rank, and no two seeds share their hidden states."""
    case = case_of((4, 4, 4), values=values)
    drawn = [hidden_for(case, rank, step) for rank in range(3) for step in (0, 1)]
    drawn.append(hidden_for(replace(case, seed=1), 0))
    for i, one in enumerate(drawn):
        assert not any(torch.equal(one, other) for other in drawn[:i])


def test_ranks_have_scales_of_their_own() -> None:
    """A later rank's hidden states are larger, so that even a norm tells ranks apart."""
    case = case_of((200, 200, 200))
    scales = [float(hidden_for(case, rank).square().mean().sqrt()) for rank in range(3)]
    assert scales == pytest.approx([1.0, 1.25, 1.5], rel=0.05)


# --- routing kinds ---------------------------------------------------------------------------

#: The router's variants in which scores alone decide; a bias may outvote any score.
SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("values", VALUES)
def test_one_expert_sends_all_tokens_to_the_same_k(values: str, scoring: str) -> None:
    """With routing=one_expert every token of every rank picks the same k experts."""
    for seed, hidden in ((0, 96), (1, 16), (2, 33)):
        case = case_of(
            (9,) * 8, values=values, scoring_func=scoring, routing="one_expert",
            hidden_size=hidden, seed=seed,
        )  # fmt: skip
        assert len(set(chosen_experts(case))) == 1


def test_one_expert_stays_within_the_groups() -> None:
    """With expert groups, the wanted experts lie in groups that can be kept together."""
    case = case_of((9,) * 4, routing="one_expert", n_group=6, topk_group=2)
    assert len(set(chosen_experts(case))) == 1


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("values", VALUES)
def test_one_rank_sends_all_tokens_to_one_rank(values: str, scoring: str) -> None:
    """With routing=one_rank all chosen experts belong to one rank, of which several are used."""
    case = case_of((9,) * 4, values=values, scoring_func=scoring, routing="one_rank")
    chosen = {expert for experts in chosen_experts(case) for expert in experts}
    assert len({expert // 6 for expert in chosen}) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", VALUES)
def test_ties_are_exact_and_in_pairs(values: str, dtype: torch.dtype) -> None:
    """With routing=ties experts 2i and 2i+1 have the same logit, which fp32 holds exactly."""
    case = case_of(values=values, routing="ties", dtype=dtype)
    router_EH = weights_for(case).router_EH
    for rank in range(case.ep_size):
        hidden_TH = hidden_for(case, rank)
        exact_TE = hidden_TH.double() @ router_EH.double().T
        assert torch.equal((hidden_TH.float() @ router_EH.float().T).double(), exact_TE)
        assert torch.equal(exact_TE[:, 0::2], exact_TE[:, 1::2])
        assert len(exact_TE.unique()) > 2


def test_ties_fall_between_chosen_and_left_out() -> None:
    """An odd k cuts through a pair, so that the tie rule, the lowest id, really decides."""
    for experts in chosen_experts(case_of((9, 9), routing="ties")):
        lone = [e for e in experts if (e ^ 1) not in experts]
        assert lone
        assert all(e % 2 == 0 for e in lone)


def test_equal_scores_leave_the_lowest_ids() -> None:
    """With routing=equal every logit is 0, and every token goes to experts 0 to k - 1."""
    case = case_of(routing="equal")
    assert not weights_for(case).router_EH.any()
    assert set(chosen_experts(case)) == {(0, 1, 2)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_near_ties_differ_in_the_last_place_of_one_weight(dtype: torch.dtype) -> None:
    """With routing=near_ties pairs of experts differ, by one unit in the last place or so."""
    router_EH = weights_for(case_of(routing="near_ties", dtype=dtype)).router_EH
    even, odd = router_EH[0::2], router_EH[1::2]
    assert torch.equal(even[:, 1:], odd[:, 1:])
    relative = ((odd[:, 0].double() - even[:, 0].double()) / even[:, 0].double()).abs()
    assert (relative > 0).all()
    assert (relative <= 2 * torch.finfo(dtype).eps).all()


def test_biases_are_what_they_are_called() -> None:
    """Mixed has both signs, negative is below zero throughout, large outweighs any score."""
    kinds = {
        bias: weights_for(case_of(bias=bias, use_correction_bias=True)).correction_bias_E
        for bias in BIASES
    }
    assert kinds["mixed"].min() < 0 < kinds["mixed"].max()
    assert kinds["negative"].max() < -1
    assert kinds["large"].abs().max() > 1


# --- values, layouts, histories --------------------------------------------------------------


@settings(max_examples=10)
@given(any_case)
def test_a_strided_layout_holds_the_same_values(case: Case) -> None:
    """A view with a longer row stride and an odd offset, equal to the plain tensor."""
    for rank in range(case.ep_size):
        plain_TH = hidden_for(replace(case, layout="plain"), rank)
        strided_TH = hidden_for(replace(case, layout="strided"), rank)
        assert torch.equal(plain_TH, strided_TH)
        assert strided_TH.stride(0) > case.config.hidden_size
        assert strided_TH.storage_offset() == 1


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_recorded_values_are_those_of_a_bf16_model(rank: int) -> None:
    """Undo the rank's scale, and every recorded value is a bf16 number, in an fp32 layer too."""
    case = case_of((20,) * 4, values="recorded", hidden_size=384)
    recorded_TH = hidden_for(case, rank) / (1.0 + 0.25 * rank)
    assert torch.equal(recorded_TH.bfloat16().float(), recorded_TH)
    assert recorded_TH.abs().max() > 10 * recorded_TH.abs().median()


def test_value_kinds_are_what_they_are_called() -> None:
    """Positive has no sign, outlier a few loud channels, integers only -2 to 2."""
    positive_TH = hidden_for(case_of((64, 0), values="positive"), 0)
    assert (positive_TH >= 0).all()
    rms_H = hidden_for(case_of((64, 0), values="outlier"), 0).square().mean(dim=0).sqrt()
    assert rms_H.max() > 10 * rms_H.median()
    integers_TH = hidden_for(case_of((64, 0), values="integers"), 0)
    assert integers_TH.unique().tolist() == [-2, -1, 0, 1, 2]


@given(any_case, st.integers(0, 3))
def test_history_keeps_the_bucket_and_moves_the_counts(case: Case, step: int) -> None:
    """Other batches have the judged one's counts on other ranks, every second one halved."""
    case = replace(case, batches=())
    counts = tokens_at(case, step)
    alone = case.ep_size == 1 and case.routing != "alternating"
    if step and (alone or step % 2 == 0):
        assert sorted(counts) == sorted((tokens + 1) // 2 for tokens in case.tokens)
    else:
        assert sorted(counts) == sorted(case.tokens)
    if step == 0:
        assert counts == case.tokens
    for rank, tokens in enumerate(counts):
        assert len(hidden_for(case, rank, step)) == tokens


def test_history_gives_a_rank_another_ranks_count() -> None:
    """One batch ago, each rank had its right neighbour's count."""
    assert tokens_at(case_of((3, 0, 5)), 1) == (0, 5, 3)


def test_a_batch_whose_size_is_given_keeps_the_pattern_of_the_ranks() -> None:
    """The fullest rank has as many tokens as the case says; empty ranks stay empty, in turn."""
    case = replace(case_of((4, 0, 1)), history="f0.f1.f2.f3", batches=(63, 8))
    assert [tokens_at(case, step) for step in range(3)] == [(4, 0, 1), (0, 16, 63), (2, 8, 0)]
    assert tokens_at(case, 3) == tokens_at(replace(case, batches=()), 3)
    assert largest_batch(case) == 63
    assert Case.parse(str(case)) == case
    assert str(case).endswith("history=f0.f1.f2.f3,batches=63/8")


def test_silent_tokens_have_vanishing_scores() -> None:
    """With routing=silent, of three tokens one has ordinary logits, two lie far below 0."""
    case = case_of(tokens=(6,), routing="silent")
    logits_TE = hidden_for(case, 0).float() @ weights_for(case).router_EH.float().T
    assert logits_TE[0::3].abs().max() < 10
    assert (logits_TE[1::3] + 60).abs().max() < 10
    assert (logits_TE[2::3] + 120).abs().max() < 10


def test_one_bias_is_nan() -> None:
    """With bias=nan one expert's correction bias is NaN, and the others are as drawn."""
    plain = weights_for(case_of(use_correction_bias=True)).correction_bias_E
    bias_E = weights_for(case_of(use_correction_bias=True, bias="nan")).correction_bias_E
    assert plain is not None
    assert bias_E is not None
    assert bias_E.isnan().sum() == 1
    assert torch.equal(bias_E[~bias_E.isnan()], plain[~bias_E.isnan()])


@pytest.mark.parametrize("changes", [{}, {"n_group": 4, "topk_group": 2}])
def test_alternating_batches_wake_and_rest_experts(changes: dict[str, int]) -> None:
    """Odd batches visit k experts, even ones more, and some of either are idle in the other."""
    case = case_of((9,), routing="alternating", **changes)
    spread, few, other = (set(_visited(case, batch)) for batch in range(3))
    assert len(few) == 3 < len(spread)
    assert len(other) > 3
    assert spread - few
    assert tokens_at(case, 1) == case.tokens  # one graph and one workspace serve both
    assert set(_visited(replace(case, seed=3), 1)) != few


def _visited(case: Case, batch: int) -> list[int]:
    return (
        TopKRouter(case.config, weights_for(case))(hidden_for(case, 0, batch))
        .ids_TK.unique()
        .tolist()
    )
