"""A contract guessed from answers: the right one of the family, or none."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

from tests.oracle import plain_layers
from twinmoe.oracle import cli
from twinmoe.oracle.contract import storage_contract
from twinmoe.oracle.suggest import FAMILY, ROUTERS, Fit, Suggestion, contract_of

FILE = plain_layers.__file__


def suggest(layer: str, *arguments: str) -> tuple[int, str]:
    """Exit code and output of the command."""
    run = ["calibrate", "--suggest-contract", "--subject", f"{FILE}:{layer}", "--draws", "4"]
    result = CliRunner().invoke(cli.main, [*run, *arguments])
    return result.exit_code, result.stdout


def test_the_stored_layer_is_recognised() -> None:
    """The reference stores everything; what it declares is not looked at."""
    code, told = suggest("right")
    assert code == cli.EQUIVALENT
    assert "replace(storage_contract('everything stored, fp32 router', config.dtype)" in told
    assert "a guess, to be confirmed" in told


def test_a_fused_layer_is_recognised() -> None:
    """A layer that keeps gate, up and expert outputs unrounded is told from one that does not."""
    code, told = suggest("fused")
    assert code == cli.EQUIVALENT
    assert "gate_up=None, expert_output=None, ties=Ties.ANY" in told


def test_a_wrong_layer_fits_no_contract() -> None:
    """Exit 1: a mistake is no rounding."""
    code, told = suggest("swapped")
    assert code == cli.NOT_EQUIVALENT
    assert "no contract of the family fits every case" in told


def test_the_command_needs_a_layer() -> None:
    """Without --subject there is nothing to look at."""
    result = CliRunner().invoke(cli.main, ["calibrate", "--suggest-contract"])
    assert result.exit_code == cli.COULD_NOT_RUN
    assert "add --subject" in result.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_members_of_the_family_differ(dtype: torch.dtype) -> None:
    """Each member declares something of its own, all from the storage contract."""
    members = {
        contract_of(experts | router, dtype)
        for experts in FAMILY.values()
        for router in ROUTERS.values()
    }
    assert len(members) == len(FAMILY) * len(ROUTERS)
    assert {member.output for member in members} == {storage_contract("", dtype).output}


def test_the_proposed_code_declares_what_was_judged() -> None:
    """The line that is printed makes the contract that fitted."""
    fit = Fit("mine", {"gate": "stored", "gate_up": None})
    assert fit.code(1) == (
        "replace(storage_contract('mine', config.dtype), gate=narrow, gate_up=None, ties=Ties.ANY)"
    )
    assert "wire=Wire.PER_HOP" in fit.code(2)


def test_a_contract_that_was_never_decided_is_not_proposed() -> None:
    """Cases in which near ties leave everything open prove no contract."""
    open_fit = Fit("open", {}, fits=2, cases=2, undecided=2)
    assert Suggestion([open_fit]).best is None
