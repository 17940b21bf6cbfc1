"""Changes of layers and batches: exact where they say so, undone by what undoes them."""

import pytest
import torch

from twinmoe.oracle.case import Case
from twinmoe.oracle.inputs import hidden_for, weights_for
from twinmoe.oracle.relations import changes
from twinmoe.oracle.scenario import Change, Scenario
from twinmoe.reference.dense import dense_moe

CASE = Case.parse(
    "T=4/0/3,H=32,I=16,E=6,k=2,n_group=3,topk_group=2,scoring_func=sigmoid,use_correction_bias=1,"
    "rsf=2.5,shared=8,dtype=fp64,router_dtype=fp64,seed=3"
)
UNCHANGED = Scenario(CASE)


def answer(scenario: Scenario) -> torch.Tensor:
    """Return the layer's output [T, H] for all ranks' tokens, by the dense formulation."""
    return dense_moe(scenario.config, scenario.weights(), torch.cat(scenario.hidden()))


def test_a_scenario_without_change_is_the_case() -> None:
    """Weights, batches and settings are the case's own; a version has other weights."""
    assert torch.equal(UNCHANGED.weights().w13_LFH, weights_for(CASE).w13_LFH)
    for rank, hidden_TH in enumerate(UNCHANGED.hidden()):
        assert torch.equal(hidden_TH, hidden_for(CASE, rank))
    again = Scenario(CASE, version=1).weights()
    assert not torch.equal(again.w13_LFH, weights_for(CASE).w13_LFH)


def test_permuted_tokens_are_the_same_tokens_and_come_back() -> None:
    """Every rank keeps its count; undoing restores the order, also across ranks."""
    change = changes.PermutedTokens(seed=5)
    permuted = change.hidden(UNCHANGED.hidden())
    assert [len(hidden) for hidden in permuted] == [4, 0, 3]
    rows_TH = torch.cat(UNCHANGED.hidden())
    assert not torch.equal(torch.cat(permuted), rows_TH)
    assert torch.equal(change.undo(torch.cat(permuted)), rows_TH)


@pytest.mark.parametrize(
    "change",
    [changes.RelabelledExperts(seed=2), changes.ShiftedBias(4.0), changes.Alone()],
    ids=lambda change: type(change).__name__,
)
def test_some_changes_leave_every_answer(change: Change) -> None:
    """In fp64 the answers agree to rounding, groups and bias included."""
    changed = Scenario(CASE, change=change)
    torch.testing.assert_close(answer(changed), answer(UNCHANGED), rtol=1e-12, atol=1e-12)


def test_relabelled_experts_are_other_experts_by_number() -> None:
    """The change is real: weights move."""
    changed = Scenario(CASE, change=changes.RelabelledExperts(seed=2))
    assert not torch.equal(changed.weights().w13_LFH, UNCHANGED.weights().w13_LFH)


def test_scaling_scales_the_routed_part_alone() -> None:
    """Halving w2 or the factor halves what the experts add, and not the shared expert."""
    silent = answer(Scenario(CASE, change=changes.SilencedExperts()))
    routed = answer(UNCHANGED) - silent
    for change in (changes.ScaledDown(0.5), changes.ScaledRouting(0.5)):
        halved = answer(Scenario(CASE, change=change)) - silent
        torch.testing.assert_close(halved, routed / 2, rtol=1e-12, atol=1e-12)
    assert silent.abs().sum() > 0


def test_halves_and_one_rank_keep_all_rows() -> None:
    """Cut batches join to the whole; one rank's batch holds everybody's rows in order."""
    rows_TH = torch.cat(UNCHANGED.hidden())
    halves = [changes.Half(second=second).hidden(UNCHANGED.hidden()) for second in (False, True)]
    joined = [torch.cat(pair) for pair in zip(*halves, strict=True)]
    assert torch.equal(torch.cat(joined), rows_TH)
    moved = changes.OnOneRank().hidden(UNCHANGED.hidden())
    assert [len(hidden) for hidden in moved] == [0, 0, 7]
    assert torch.equal(moved[-1], rows_TH)


def test_a_changed_layer_is_shared_out_like_any_other() -> None:
    """A rank's experts are its rows of the whole."""
    scenario = Scenario(CASE, change=changes.RelabelledExperts(seed=2))
    mine = scenario.weights(range(2, 4))
    assert mine.experts == range(2, 4)
    assert torch.equal(mine.w13_LFH, scenario.weights().w13_LFH[2:4])


def test_tracers_answer_their_own_numbers() -> None:
    """Expert e adds e + 1 to channel e and 1 to the next, weighted, and nothing else."""
    line = "T=5,H=32,I=16,E=6,k=2,dtype=fp32,hidden_act=relu,seed=3"
    scenario = Scenario(Case.parse(line), change=changes.Tracers())
    weights, hidden_TH = scenario.weights(), torch.cat(scenario.hidden())
    up_TEF = torch.einsum("th,efh->tef", hidden_TH, weights.w13_LFH)
    assert up_TEF.sum(dim=2).eq(2).all()  # one lane of gate and one of up
    for expert in range(6):
        column = weights.w2_LHI[expert, :, 0]
        assert column[expert] == expert + 1
        assert column[expert + 1] == 1
        assert column.sum() == expert + 2
