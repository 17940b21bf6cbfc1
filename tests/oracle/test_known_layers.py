"""What public code stores has a place in the contract: right layers pass, and need each point."""

from __future__ import annotations

import re
from dataclasses import fields, replace

import pytest
import torch
from click.testing import CliRunner

from tests.oracle import known_layers
from twinmoe.oracle import cli
from twinmoe.oracle.contract import RoundingContract, storage_contract
from twinmoe.oracle.emulation.remember import RememberingTruth
from twinmoe.oracle.judgement import judge
from twinmoe.oracle.layer_space import narrow_of
from twinmoe.oracle.observation import RankObservation
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights

ALONE = RankContext(0, 1, None, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("name", known_layers.LAYERS)
def test_it_is_equivalent_under_its_contract(name: str) -> None:
    """Corners and drawn cases, bf16 and fp16."""
    run = ["check", "--subject", f"{known_layers.__file__}:{name}", "--dtype", "bf16,fp16"]
    result = CliRunner().invoke(cli.main, run)
    assert result.exit_code == cli.EQUIVALENT, result.stdout


def observed(name: str, seed: int) -> tuple[RankObservation, RememberingTruth, RoundingContract]:
    """What a layer answers to one batch, what is true of it, and what it declares."""
    factory = getattr(known_layers, name)
    config = narrow_of(factory)(
        MoEConfig(
            hidden_size=96,
            moe_intermediate_size=64,
            num_experts=8,
            num_experts_per_tok=3,
            routed_scaling_factor=2.3,
            shared_expert_intermediate_size=40,
            shared_expert_gate=True,
            dtype=torch.bfloat16,
        )
    )
    weights = MoEWeights.random(config, seed)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(24, 96, generator=generator).bfloat16()
    layer = factory(config, weights, ALONE)
    output, taps = layer.forward(hidden)
    truth = RememberingTruth(config, weights, [hidden])
    return RankObservation(output, taps), truth, layer.contract


def declared(contract: RoundingContract) -> list[str]:
    """Its points that differ from storing everything; a choice of place goes with its format."""
    usual = storage_contract("known", torch.bfloat16)
    names = [field.name for field in fields(contract) if field.name != "ties"]
    return [name for name in names if getattr(contract, name) != getattr(usual, name)]


@pytest.mark.parametrize("name", known_layers.LAYERS)
def test_every_point_that_it_declares_is_needed(name: str) -> None:
    """With one of them taken back, some element of some batch is outside."""
    seen = [observed(name, seed) for seed in range(3)]
    contract = seen[0][2]
    usual = storage_contract("known", torch.bfloat16)
    assert all(not judge([answer], truth, contract).findings for answer, truth, _ in seen)
    # without a factor, storing the weights stores the quotients, and the other way round
    free = {"normalised_weights", "router_weights"} if name == "gpt_fast" else set()
    for point in set(declared(contract)) - free:
        without = replace(contract, **{point: getattr(usual, point)})
        wrong = [judge([answer], truth, without).findings for answer, truth, _ in seen]
        assert any(wrong), point


@pytest.mark.slow
@pytest.mark.parametrize("name", known_layers.LAYERS)
def test_its_contract_is_suggested(name: str) -> None:
    """From its answers alone, in settings that it reads and no others."""
    run = ["calibrate", "--suggest-contract", "--subject", f"{known_layers.__file__}:{name}"]
    result = CliRunner().invoke(cli.main, run)
    assert result.exit_code == cli.EQUIVALENT, result.stdout
    _, _, contract = observed(name, 0)
    (line,) = re.findall(r"    contract = (.*)\n", result.stdout)
    found = {word.partition("=")[0].strip() for word in line.split(",")[1:]}
    same = {"normalised_weights"} if name != "gpt_fast" else set()
    assert found & {*declared(contract)} - same == {*declared(contract)} - same, line
    (said,) = re.findall("said of layers with (.*) only", result.stdout)
    assert "n_group=1" in said
