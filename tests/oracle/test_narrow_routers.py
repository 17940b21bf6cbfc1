"""Routers that never leave the model's dtype: scores, their sum and quotients stored in 16 bits.

Legend: T tokens, H hidden_size, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.oracle.routers import admitted
from tests.reference.inputs import tokens
from twinmoe.oracle.comparison import compare
from twinmoe.oracle.contract import RoundingContract, Ties, storage_contract
from twinmoe.oracle.envelope import Enclosure, Grade, rounded
from twinmoe.oracle.rounding import FORMATS, FP32
from twinmoe.oracle.routing import RoutingTruth
from twinmoe.oracle.spread import Spread
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights

NARROW = [torch.bfloat16, torch.float16]


def config_of(dtype: torch.dtype, **settings: object) -> MoEConfig:
    """A layer of which only the router matters."""
    sizes = {"hidden_size": 32, "moe_intermediate_size": 8, "num_experts": 8}
    return MoEConfig(**(sizes | {"num_experts_per_tok": 3} | settings), dtype=dtype)  # type: ignore[arg-type]


def narrow(config: MoEConfig) -> RoundingContract:
    """What such a router stores."""
    model = FORMATS[config.dtype]
    return replace(
        storage_contract("narrow", config.dtype),
        ties=Ties.ANY,
        logits=model,
        scores=model,
        score_sum=model,
        normalised_weights=model,
        router_weights=model,
    )


def routed(config: MoEConfig, weights: MoEWeights, x_TH: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and weights [T, K] as plain torch in the model's dtype has them."""
    logits_TE = x_TH @ weights.router_EH.T
    scores_TE = logits_TE.softmax(-1) if config.scoring_func == "softmax" else logits_TE.sigmoid()
    top_TK, ids_TK = scores_TE.topk(config.num_experts_per_tok)
    if config.norm_topk_prob:
        top_TK = top_TK / top_TK.sum(dim=-1, keepdim=True)
    return ids_TK, top_TK * config.routed_scaling_factor


def truth_of(
    config: MoEConfig,
    weights: MoEWeights,
    x_TH: Tensor,
    contract: RoundingContract,
    carry: type[Enclosure] = Enclosure,
) -> RoutingTruth:
    """What a router of ``contract`` may answer."""
    router_EH = weights.router_EH
    return RoutingTruth.of(config, carry.exact(x_TH), router_EH, None, contract, Grade.SHARP)


@pytest.mark.parametrize("dtype", NARROW, ids=["bf16", "fp16"])
@given(
    seed=st.integers(0, 2**32),
    scoring=st.sampled_from(["softmax", "sigmoid"]),
    normalised=st.booleans(),
    factor=st.sampled_from([1.0, 2.5]),
    scale=st.sampled_from([0.01, 1.0, 5.0]),
)
def test_plain_torch_in_16_bits_is_inside(dtype, seed, scoring, normalised, factor, scale):
    """Every choice is admissible, and every weight inside, near-tied scores and all."""
    settings = {"norm_topk_prob": normalised, "routed_scaling_factor": factor}
    config = config_of(dtype, scoring_func=scoring, **settings)
    weights, x_TH = MoEWeights.random(config, seed), tokens(config, 16, seed) * scale
    ids_TK, weights_TK = routed(config, weights, x_TH)
    contract = narrow(config)
    truth = truth_of(config, weights, x_TH, contract)
    assert truth.admissible(ids_TK).all()
    allowed = rounded(truth.weights(ids_TK), contract.router_weights)
    assert not compare(weights_TK, allowed).outside.any()


@pytest.mark.parametrize("kept", ["scores", "score_sum", "normalised_weights"])
def test_each_point_is_seen(kept: str) -> None:
    """A contract that keeps one of the stored numbers leaves some weights outside."""
    config = config_of(torch.bfloat16, routed_scaling_factor=2.3)
    weights, x_TH = MoEWeights.random(config, 0), tokens(config, 64, 0)
    ids_TK, weights_TK = routed(config, weights, x_TH)
    contract = replace(narrow(config), **{kept: None})
    truth = truth_of(config, weights, x_TH, contract)
    allowed = rounded(truth.weights(ids_TK), contract.router_weights)
    assert compare(weights_TK, allowed).outside.any()


def test_stored_scores_that_are_equal_tie_exactly() -> None:
    """Scores that rounding makes equal go by the tie rule, whatever they were before."""
    sizes = {"num_experts_per_tok": 1, "num_experts": 2, "hidden_size": 2}
    config = config_of(torch.bfloat16, scoring_func="sigmoid", **sizes)
    weights = replace(MoEWeights.random(config, 0), router_EH=torch.eye(2).bfloat16())
    x_TH = torch.tensor([[6.0, 6.03125]]).bfloat16()
    kept = storage_contract("kept", config.dtype)
    assert admitted(truth_of(config, weights, x_TH, kept)) == {(1,)}
    lowest = replace(narrow(config), ties=Ties.LOWEST_ID)
    assert admitted(truth_of(config, weights, x_TH, lowest)) == {(0,)}
    assert admitted(truth_of(config, weights, x_TH, narrow(config))) == {(0,), (1,)}


def test_expected_errors_are_smaller_than_allowed_ones() -> None:
    """Around a Spread, what storing is expected to add is less than what it may add."""
    config = config_of(torch.bfloat16)
    weights, x_TH = MoEWeights.random(config, 0), tokens(config, 64, 0)
    allowed, expected = (
        truth_of(config, weights, x_TH, narrow(config), carry) for carry in (Enclosure, Spread)
    )
    ids_TK = allowed.ids_TK
    may, will = (truth.weights(ids_TK).radius.mean() for truth in (allowed, expected))
    assert 0 < will < may
    assert allowed.fmt == expected.fmt == FP32
