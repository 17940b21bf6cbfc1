"""The contracts of record, as a person reads them on a terminal of 80 columns."""

from __future__ import annotations

import re
from io import StringIO

import pytest
import torch
from rich.console import Console

from twinmoe.oracle.contracts import own_contracts, reference_contract
from twinmoe.oracle.contracts_cli import contract_tables
from twinmoe.reference.config import MoEConfig


def shown(dtype: torch.dtype = torch.bfloat16, device_type: str = "cpu") -> str:
    """What the command prints."""
    console = Console(width=80, record=True, file=StringIO())
    for table in contract_tables(dtype, device_type):
        console.print(table)
    return console.export_text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_point_of_the_reference_has_a_row(dtype: torch.dtype) -> None:
    """Kept ones too, in the order of the data flow."""
    config = MoEConfig(
        hidden_size=8, moe_intermediate_size=8, num_experts=2, num_experts_per_tok=1, dtype=dtype
    )
    rows = re.findall(r"^│ ([a-z ]+?) +│ ([a-z0-9 ]+?) +│$", shown(dtype), re.MULTILINE)
    points = reference_contract(config).rows()
    assert rows[: len(points)] == points


def test_every_path_is_named_whole() -> None:
    """No name is broken or cut at 80 columns, and no line is longer."""
    told = shown()
    assert all(contract.name in told for contract in own_contracts(torch.bfloat16))
    assert max(map(len, told.splitlines())) <= 80
    assert "…" not in told


def test_paths_tell_only_what_differs() -> None:
    """A fused kernel keeps what the reference stores; paths that do the same stand together."""
    told = shown()
    assert re.search(r"alltoall \+ triton +│ gate up: kept; expert output: kept", told)
    assert re.search(r"alltoall \+ \w+ +│ as the reference", told)


def test_a_gpu_accumulates_otherwise() -> None:
    """fp16 operands meet another accumulator on Hopper, and the command says so."""
    assert "accumulator: fp32, fp16 exponents" in re.sub(
        r"[│\s]+", " ", shown(torch.float16, "cuda")
    )
    assert "exponents" not in shown(torch.float16)
