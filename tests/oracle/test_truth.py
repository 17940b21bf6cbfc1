"""The truth around the reference: every layer that we can describe is inside its envelope.

Legend: T tokens, H hidden_size, K experts per token.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle.subjects import reference
from tests.reference.inputs import tokens
from twinmoe.oracle import Grade, RankObservation, Truth, Wire, judge
from twinmoe.oracle.case import Case
from twinmoe.oracle.comparison import compare
from twinmoe.oracle.contract import Order
from twinmoe.oracle.contracts import graphed_contract, reference_contract
from twinmoe.oracle.envelope import Enclosure
from twinmoe.oracle.inputs import hidden_for, weights_for
from twinmoe.oracle.rounding import BF16
from twinmoe.oracle.strategies import DTYPES, EP_SIZES, Cell, cases
from twinmoe.oracle.truth import across_ranks, over_slots
from twinmoe.reference.config import MoEConfig, dtype_name
from twinmoe.reference.weights import MoEWeights

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)

#: A layer takes tens of milliseconds to judge: half of the profile's examples.
fewer = settings(max_examples=max(10, settings().max_examples // 2))


@st.composite
def single_rank_cases(draw: st.DrawFn, ep_size: int, dtype: torch.dtype) -> Case:
    """Draw a case of the config space of ``ep_size`` ranks, near ties included, on one rank."""
    case = draw(cases(Cell(ep_size, "alltoall", "eager", dtype)))
    routing = draw(st.sampled_from([case.routing, case.routing, "equal", "near_ties"]))
    return replace(case, tokens=(min(sum(case.tokens), 24),), routing=routing)


@pytest.mark.parametrize("tapped", [True, False], ids=["tapped", "untapped"])
@by_dtype
@pytest.mark.parametrize("ep_size", EP_SIZES)
@fewer
@given(data=st.data())
def test_the_reference_raises_no_alarm_over_the_config_space(ep_size, dtype, tapped, data):
    """Every setting, kind of input and routing; conclusive wherever ids and weights are shown."""
    case = data.draw(single_rank_cases(ep_size, dtype))
    weights, x_TH = weights_for(case), hidden_for(case, 0)
    truth, contract = Truth(case.config, weights, [x_TH]), reference_contract(case.config)
    verdict = judge([reference(case.config, weights, x_TH, tapped)], truth, contract)
    assert not verdict.findings, f"{case}\n{verdict}"
    assert verdict.conclusive or not tapped
    assert verdict.worst_ratio <= 1 or not tapped


def layer(dtype: torch.dtype = torch.bfloat16, **changes: object) -> tuple[MoEConfig, MoEWeights]:
    """Return a small layer and its weights."""
    config = MoEConfig(
        **{  # type: ignore[arg-type]
            "hidden_size": 64,
            "moe_intermediate_size": 40,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "dtype": dtype,
            **changes,
        }
    )
    return config, MoEWeights.random(config, 0)


@by_dtype
@pytest.mark.parametrize("router_dtype", [torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("k", [1, 2])
def test_a_router_in_fp64_is_allowed_for(dtype, router_dtype, k):
    """fp64 weights are rounded to fp32 before they multiply: the envelope has to know."""
    config, weights = layer(
        dtype,
        router_dtype=router_dtype,
        num_experts_per_tok=k,
        norm_topk_prob=False,
        scoring_func="sigmoid",
    )
    x_TH = tokens(config, 200, 1)
    verdict = judge(
        [reference(config, weights, x_TH)],
        Truth(config, weights, [x_TH]),
        reference_contract(config),
    )
    assert verdict.equivalent, str(verdict)


@pytest.mark.parametrize("scaling", [1.0, 2.5])
@pytest.mark.parametrize("k", [2, 3, 6, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_equal_weights_raise_no_alarm(dtype, k, scaling):
    """Sums of stored outputs times 1/3 often lie at a midpoint, where fp32's 1/3 decides."""
    config, weights = layer(dtype, num_experts_per_tok=k, routed_scaling_factor=scaling)
    weights = replace(weights, router_EH=torch.zeros_like(weights.router_EH))
    x_TH = tokens(config, 256, 2)
    truth = Truth(config, weights, [x_TH])
    for tapped in (True, False):
        observed = reference(config, weights, x_TH, tapped)
        verdict = judge([observed], truth, reference_contract(config))
        assert verdict.equivalent, str(verdict)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_a_factor_that_fp32_rounds_raises_no_alarm(dtype):
    """1.3 times a stored output lies at a midpoint for one in ten; fp32's 1.3 is smaller."""
    config, weights = layer(dtype, num_experts_per_tok=1, routed_scaling_factor=1.3)
    x_TH = tokens(config, 256, 2)
    verdict = judge(
        [reference(config, weights, x_TH)],
        Truth(config, weights, [x_TH]),
        reference_contract(config),
    )
    assert verdict.equivalent, str(verdict)


