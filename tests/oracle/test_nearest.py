"""Contracts searched for: every pair of undeclared roundings is found, from answers alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from tests.oracle.rounding_layers import KEPT, NARROW_ROUTER, STORED, answer
from tests.profiles import sampled
from twinmoe.oracle import RankObservation, storage_contract
from twinmoe.oracle.contract import Order, RoundingContract, Scales, Ties, Weighs, Wire
from twinmoe.oracle.contracts import on_device
from twinmoe.oracle.emulation.remember import RememberingTruth
from twinmoe.oracle.evidence import Evidence
from twinmoe.oracle.nearest import Moves, Sample, Search, as_code, made, moves_from
from twinmoe.oracle.rounding import FORMATS, FP32
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights

SETS = [pick for size in (0, 1) for pick in combinations((*STORED, *KEPT), size)]
SETS += sampled(list(combinations((*STORED, *KEPT), 2)), one_in=3)

#: Points of the shared expert, with one of the routed ones each.
SHARED = [("shared_gate_up",), ("shared_output", "logits"), ("reduced", "gate_up"), ("reduced",)]

#: What eager experts of Hugging Face transformers store, and what two kernels fused would.
MORE = [
    ("logits", "router_weights", "gate", "terms", "combine"),
    (*STORED, "router_weights"),
    NARROW_ROUTER,
]


def config_of(dtype: torch.dtype, **changes: int) -> MoEConfig:
    """A layer whose roundings all show."""
    sizes = {"hidden_size": 96, "moe_intermediate_size": 64, "num_experts": 8}
    return MoEConfig(**(sizes | {"num_experts_per_tok": 3} | changes), dtype=dtype)  # type: ignore[arg-type]


def sample(config: MoEConfig, differs: tuple[str, ...], seed: int = 0) -> Sample:
    """What a layer answers that stores, and keeps, all but ``differs`` as the contract says."""
    stored = {*STORED, "shared_gate_up", "shared_output"} ^ set(differs)
    weights = MoEWeights.random(config, seed)
    generator = torch.Generator().manual_seed(seed)
    hidden_TH = torch.randn(12, config.hidden_size, generator=generator).to(config.dtype)
    truth = RememberingTruth(config, weights, [hidden_TH])
    seen = RankObservation(answer(config, weights, hidden_TH, stored))
    return Sample(truth, Evidence.of([seen], truth))


def first(dtype: torch.dtype) -> RoundingContract:
    """Everything stored, ties left open."""
    return replace(storage_contract("mine", dtype), ties=Ties.ANY)


def found(config: MoEConfig, differs: tuple[str, ...], most: int = 6) -> tuple[Search, Moves]:
    """The search over one layer's answers, and what it likes best."""
    moves = moves_from(first(config.dtype), config, 1)
    samples = [sample(config, differs, seed) for seed in (0, 1)]
    search = Search(first(config.dtype), moves, samples)
    return search, search.around(most)[0]


def points_of(moves: Moves) -> set[str]:
    """The points that differ."""
    return {point for move in moves for point, _ in move.points}


@pytest.mark.parametrize("differs", SETS, ids="+".join)
def test_every_pair_of_roundings_is_found(differs: tuple[str, ...]) -> None:
    """None, one or two points that differ from storing everything: those, and no others."""
    search, best = found(config_of(torch.bfloat16), differs)
    assert points_of(best) == set(differs)
    assert search.found[best].outside == 0


@pytest.mark.parametrize("differs", [*SETS[10::5], *sampled(MORE, one_in=3)], ids="+".join)
def test_so_it_is_in_fp16(differs: tuple[str, ...]) -> None:
    """Some of the pairs, and more than pairs, in the other narrow dtype."""
    _, best = found(config_of(torch.float16), differs)
    assert points_of(best) == set(differs)


@pytest.mark.parametrize("differs", [*SHARED, *MORE], ids="+".join)
def test_more_than_two_and_the_shared_expert(differs: tuple[str, ...]) -> None:
    """What climbing from the pairs finds, and the points that only a shared expert has."""
    _, best = found(config_of(torch.bfloat16, shared_expert_intermediate_size=40), differs)
    assert points_of(best) == set(differs)


def test_a_mistake_fits_no_contract() -> None:
    """Gate and up exchanged: outside whatever is tried."""
    config = config_of(torch.bfloat16)
    right = sample(config, ())
    w13 = right.truth.weights.w13_LFH  # type: ignore[attr-defined]
    swapped = replace(right.truth.weights, w13_LFH=w13.flip(1))  # type: ignore[type-var]
    truth = RememberingTruth(config, swapped, [right.truth.hidden_TH])
    moves = moves_from(first(config.dtype), config, 1)
    search = Search(first(config.dtype), moves, [Sample(truth, right.evidence)])
    search.around(2)
    assert min(seen.share_outside for seen in search.found.values()) > 0.5


def test_a_move_changes_something_in_its_layer() -> None:
    """Every difference is one, and points that a layer has not are not tried."""
    config, contract = config_of(torch.bfloat16), first(torch.bfloat16)
    moves = moves_from(contract, config, 1)
    assert all(made(contract, [move]) != contract for move in moves)
    tried = points_of(frozenset(moves))
    assert not tried & {"shared_output", "weighted_input", "reduced", "wire", "partial"}
    assert {"terms", "combine", "gate", "logits"} <= tried


def test_ranks_have_wires() -> None:
    """Over several ranks the ways in which shares are summed are tried, each as one difference."""
    contract = first(torch.bfloat16)
    moves = moves_from(contract, config_of(torch.bfloat16), 2)
    wires = [dict(move.points) for move in moves if "wire" in dict(move.points)]
    assert {"partial": FP32, "wire": Wire.PER_HOP, "reduced": FP32} in wires
    assert len(wires) == 4


@pytest.mark.parametrize("weighs_input", [False, True])
@pytest.mark.parametrize(("dtype", "device"), [(torch.bfloat16, "cpu"), (torch.float16, "cuda")])
def test_the_code_makes_the_contract(dtype: torch.dtype, device: str, weighs_input: bool) -> None:
    """What is printed, pasted, is what was found, whatever the hardware makes of fp32."""
    config = replace(config_of(dtype), router_weight_on_input=weighs_input)
    contract = on_device(first(dtype), dtype, device)
    for move in moves_from(contract, config, 2):
        code = f"replace(contract, {as_code([move], config, 'FORMATS[config.dtype]')})"
        names = {"replace": replace, "contract": contract, "FORMATS": FORMATS, "config": config}
        names |= {"Order": Order, "Scales": Scales, "Weighs": Weighs, "Wire": Wire, "FP32": FP32}
        assert eval(code, names) == made(contract, [move])
        assert made(contract, [move]) != contract
