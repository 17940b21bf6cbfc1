"""MoE blocks of Hugging Face transformers before our judge: the reference checked inside it.

In fp32 their code keeps to the reference's contract: every stored tensor is fp32, and sums have
no promised order.  In bf16 it rounds at points of its own, in release 4.57:

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

Release 5 (read at 5.17 and 5.23) has one loop over experts for all three, which stores weight *
output in bf16 and sums in bf16, and Mixtral's routing weights stay in fp32.  Its ``grouped_mm``,
the default of a whole model, and ``batched_mm`` sum in fp32 instead, and keep weight * output in
the dtype of the routing weights.

So each has a contract of its own, and is judged under it like any other subject.

Legend: T tokens, H hidden_size, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.oracle.subjects import reference
from tests.reference.hf_blocks import MODELS, hf_block, hf_forward, hf_routing
from tests.reference.inputs import tokens
from twinmoe.oracle import RankObservation, RoundingContract, Taps, Truth, judge, storage_contract
from twinmoe.oracle.contract import Ties
from twinmoe.oracle.contracts import reference_contract
from twinmoe.oracle.rounding import BF16
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights

transformers = pytest.importorskip("transformers", reason="judges the MoE blocks of transformers")

RELEASE_5 = not transformers.__version__.startswith("4.")
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
    exchange(model, block.experts)
    truth, contract = Truth(config, weights, [x_TH]), reference_contract(config)
    assert not judge([RankObservation(hf_forward(block, x_TH))], truth, contract).equivalent


def exchange(model: str, experts: Any) -> None:
    """Take gate for up in every expert."""
    if RELEASE_5:
        experts.gate_up_proj.data = torch.cat(experts.gate_up_proj.chunk(2, dim=1)[::-1], dim=1)
        return
    gate, up = ("w1", "w3") if model == "mixtral" else ("gate_proj", "up_proj")
    for expert in experts:
        first, second = getattr(expert, gate), getattr(expert, up)
        setattr(expert, gate, second)
        setattr(expert, up, first)


# --- bf16: contracts of their own ------------------------------------------------------------

#: What each block stores in its dtype, beside what all of them do.
_WEIGHTED = ("logits", "router_weights", "terms", "combine")
EAGER_4 = {"mixtral": _WEIGHTED, "qwen3_moe": _WEIGHTED, "deepseek_v3": ("reduced",)}
EAGER_5 = {
    "mixtral": ("logits", "terms", "combine"),
    "qwen3_moe": _WEIGHTED,
    "deepseek_v3": ("terms", "combine"),
}
GROUPED_5 = {
    "mixtral": ("logits",),
    "qwen3_moe": ("logits", "router_weights", "terms"),
    "deepseek_v3": ("reduced",),
}
#: By the implementations of experts that a release has, of which the first is a block's default.
POINTS = {"eager": EAGER_5, "grouped_mm": GROUPED_5, "batched_mm": GROUPED_5}
if not RELEASE_5:
    POINTS = {"eager": EAGER_4}
every_implementation = pytest.mark.parametrize("experts", POINTS)


def bf16_contract(model: str, experts: str) -> RoundingContract:
    """Declare the roundings of their code; their top-k leaves ties open."""
    stored = storage_contract(f"{model}, {experts}", torch.bfloat16)
    points = dict.fromkeys(POINTS[experts][model], BF16)
    return replace(stored, ties=Ties.ANY, gate=BF16, **points)


@every_implementation
@every_setting
def test_in_bf16_their_block_is_equivalent_under_its_own_contract(model, changes, experts):
    """Experts, weights and outputs within the roundings of their code."""
    settings = changes | {"experts_implementation": experts}
    block, config, weights, x_TH = case_of(model, torch.bfloat16, settings)
    taps = Taps(*hf_routing(model, block, x_TH))
    theirs = RankObservation(hf_forward(block, x_TH), taps, path="transformers")
    verdict = judge([theirs], Truth(config, weights, [x_TH]), bf16_contract(model, experts))
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
    assert judge([ours], truth, bf16_contract(model, "eager")).findings


#: Not an input's, a shared expert's that there is none of, the output's own, or that of the
#: one sum of Mixtral's two experts, which the output repeats.
UNSEEN = ("weighted_input", "shared_gate_up", "shared_output", "output")
SEEN = [
    (model, experts, point)
    for model in MODELS
    for experts in POINTS
    for point, stored in vars(bf16_contract(model, experts)).items()
    if stored is BF16 and point not in UNSEEN and (model, point) != ("mixtral", "combine")
]


@pytest.mark.parametrize(("model", "experts", "point"), SEEN)
def test_in_bf16_each_of_their_roundings_is_seen(model, experts, point):
    """Declare one of them as left out, and their block is outside."""
    settings = {"experts_implementation": experts}
    block, config, weights, x_TH = case_of(model, torch.bfloat16, settings)
    contract = replace(bf16_contract(model, experts), **{point: None})
    theirs = RankObservation(hf_forward(block, x_TH), Taps(*hf_routing(model, block, x_TH)))
    assert judge([theirs], Truth(config, weights, [x_TH]), contract).findings