@pytest.mark.parametrize("hidden_act", ["relu2", "silu"])
@pytest.mark.parametrize("scale", [30.0, 200.0, 3000.0])
@pytest.mark.parametrize("tapped", [True, False], ids=["tapped", "untapped"])
def test_the_references_overflow_is_the_truths(hidden_act, scale, tapped):
    """fp16 activations and outputs beyond 65504: infinities and NaN exactly where expected."""
    config, weights = layer(
        torch.float16,
        hidden_act=hidden_act,
        shared_expert_intermediate_size=24,
        router_weight_on_input=True,
        num_experts_per_tok=2,
    )
    x_TH = (tokens(config, 64, 3).float() * scale).clamp(-65504, 65504).half()
    observed = reference(config, weights, x_TH, tapped)
    verdict = judge([observed], Truth(config, weights, [x_TH]), reference_contract(config))
    assert not observed.output_TH.isfinite().all() or (hidden_act, scale) == ("silu", 30.0)
    assert not verdict.findings, str(verdict)


@by_dtype
def test_tiny_values_are_inside(dtype):
    """Inputs at the bottom of the format: results below the normal range, and zeros."""
    config, weights = layer(dtype, shared_expert_intermediate_size=24, scoring_func="sigmoid")
    scale = 2.0**-14 if dtype == torch.float16 else 2.0**-65
    x_TH = (tokens(config, 64, 4).float() * scale).to(dtype)
    verdict = judge(
        [reference(config, weights, x_TH)],
        Truth(config, weights, [x_TH]),
        reference_contract(config),
    )
    assert verdict.equivalent, str(verdict)


@by_dtype
@pytest.mark.parametrize("counts", [(5, 0, 7, 4), (0, 0, 0, 16), (16, 0, 0, 0), (0, 0, 0, 0)])
def test_where_tokens_live_does_not_matter_without_a_wire(dtype, counts):
    """The same rows dealt to four ranks are judged alike, empty ranks included."""
    config, weights = layer(dtype)
    x_TH = tokens(config, sum(counts), 5)
    out_TH = reference(config, weights, x_TH).output_TH
    verdict = judge(
        [RankObservation(rows_TH) for rows_TH in out_TH.split(list(counts))],
        Truth(config, weights, x_TH.split(list(counts))),
        reference_contract(config),
    )
    assert verdict.equivalent, str(verdict)
    assert verdict.tokens == sum(counts)


def test_a_grade_contains_the_sharper_one():
    """SHARP's stages lie within HARD's, at the output and at every tap."""
    config, weights = layer()
    truth, contract = Truth(config, weights, [tokens(config, 8, 6)]), reference_contract(config)
    radii = {}
    for grade in Grade:
        routing = truth.routing(contract, grade)
        ids_TK = routing.ids_TK
        stages = truth.stages(contract, ids_TK, routing.weights(ids_TK), grade)
        radii[grade] = [
            stages.weights_TK.radius,
            stages.expert_output_TKH.radius,
            stages.sum_TH.radius,
        ]
    for sharp, hard in zip(radii[Grade.SHARP], radii[Grade.HARD], strict=True):
        assert (sharp <= hard * (1 + 1e-12)).all()


def test_some_tokens_have_the_truth_of_all():
    """Sampling tokens leaves each one's truth and place unchanged."""
    config, weights = layer()
    truth = Truth(config, weights, [tokens(config, count, count) for count in (4, 3)])
    contract = reference_contract(config)
    some = truth.of_tokens(torch.tensor([1, 5]))
    assert (some.rank_T.tolist(), some.row_T.tolist()) == ([0, 1], [1, 1])
    whole, part = (
        t.stages(
            contract,
            t.routing(contract).ids_TK,
            t.routing(contract).weights(t.routing(contract).ids_TK),
        )
        for t in (truth, some)
    )
    torch.testing.assert_close(part.sum_TH.value, whole.sum_TH.value[[1, 5]])
    torch.testing.assert_close(part.sum_TH.radius, whole.sum_TH.radius[[1, 5]])


# --- running sums of a token's terms ----------------------------------------------------------


