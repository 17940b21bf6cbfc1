"""MoE blocks of Hugging Face transformers before our judge: the reference checked inside it.

In fp32 their eager code keeps to the reference's contract: every stored tensor is fp32, and
sums have no promised order.  In bf16 it rounds at points of its own:

=================  ==============================  ==============================
point              Mixtral, Qwen3-MoE              DeepSeek-V3
=================  ==============================  ==============================
logits             stored in bf16                  fp32
routing weights    cast to bf16                    fp32
act(gate)          stored before it meets up       stored before it meets up
weight * output    stored in bf16                  fp32
sum over experts   bf16, in the order of ids       fp32, then stored in bf16
shared expert      none                            added in bf16
=================  ==============================  ==============================

So each has a contract of its own, and is judged under it like any other subject.

Legend: T tokens, H hidden_size, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.oracle.subjects import reference
from tests.reference.hf_blocks import MODELS, hf_block, hf_forward
from tests.reference.inputs import tokens
from twinmoe.oracle import RankObservation, RoundingContract, Taps, Truth, judge, storage_contract
from twinmoe.oracle.contract import Ties
from twinmoe.oracle.contracts import reference_contract
from twinmoe.oracle.rounding import BF16
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights

pytest.importorskip("transformers", reason="judges the MoE blocks of transformers")

TOKENS = 48
SETTINGS = [
    ("mixtral", {}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("deepseek_v3", {}),
    ("deepseek_v3", {"norm_topk_prob": False}),
    ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
]
every_setting = pytest.mark.parametrize(("model", "changes"), SETTINGS)


def hf_routing(model: str, block: nn.Module, x_TH: Tensor) -> tuple[Tensor, Tensor]:
    """Return the experts [T, K] that their block chooses, and the weights that it gives them."""
    with torch.no_grad():
        answer = block.gate(x_TH)
        if model == "deepseek_v3":
            return answer
        scores_TE = torch.softmax(answer, dim=1, dtype=torch.float)
        weights_TK, ids_TK = torch.topk(scores_TE, block.top_k, dim=-1)
        if model == "mixtral" or block.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return ids_TK, weights_TK.to(x_TH.dtype)


def case_of(
    model: str, dtype: torch.dtype, changes: dict[str, object]
) -> tuple[nn.Module, MoEConfig, MoEWeights, Tensor]:
    """Return their block, our layer with the same weights, and tokens."""
    block, config, weights = hf_block(model, dtype, seed=0, **changes)
    return block, config, weights, tokens(config, TOKENS, seed=1)


# --- fp32: the reference's own contract ------------------------------------------------------


@every_setting
def test_in_fp32_their_block_is_inside_our_envelope(model, changes):
    """Ids, weights and outputs of their block are judged equivalent, and so are ours."""
    block, config, weights, x_TH = case_of(model, torch.float32, changes)
    truth, contract = Truth(config, weights, [x_TH]), reference_contract(config)
    theirs = RankObservation(
        hf_forward(block, x_TH), Taps(*hf_routing(model, block, x_TH)), path="transformers"
    )
    for observed in (theirs, replace(theirs, taps=Taps()), reference(config, weights, x_TH)):
        verdict = judge([observed], truth, contract)
        assert verdict.equivalent, str(verdict)
        assert verdict.slots_visible == verdict.slots


@pytest.mark.parametrize("model", MODELS)
def test_in_fp32_a_block_with_gate_and_up_exchanged_is_outside(model):
    """The check above can fail: the same block with one pair of matrices swapped does."""
    block, config, weights, x_TH = case_of(model, torch.float32, {})
    gate, up = ("w1", "w3") if model == "mixtral" else ("gate_proj", "up_proj")
    for expert in block.experts:
        first, second = getattr(expert, gate), getattr(expert, up)
        setattr(expert, gate, second)
        setattr(expert, up, first)
    truth, contract = Truth(config, weights, [x_TH]), reference_contract(config)
    assert not judge([RankObservation(hf_forward(block, x_TH))], truth, contract).equivalent


# --- bf16: contracts of their own ------------------------------------------------------------


def bf16_contract(model: str) -> RoundingContract:
    """Declare the roundings of their eager code; their top-k leaves ties open."""
    stored = storage_contract(f"{model}, eager", torch.bfloat16)
    own = replace(stored, ties=Ties.ANY, gate=BF16)
    if model == "deepseek_v3":
        return replace(own, reduced=BF16)
    return replace(own, logits=BF16, router_weights=BF16, terms=BF16, combine=BF16)


@every_setting
def test_in_bf16_their_block_is_equivalent_under_its_own_contract(model, changes):
    """Experts, weights and outputs within the roundings of their eager code."""
    block, config, weights, x_TH = case_of(model, torch.bfloat16, changes)
    taps = Taps(*hf_routing(model, block, x_TH))
    theirs = RankObservation(hf_forward(block, x_TH), taps, path="transformers")
    verdict = judge([theirs], Truth(config, weights, [x_TH]), bf16_contract(model))
    assert verdict.equivalent, str(verdict)
    assert verdict.slots_visible == verdict.slots


@every_setting
def test_in_bf16_ours_is_inside_its_envelope_on_the_same_weights(model, changes):
    """The reference, judged under its contract around the same layer."""
    _, config, weights, x_TH = case_of(model, torch.bfloat16, changes)
    truth = Truth(config, weights, [x_TH])
    verdict = judge([reference(config, weights, x_TH)], truth, reference_contract(config))
    assert verdict.equivalent, str(verdict)


@pytest.mark.parametrize("model", MODELS)
def test_in_bf16_their_roundings_are_not_ours(model):
    """Their block under the reference's contract, and ours under theirs, are both outside.

    So neither envelope is wide enough to hide a rounding more or less.
    """
    block, config, weights, x_TH = case_of(model, torch.bfloat16, {})
    truth, contract = Truth(config, weights, [x_TH]), reference_contract(config)
    theirs = RankObservation(hf_forward(block, x_TH))
    assert judge([theirs], truth, contract).findings
    ours = reference(config, weights, x_TH, tapped=False)
    assert judge([ours], truth, bf16_contract(model)).findings


#: Not an input's, a shared expert's that there is none of, the output's own, or that of the
#: one sum of Mixtral's two experts, which the output repeats.
UNSEEN = ("weighted_input", "shared_gate_up", "shared_output", "output")
POINTS = [
    (model, point)
    for model in MODELS
    for point, stored in vars(bf16_contract(model)).items()
    if stored is BF16 and point not in UNSEEN and (model, point) != ("mixtral", "combine")
]


@pytest.mark.parametrize(("model", "point"), POINTS)
def test_in_bf16_each_of_their_roundings_is_seen(model, point):
    """Declare one of them as left out, and their block is outside."""
    block, config, weights, x_TH = case_of(model, torch.bfloat16, {})
    contract = replace(bf16_contract(model), **{point: None})
    theirs = RankObservation(hf_forward(block, x_TH), Taps(*hf_routing(model, block, x_TH)))
    assert judge([theirs], Truth(config, weights, [x_TH]), contract).findings
