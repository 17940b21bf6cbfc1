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

Our contracts have no such points, so their truth is carried here by hand, by the same rules,
for the experts that they chose.

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
from twinmoe.oracle import Grade, RankObservation, RoundingContract, Taps, Truth, judge
from twinmoe.oracle.activation import activate
from twinmoe.oracle.comparison import compare
from twinmoe.oracle.contracts import reference_contract
from twinmoe.oracle.envelope import Enclosure, matmul, product, rounded, total
from twinmoe.oracle.rounding import BF16, FP32
from twinmoe.oracle.routing import RoutingTruth
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


# --- bf16: their own roundings, carried by hand ----------------------------------------------


def bf16_matmul(x: Enclosure, weight: Tensor) -> Enclosure:
    """Their nn.Linear: an fp32 accumulator, the result stored in bf16."""
    return rounded(matmul(x, weight.double(), FP32, Grade.SHARP), BF16)


def bf16_mlp(config: MoEConfig, x: Enclosure, w13_FH: Tensor, w2_HI: Tensor) -> Enclosure:
    """One expert, every operation stored in bf16: act(gate) before it meets up."""
    gate_FH, up_FH = w13_FH.chunk(2)
    act = rounded(activate(config.hidden_act, bf16_matmul(x, gate_FH), FP32), BF16)
    return bf16_matmul(rounded(product(act, bf16_matmul(x, up_FH), FP32), BF16), w2_HI)


def routing_truth(model: str, config: MoEConfig, weights: MoEWeights, x_TH: Tensor) -> RoutingTruth:
    """Scores of their router: logits stored in bf16 but for DeepSeek's, everything else fp32.

    Stored logits enter as the hidden states of a router that copies them, with a hair of
    uncertainty: their top-k leaves ties open, where an exact tie goes to the lowest id here.
    """
    contract: RoundingContract = reference_contract(config)
    hidden, router_EH = Enclosure.exact(x_TH), weights.router_EH
    if model != "deepseek_v3":
        stored = bf16_matmul(hidden, router_EH)
        hidden = Enclosure(stored.value, stored.radius + 1e-12)
        router_EH = torch.eye(config.num_experts)
    bias_E = weights.correction_bias_E
    return RoutingTruth.of(config, hidden, router_EH, bias_E, contract, Grade.SHARP)


def bf16_truth(
    model: str, config: MoEConfig, weights: MoEWeights, x_TH: Tensor, ids_TK: Tensor
) -> Enclosure:
    """Enclose their bf16 output, as stored, for the experts that they chose."""
    routing, whole = routing_truth(model, config, weights, x_TH), model == "deepseek_v3"
    term_format = None if whole else BF16
    order_TK = ids_TK.argsort(dim=1)
    ids_TK = ids_TK.gather(1, order_TK)
    weights_TK = rounded(routing.weights(ids_TK), term_format)
    x, out = Enclosure.exact(x_TH), Enclosure.exact(torch.zeros_like(x_TH))
    outputs = [
        bf16_mlp(config, x, *pair) for pair in zip(weights.w13_LFH, weights.w2_LHI, strict=True)
    ]
    y_ETH = Enclosure.stack(outputs)
    for slot in range(config.num_experts_per_tok):
        y = y_ETH[ids_TK[:, slot], torch.arange(len(x_TH))]
        term = rounded(product(weights_TK[:, slot, None], y, FP32), term_format)
        out = rounded(total(Enclosure.stack([out, term]), 0, FP32), term_format)
    if weights.shared_w13_FH is None:
        return out
    shared = bf16_mlp(config, x, weights.shared_w13_FH, weights.shared_w2_HI)
    return rounded(total(Enclosure.stack([rounded(out, BF16), shared]), 0, FP32), BF16)


@every_setting
def test_in_bf16_their_block_is_inside_its_own_envelope(model, changes):
    """Admissible experts, weights and outputs within the roundings of their eager code."""
    block, config, weights, x_TH = case_of(model, torch.bfloat16, changes)
    ids_TK, weights_TK = hf_routing(model, block, x_TH)
    routing = routing_truth(model, config, weights, x_TH)
    assert routing.admissible(ids_TK).all()
    weight_format = None if model == "deepseek_v3" else BF16
    assert not compare(weights_TK, rounded(routing.weights(ids_TK), weight_format)).outside.any()
    result = compare(hf_forward(block, x_TH), bf16_truth(model, config, weights, x_TH, ids_TK))
    assert not result.outside.any(), f"{int(result.outside.sum())}, {result.worst_ratio:.3g}x"


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
    assert not judge([theirs], truth, contract).equivalent
    ours = reference(config, weights, x_TH)
    assert ours.taps.ids_TK is not None
    result = compare(ours.output_TH, bf16_truth(model, config, weights, x_TH, ours.taps.ids_TK))
    assert result.outside.double().mean() > 0.1