def running_sum(terms_TKH: torch.Tensor, order_TK: torch.Tensor) -> torch.Tensor:
    """Add each token's terms in its order, in a bf16 buffer that begins with zeros."""
    token_T = torch.arange(len(terms_TKH))
    sum_TH = torch.zeros_like(terms_TKH[:, 0], dtype=torch.bfloat16)
    for slot_T in order_TK.unbind(1):
        sum_TH = (sum_TH.float() + terms_TKH[token_T, slot_T].float()).bfloat16()
    return sum_TH


@given(seed=st.integers(0, 2**32), slots=st.integers(1, 8), stored=st.booleans())
def test_a_stored_running_sum_is_allowed_in_its_order(seed, slots, stored):
    """By expert ids, by slots, or in any order, whether or not the terms are stored before."""
    g = torch.Generator().manual_seed(seed)
    ids_TK = torch.stack([torch.randperm(12, generator=g)[:slots] for _ in range(6)])
    terms_TKH = torch.randn(6, slots, 16, generator=g)
    model = BF16 if stored else None
    if stored:
        terms_TKH = terms_TKH.bfloat16().float()
    contract = replace(reference_contract(layer()[0]), terms=model, combine=BF16)
    by_slot_TK = torch.arange(slots).expand(6, slots)
    orders = {Order.EXPERT_ID: ids_TK.argsort(dim=1), Order.SLOT: by_slot_TK}
    for declared, order_TK in orders.items():
        ordered = replace(contract, combine_order=declared)
        allowed = over_slots(ordered, ids_TK, Enclosure.exact(terms_TKH))
        assert not compare(running_sum(terms_TKH, order_TK), allowed).outside.any()
    allowed = over_slots(
        replace(contract, combine_order=Order.ANY), ids_TK, Enclosure.exact(terms_TKH)
    )
    for _ in range(4):
        order_TK = torch.stack([torch.randperm(slots, generator=g) for _ in range(6)])
        assert not compare(running_sum(terms_TKH, order_TK), allowed).outside.any()


def test_another_order_of_a_stored_sum_is_seen():
    """A sum that begins with the best expert does not pass for one by expert ids."""
    g = torch.Generator().manual_seed(0)
    ids_TK = torch.arange(6).flip(0).expand(8, 6)
    terms_TKH = torch.randn(8, 6, 64, generator=g)
    contract = replace(reference_contract(layer()[0]), combine=BF16)
    by_slot = running_sum(terms_TKH, torch.arange(6).expand(8, 6))
    allowed = over_slots(contract, ids_TK, Enclosure.exact(terms_TKH))
    assert compare(by_slot, allowed).outside.double().mean() > 0.05


# --- wires -----------------------------------------------------------------------------------


def wired(tier: str, wire_dtype: torch.dtype):
    """Return the contract of a transport tier."""
    config, _ = layer()
    return graphed_contract(config, "grouped_mm", tier, wire_dtype)


@given(seed=st.integers(0, 2**32), ranks=st.integers(1, 8))
def test_the_wire_holds_every_order_of_ranks(seed, ranks):
    """Each tier's rule holds what its sums may return: any order, a rounding a hop."""
    g = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(ranks, generator=g) for _ in range(4)] + [torch.arange(ranks)]
    for tier in ("p2p", "nvls", "gloo"):
        for payload in (torch.float32, torch.bfloat16):
            contract = wired(tier, payload)
            shares_RTH = torch.randn(ranks, 4, 16, generator=g).to(payload)
            allowed = across_ranks(contract, Enclosure.exact(shares_RTH))
            kept = contract.wire is not Wire.PER_HOP
            for order in orders:
                summed = shares_RTH[order[0]]
                for rank in order[1:]:
                    wide = summed.float() + shares_RTH[rank].float()
                    summed = wide if kept else wide.to(payload)
                stored = summed if tier == "p2p" else summed.to(payload)
                assert not compare(stored, allowed).outside.any(), (tier, payload)


def test_a_ring_in_bf16_is_outside_the_fp32_rules():
    """A rounding to bf16 at every hop does not pass for one fp32 accumulation."""
    g = torch.Generator().manual_seed(0)
    shares_RTH = torch.randn(8, 16, 64, generator=g).bfloat16()
    ring = shares_RTH[0]
    for share in shares_RTH[1:]:
        ring = ring + share
    allowed = across_ranks(wired("nvls", torch.bfloat16), Enclosure.exact(shares_RTH))
    assert compare(ring, allowed).outside.double().mean() > 0.2
    allowed = across_ranks(wired("gloo", torch.bfloat16), Enclosure.exact(shares_RTH))
    assert not compare(ring, allowed).outside.any()
