"""Contracts say where a path rounds, and the judge finds out who rounds elsewhere.

Legend: T tokens, H hidden_size, K experts per token.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracle.subjects import reference
from tests.reference.inputs import tokens
from twinmoe.oracle import RankObservation, RoundingContract, Truth, Wire, judge, storage_contract
from twinmoe.oracle.contracts import (
    eager_contract,
    graphed_contract,
    on_device,
    own_contracts,
    reference_contract,
)
from twinmoe.oracle.rounding import (
    BF16,
    CPU_BF16,
    FORMATS,
    FP16,
    FP32,
    FP64,
    HOPPER_FP16,
    TENSOR_CORE,
)
from twinmoe.reference.config import MoEConfig, dtype_name
from twinmoe.reference.experts import ACTIVATIONS
from twinmoe.reference.router import TopKRouter
from twinmoe.reference.shared_expert import SharedExpertMLP
from twinmoe.reference.weights import MoEWeights

TIERS = ("p2p", "nvls", "gloo", "nccl")
narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)


def layer(dtype: torch.dtype, seed: int = 0, **changes: Any) -> tuple[MoEConfig, MoEWeights]:
    """Return a layer whose every rounding shows, and its weights."""
    config = MoEConfig(
        **{
            "hidden_size": 96,
            "moe_intermediate_size": 72,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "shared_expert_intermediate_size": 40,
            "dtype": dtype,
            **changes,
        }
    )
    return config, MoEWeights.random(config, seed)


# --- the contracts of record -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", FORMATS, ids=dtype_name)
def test_the_reference_stores_everything_in_the_models_dtype(dtype):
    """Six storage points in the dtype, sums in fp32 (fp64 for fp64), no wire."""
    contract = reference_contract(layer(dtype)[0])
    points = ("weighted_input", "gate_up", "activation", "expert_output", "shared_gate_up")
    assert {getattr(contract, point) for point in points} == {FORMATS[dtype]}
    assert contract.output is FORMATS[dtype]
    assert contract.accumulator is (FP64 if dtype is torch.float64 else FP32)
    assert (contract.partial, contract.reduced, contract.wire) == (None, None, Wire.NONE)


@pytest.mark.parametrize("router_dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_the_router_rounds_in_its_own_dtype(router_dtype):
    """The router's format follows router_dtype, not the model's dtype."""
    config, _ = layer(torch.bfloat16, router_dtype=router_dtype)
    assert reference_contract(config).router is FORMATS[router_dtype]


@narrow
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("wire_dtype", [torch.float32, None], ids=["fp32 wire", "model wire"])
def test_a_tier_stores_shares_in_the_wires_dtype(dtype, tier, wire_dtype):
    """Shares and, but for the p2p kernel, their sum are stored in the payload's dtype."""
    wire_dtype = wire_dtype or dtype
    contract = graphed_contract(layer(dtype)[0], "grouped_mm", tier, wire_dtype)
    assert contract.partial is FORMATS[wire_dtype]
    assert contract.reduced is (None if tier == "p2p" else FORMATS[wire_dtype])
    assert contract.wire is {"p2p": Wire.RANK_ORDER, "nvls": Wire.ANY_ORDER}.get(tier, Wire.PER_HOP)


@narrow
def test_the_fused_backend_keeps_what_it_does_not_store(dtype):
    """triton: gate, up and expert outputs stay in fp32, the activation is stored."""
    contract = eager_contract(layer(dtype)[0], "triton")
    assert (contract.gate_up, contract.expert_output) == (None, None)
    assert contract.activation is FORMATS[dtype]
    assert eager_contract(layer(dtype)[0], "grouped_mm").gate_up is FORMATS[dtype]


def test_an_unknown_backend_has_no_contract():
    """The error names the backend and where to add its contract."""
    with pytest.raises(ValueError, match=r"'magic'.*add one to twinmoe\.oracle\.contracts"):
        eager_contract(layer(torch.bfloat16)[0], "magic")


@narrow
def test_all_own_contracts_have_names_of_their_own(dtype):
    """The table for review shows every path once."""
    names = [contract.name for contract in own_contracts(dtype)]
    assert len(names) == len(set(names))
    assert all(any(tier in name for name in names) for tier in TIERS)


def test_a_contract_can_be_read_as_a_table():
    """One row for each point but the name, in words; no order of a sum that is not stored."""
    contract = graphed_contract(layer(torch.bfloat16)[0], "triton", "nvls", torch.float32)
    rows = dict(contract.rows())
    assert len(rows) == len(fields(RoundingContract)) - 2
    assert dict(replace(contract, combine=BF16).rows())["combine order"] == "expert id"
    assert rows["gate up"] == "kept"
    assert (rows["activation"], rows["partial"], rows["wire"]) == ("bf16", "fp32", "any order")


# --- whoever rounds elsewhere is found out ---------------------------------------------------

WRONG: dict[str, dict[str, Any]] = {
    "gate and up kept": {"gate_up": None},
    "activation kept": {"activation": None},
    "expert output kept": {"expert_output": None},
    "gate, up and expert output kept": {"gate_up": None, "expert_output": None},
    "shared gate and up kept": {"shared_gate_up": None},
    "shared output kept": {"shared_output": None},
    "routed sum stored": {"reduced": "model"},
    "gate and up in the other dtype": {"gate_up": "other"},
    "activation in the other dtype": {"activation": "other"},
    "expert output in the other dtype": {"expert_output": "other"},
}


