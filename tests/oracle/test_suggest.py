"""A contract guessed from answers: the right one of the family, or none."""

from __future__ import annotations

import re
from dataclasses import replace
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from tests.oracle import mistaken_layers, plain_layers, rounding_layers
from twinmoe.oracle import cli
from twinmoe.oracle.contract import RoundingContract, Ties, Wire, storage_contract
from twinmoe.oracle.nearest import Move, moves_from
from twinmoe.oracle.rounding import FORMATS, FP32, Format
from twinmoe.oracle.suggest import Fit, Suggestion, first_contract
from twinmoe.reference.config import MoEConfig

FILE = plain_layers.__file__
CONFIG = MoEConfig(
    hidden_size=32,
    moe_intermediate_size=16,
    num_experts=4,
    num_experts_per_tok=2,
    dtype=torch.bfloat16,
)


def suggest(layer: str, file: str = FILE, *options: str) -> tuple[int, str]:
    """Exit code and output of the command."""
    run = ["calibrate", "--suggest-contract", "--subject", f"{file}:{layer}", "--draws", "4"]
    result = CliRunner().invoke(cli.main, [*run, *options])
    return result.exit_code, result.stdout


def test_the_stored_layer_is_recognised() -> None:
    """The reference stores everything; what it declares is not looked at."""
    code, told = suggest("right")
    assert code == cli.EQUIVALENT
    assert "replace(storage_contract('mine', config.dtype), ties=Ties.ANY)" in told
    assert "a guess, to be confirmed" in told


def test_a_fused_layer_is_recognised() -> None:
    """A layer that keeps gate, up and expert outputs unrounded is told from one that does not."""
    code, told = suggest("fused")
    assert code == cli.EQUIVALENT
    assert "expert_output=None, gate_up=None, ties=Ties.ANY" in told


@pytest.mark.parametrize(
    ("layer", "points"),
    [
        ("two_roundings", {"logits", "gate_up"}),
        ("mixtral_as_in_transformers", {"logits", "router_weights", "gate", "terms", "combine"}),
        ("narrow_router", set(rounding_layers.NARROW_ROUTER)),
    ],
)
def test_several_roundings_at_once_are_recognised(layer: str, points: set[str]) -> None:
    """The lines that are printed, pasted into a factory, declare exactly those points."""
    code, told = suggest(layer, rounding_layers.__file__)
    assert code == cli.EQUIVALENT, told
    contract = pasted(told)
    stored = replace(storage_contract("mine", CONFIG.dtype), ties=Ties.ANY)
    assert {name for name in vars(stored) if vars(stored)[name] != vars(contract)[name]} == points


@pytest.mark.parametrize(
    ("file", "layer", "payload"),
    [
        (mistaken_layers.__file__, "right", FP32),
        (rounding_layers.__file__, "narrow_wire", FORMATS[CONFIG.dtype]),
    ],
    ids=["fp32", "bf16"],
)
def test_over_ranks_the_wire_is_recognised(file: str, layer: str, payload: Format) -> None:
    """What travels between two ranks is proposed where there are two, and one rank has no wire."""
    code, told = suggest(layer, file, "--ep", "2")
    assert code == cli.EQUIVALENT, told
    stored = replace(storage_contract("mine", CONFIG.dtype), ties=Ties.ANY)
    assert pasted(told) == stored
    wired = pasted(told, ranks=2)
    assert (wired.wire, wired.partial) == (Wire.PER_HOP, payload)
    assert replace(wired, wire=Wire.NONE, partial=None, reduced=None) == stored


def pasted(told: str, ranks: int = 1) -> RoundingContract:
    """What the proposed lines make where a factory has its config and its place."""
    place = SimpleNamespace(group=None if ranks == 1 else object())
    names: dict[str, Any] = {"config": CONFIG, "place": place}
    exec(dedent("".join(re.findall(r"^    .*\n", told, re.MULTILINE))), names)
    contract: RoundingContract = names["contract"]
    return contract


def test_without_a_fit_the_nearest_is_told() -> None:
    """Exit 1: a mistake is no rounding; the nearest contract is told with its distance."""
    code, told = suggest("swapped")
    assert code == cli.NOT_EQUIVALENT
    assert re.search(r"does NOT fit: 9\d(\.\d+)? % of elements are outside, 0 of 4 cases", told)
    assert pasted(told) == replace(storage_contract("mine", CONFIG.dtype), ties=Ties.ANY)
    assert "no matter of rounding alone" in told


def test_a_layer_that_raises_fits_no_contract() -> None:
    """Exit 1, and the line of the layer first."""
    run = ["calibrate", "--suggest-contract", "--subject", f"{FILE}:raising", "--timeout", "60"]
    result = CliRunner().invoke(cli.main, run)
    assert result.exit_code == cli.NOT_EQUIVALENT
    assert re.match(rf"{re.escape(FILE)}:\d+ in kernel: RuntimeError: no such", result.stderr)


def test_the_command_needs_a_layer() -> None:
    """Without --subject there is nothing to look at."""
    result = CliRunner().invoke(cli.main, ["calibrate", "--suggest-contract"])
    assert result.exit_code == cli.COULD_NOT_RUN
    assert "add --subject" in result.stderr


def fit_of(**points: object) -> Fit:
    """A contract with these differences."""
    return Fit(frozenset(Move(((name, value),), name) for name, value in points.items()))


def test_the_proposed_code_declares_what_was_judged() -> None:
    """The line that is printed makes the contract that fitted, with a wire over several ranks."""
    fit = fit_of(gate=FORMATS[CONFIG.dtype], gate_up=None)
    one, two = Suggestion([fit], [CONFIG]), Suggestion([fit], [CONFIG], ranks=2)
    (line,) = one.code(fit)
    assert line == (
        "contract = replace(storage_contract('mine', config.dtype), "
        "gate=narrow, gate_up=None, ties=Ties.ANY)"
    )
    assert two.code(fit) == [
        line,
        "if place.group:",
        "    contract = replace(contract, partial=FP32, reduced=FP32, wire=Wire.PER_HOP)",
    ]


def test_a_found_wire_replaces_the_first_one() -> None:
    """What travels between ranks is written once."""
    moves = moves_from(first_contract(CONFIG.dtype, 2), CONFIG, 2)
    wire = next(move for move in moves if dict(move.points).get("partial") != FP32 and
                "wire" in dict(move.points))  # fmt: skip
    fit = Fit(frozenset([wire]))
    code = "\n".join(Suggestion([fit], [CONFIG], ranks=2).code(fit))
    assert code.count("partial=") == 1
    assert "partial=narrow" in code


def test_a_contract_that_was_never_decided_is_not_proposed() -> None:
    """Cases in which near ties leave everything open prove no contract."""
    undecided = Fit(frozenset(), fits=2, cases=2, undecided=2)
    assert Suggestion([undecided], [CONFIG]).best is None
