"""The judgement as a whole: acquittals, subjects that show little, samples, shapes.

Legend: T tokens, H hidden_size, K experts per token.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.oracle.subjects import (
    COUNTS,
    Graphed,
    graphed,
    layer,
    on_rank,
    reference,
    verdict_of,
)
from tests.reference.inputs import tokens
from twinmoe.oracle import RankObservation, Truth, judge
from twinmoe.oracle.contract import Ties
from twinmoe.oracle.contracts import graphed_contract, reference_contract
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.mark.parametrize("tapped", [True, False], ids=["tapped", "untapped"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_correct_graphed_layer_is_equivalent(dtype, tapped):
    """Four ranks, one of them empty, NaN in the padding rows: no finding, every slot visible."""
    subject, truth, contract = graphed(dtype=dtype)
    verdict = judge(subject.observe(tapped), truth, contract)
    assert verdict.equivalent, str(verdict)
    assert verdict.culprit is None
    assert verdict.worst_ratio <= 1
    assert verdict.elements == sum(COUNTS) * 64
    assert verdict.slots == verdict.slots_visible == sum(COUNTS) * 3
    assert str(verdict).startswith("equivalent under ")


@pytest.mark.parametrize("tapped", [True, False], ids=["tapped", "untapped"])
def test_an_empty_batch_is_equivalent(tapped):
    """No tokens on any rank: nothing is wrong, and nothing divides by zero."""
    config, weights = layer()
    hidden = [tokens(config, 0, 0)] * 2
    contract = graphed_contract(config, "grouped_mm", "p2p", torch.float32)
    observed = Graphed(config, weights, hidden).observe(tapped)
    verdict = judge(observed, Truth(config, weights, hidden), contract)
    assert verdict.equivalent, str(verdict)
    assert (verdict.tokens, verdict.elements, verdict.flips) == (0, 0, 0)


def test_what_lies_in_padding_rows_is_not_judged():
    """Only the valid rows of the gathered tensors and of the shares count."""

    def poison(_rank: int, padded: Tensor) -> Tensor:
        rows = len(padded) // len(COUNTS)
        for rank, count in enumerate(COUNTS):
            padded[rank * rows + count : (rank + 1) * rows] = 77.0
        return padded

    assert verdict_of({"partial": poison}).equivalent
    assert verdict_of({"gathered_hidden": poison}).equivalent


def test_nan_and_infinite_tokens_are_the_layers_business():
    """A token of NaN and one that overflows are judged by class, the others as ever."""
    config, weights = layer(torch.float16)
    x_TH = tokens(config, 32, 1)
    x_TH[3], x_TH[7] = torch.nan, 60000.0
    truth, contract = Truth(config, weights, [x_TH]), reference_contract(config)
    observed = reference(config, weights, x_TH)
    assert observed.output_TH[3].isnan().all()
    verdict = judge([observed], truth, contract)
    assert verdict.equivalent, str(verdict)
    clean = observed.output_TH.nan_to_num()
    assert not judge([replace(observed, output_TH=clean)], truth, contract).equivalent


def test_nan_in_a_valid_row_is_refused():
    """One NaN element where the truth is finite is enough."""
    verdict = verdict_of(
        {"output": on_rank(2, lambda out: out.index_fill(0, torch.tensor(5), torch.nan))}
    )
    assert (verdict.culprit.stage, verdict.culprit.rank, verdict.culprit.token) == ("output", 2, 5)
    assert verdict.culprit.ratio == torch.inf


# --- subjects without ids --------------------------------------------------------------------


def near_tied(tied: int, total: int) -> tuple[MoEConfig, MoEWeights, Tensor]:
    """Return a layer in fp32, and tokens of which ``tied`` cannot tell eight experts apart."""
    config, weights = layer(torch.float32, num_experts_per_tok=4)
    router_EH = weights.router_EH[:1].repeat(8, 1)
    router_EH[:, 0] = torch.arange(8) / 4
    x_TH = tokens(config, total, 9)
    x_TH[:, 0] = 4.0
    x_TH[:tied, 0] = 2.0**-40
    return config, replace(weights, router_EH=router_EH), x_TH


def reversed_ids(config: MoEConfig, weights: MoEWeights, x_TH: Tensor) -> RankObservation:
    """Run the reference with ties broken towards the highest id, and show its output alone."""
    mirrored = replace(
        weights,
        router_EH=weights.router_EH.flip(0),
        w13_LFH=weights.w13_LFH.flip(0),
        w2_LHI=weights.w2_LHI.flip(0),
    )
    return reference(config, mirrored, x_TH, tapped=False)


@pytest.mark.parametrize("turned", [False, True])
def test_a_near_tied_token_without_ids_raises_no_alarm(turned):
    """Whichever of the 70 admissible answers a layer chose, its output is no finding."""
    config, weights, x_TH = near_tied(1, 64)
    subject = reversed_ids if turned else lambda *layer: reference(*layer, tapped=False)
    verdict = judge(
        [subject(config, weights, x_TH)], Truth(config, weights, [x_TH]), reference_contract(config)
    )
    assert verdict.ambiguous == 1
    assert not verdict.findings, str(verdict)


def test_too_many_near_ties_without_ids_are_inconclusive():
    """Above 5 % of near-tied tokens the case proves nothing; with ids it does."""
    config, weights, x_TH = near_tied(8, 64)
    truth, contract = Truth(config, weights, [x_TH]), reference_contract(config)
    without = judge([reference(config, weights, x_TH, tapped=False)], truth, contract)
    assert (without.ambiguous, without.conclusive, without.equivalent) == (8, False, False)
    tapped = judge([reference(config, weights, x_TH)], truth, contract)
    assert tapped.conclusive
    assert tapped.equivalent, str(tapped)


# --- sampling, loosening, shapes -------------------------------------------------------------


def test_a_sample_judges_so_many_tokens():
    """Fewer tokens, the same verdict on a correct layer; the seed decides which."""
    subject, truth, contract = graphed()
    verdict = judge(subject.observe(), truth, contract, sample=10, seed=1)
    assert verdict.equivalent, str(verdict)
    assert (verdict.tokens, verdict.slots) == (10, 30)
    everyone = judge(subject.observe(), truth, contract, sample=1000)
    assert everyone.tokens == sum(COUNTS)


def test_a_sample_names_a_token_by_its_own_rank_and_row():
    """A fault of every row of rank 3 is reported there."""
    faults = {"output": on_rank(3, lambda out: out * 2)}
    subject, truth, contract = graphed(faults)
    culprit = judge(subject.observe(), truth, contract, sample=40).culprit
    assert culprit.rank == 3
    assert 0 <= culprit.token < COUNTS[3]


def test_loosened_radii_let_a_fault_pass():
    """The ratio of a finding says how much looser the radii would have to be to miss it."""
    faults = {"output": on_rank(2, lambda out: out + ((torch.arange(64) == 17) / 2).to(out.dtype))}
    subject, truth, contract = graphed(faults)
    observed = subject.observe(tapped=False)
    ratio = judge(observed, truth, contract).culprit.ratio
    assert judge(observed, truth, contract, loosen=ratio / 2).culprit.stage == "output"
    assert judge(observed, truth, contract, loosen=ratio * 1.01).culprit is None


def test_a_missing_rank_is_a_mistake_of_the_caller():
    """ValueError says both numbers."""
    subject, truth, contract = graphed()
    with pytest.raises(ValueError, match="3 observations for 4 ranks"):
        judge(subject.observe()[:3], truth, contract)


def test_a_nan_token_neither_flips_nor_lets_others_flip():
    """What is expected of the other tokens' roundings is what it was without it."""
    config, weights = layer()
    x_TH = tokens(config, 8, 0)
    contract = reference_contract(config)
    figures = []
    for poisoned in (False, True):
        x_TH = x_TH.clone()
        if poisoned:
            x_TH[3] = torch.nan
        verdict = judge(
            [reference(config, weights, x_TH)], Truth(config, weights, [x_TH]), contract
        )
        assert verdict.equivalent, str(verdict)
        figures.append((verdict.flips, verdict.expected_flips))
    (plain_flips, plain_expected), (flips, expected) = figures
    assert flips <= plain_flips
    assert expected <= plain_expected


@pytest.mark.parametrize("answer", [torch.nan, 1.0])
def test_a_nan_token_without_ids_is_decided(answer):
    """Ties are open and no ids are shown, yet whoever computes it, its answer is NaN."""
    config, weights = layer()
    x_TH = tokens(config, 8, 0)
    x_TH[3] = torch.nan
    contract = replace(reference_contract(config), ties=Ties.ANY)
    seen = reference(config, weights, x_TH, tapped=False)
    seen.output_TH[3] = answer
    verdict = judge([seen], Truth(config, weights, [x_TH]), contract)
    assert (verdict.conclusive, verdict.ambiguous) == (True, 0)
    assert verdict.equivalent == (answer != 1.0)