@narrow
@pytest.mark.parametrize("name", WRONG)
def test_the_reference_under_a_wrong_contract_is_refused(name, dtype):
    """One rounding more, fewer or elsewhere: 64 tokens without a tap are enough, every time."""
    formats = {"model": FORMATS[dtype], "other": FP16 if dtype is torch.bfloat16 else BF16}
    wrong = {point: formats.get(value) for point, value in WRONG[name].items()}
    refused = 0
    for seed in range(3):
        config, weights = layer(dtype, seed, num_experts_per_tok=2 + seed)
        x_TH = tokens(config, 64, seed)
        observed, truth = (
            reference(config, weights, x_TH, tapped=False),
            Truth(config, weights, [x_TH]),
        )
        right = reference_contract(config)
        assert judge([observed], truth, right).equivalent
        refused += not judge([observed], truth, replace(right, **wrong)).equivalent
    assert refused == 3


def fused(config: MoEConfig, weights: MoEWeights, x_TH: Tensor) -> Tensor:
    """Run a layer that keeps gate, up and expert outputs in fp32, as a fused kernel does."""
    routing = TopKRouter(config, weights)(x_TH)
    out_TH = SharedExpertMLP(config, weights)(x_TH)
    for expert, (w13_FH, w2_HI) in enumerate(zip(weights.w13_LFH, weights.w2_LHI, strict=True)):
        token, slot = (routing.ids_TK == expert).nonzero(as_tuple=True)
        gate, up = (x_TH[token].float() @ w13_FH.float().T).chunk(2, dim=1)
        h = (ACTIVATIONS[config.hidden_act](gate) * up).to(config.dtype)
        y = h.float() @ w2_HI.float().T
        out_TH.index_add_(0, token, routing.weights_TK[token, slot][:, None] * y)
    return out_TH.to(config.dtype)


@narrow
def test_a_fused_layer_obeys_its_own_contract_only(dtype):
    """Accepted under triton's contract, refused under the reference's and grouped_mm's."""
    config, weights = layer(dtype)
    x_TH = tokens(config, 64, 4)
    observed, truth = (
        [RankObservation(fused(config, weights, x_TH))],
        Truth(config, weights, [x_TH]),
    )
    verdict = judge(observed, truth, eager_contract(config, "triton"))
    assert verdict.equivalent, str(verdict)
    for contract in (reference_contract(config), eager_contract(config, "grouped_mm")):
        assert not judge(observed, truth, contract).equivalent


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_a_layer_in_another_dtype_is_refused(dtype):
    """The fp32 layer's output, cast to the narrow dtype, is not the narrow layer's output."""
    config, weights = layer(dtype)
    wide = replace(config, dtype=torch.float32)
    wide_weights = replace(
        weights,
        **{
            name: tensor.float()
            for name, tensor in weights.tensors().items()
            if name != "correction_bias_E"
        },
    )
    x_TH = tokens(config, 64, 5)
    output_TH = reference(wide, wide_weights, x_TH.float()).output_TH.to(dtype)
    truth = Truth(config, weights, [x_TH])
    assert not judge([RankObservation(output_TH)], truth, reference_contract(config)).equivalent
    points = ("gate_up", "activation", "expert_output", "shared_gate_up", "shared_output")
    kept = dict.fromkeys(points)
    own = replace(storage_contract("fp32 inside", dtype), **kept)
    verdict = judge([RankObservation(output_TH)], truth, own)
    assert verdict.equivalent, str(verdict)


def test_a_dtype_is_no_format() -> None:
    """Named with the point, and with what to write instead."""
    contract = reference_contract(layer(torch.bfloat16)[0])
    with pytest.raises(TypeError, match=r"logits \(torch.bfloat16\) is a dtype.*FORMATS\["):
        replace(contract, logits=torch.bfloat16)  # type: ignore[arg-type]


def test_fp32_accumulation_is_the_devices_affair() -> None:
    """Hardware that adds otherwise is declared for it; what a layer declares itself stays."""
    plain = storage_contract("mine", torch.bfloat16)
    assert on_device(plain, torch.bfloat16, "cpu").accumulator == CPU_BF16
    assert on_device(plain, torch.float16, "cuda").accumulator == HOPPER_FP16
    assert on_device(plain, torch.float32, "cpu") == plain
    blocked = replace(plain, accumulator=TENSOR_CORE)
    assert on_device(blocked, torch.bfloat16, "cpu") == blocked


def test_the_shared_expert_rounds_as_routed_ones_where_nothing_else_is_said():
    """Its own points take the place of the routed expert's, each by itself."""
    stored = replace(storage_contract("any", torch.bfloat16), gate=BF16, activation=None)
    as_routed = stored.of_shared_expert
    assert (as_routed.gate, as_routed.activation) == (BF16, None)
    own = replace(
        stored,
        shared_gate_up=None,
        shared_activated_gate=None,
        shared_activation=BF16,
        shared_output=FP32,
    ).of_shared_expert
    assert (own.gate_up, own.gate, own.activation, own.expert_output) == (None, None, BF16, FP32)
