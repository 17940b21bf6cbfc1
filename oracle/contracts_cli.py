"""``twinmoe contracts``: what each path of this project promises, complete and 80 columns wide."""

import click
import torch
from rich.table import Table

from twinmoe.oracle.contract import RoundingContract
from twinmoe.oracle.contracts import own_contracts
from twinmoe.oracle.terminal import console, device_option
from twinmoe.reference.config import DTYPES, dtype_name


@click.command()
@click.option(
    "--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), default="bf16", show_default=True
)
@device_option
def contracts(dtype: str, device: str) -> None:
    """Show where each path declares that it rounds: what the judge holds it to."""
    for table in contract_tables(DTYPES[dtype], device):
        console.print(table)


def contract_tables(dtype: torch.dtype, device_type: str) -> list[Table]:
    """Every point of the reference's contract, and what is different on the other paths."""
    reference, *others = own_contracts(dtype, device_type)
    complete = Table(
        title=f"stored formats, {dtype_name(dtype)} model: {reference.name}", title_justify="left"
    )
    complete.add_column("point")
    complete.add_column("stored as (kept: in the accumulator's format)")
    for point, text in reference.rows():
        complete.add_row(point, text)
    different = Table(title="every other path, where it differs", title_justify="left")
    different.add_column("path")
    different.add_column("points", overflow="fold")
    for points, paths in _grouped(reference, others).items():
        different.add_row("\n".join(paths), points or "as the reference")
    return [complete, different]


def _grouped(reference: RoundingContract, others: list[RoundingContract]) -> dict[str, list[str]]:
    """Names of paths by what differs."""
    groups: dict[str, list[str]] = {}
    for contract in others:
        rows = zip(contract.rows(), reference.rows(), strict=True)
        different = [f"{point}: {text}" for (point, text), (_, usual) in rows if text != usual]
        groups.setdefault("; ".join(different), []).append(contract.name)
    return groups
