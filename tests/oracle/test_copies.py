"""Rows of an AlltoAll: what arrives is what was sent, in any order, or dispatch is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.oracle.subjects import layer
from tests.reference.inputs import tokens
from twinmoe.oracle import RankObservation, Taps, Truth, judge
from twinmoe.oracle.contracts import reference_contract
from twinmoe.oracle.verdict import Finding
from twinmoe.reference.layer import MoELayer
from twinmoe.reference.placement import Placement

COUNTS = (3, 2)

#: What arrives at the last rank: (rows [S, H], local ids [S]) -> the same, spoilt.
Spoil = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def verdict_after(spoil: Spoil, **config_changes: object) -> list[Finding]:
    """Judge right answers of two ranks, the second of which received ``spoil`` of its rows."""
    config, weights = layer(**config_changes)
    hidden = [tokens(config, count, count) for count in COUNTS]
    x_TH = torch.cat(hidden)
    alone = MoELayer(config, weights)
    with torch.no_grad():
        out_TH, routing = alone(x_TH), alone.router(x_TH)
        rows_TKH, _ = alone._weigh(x_TH, routing)
    placement, seen = Placement(config.num_experts, 2), []
    for rank, own in enumerate(torch.arange(len(x_TH)).split(list(COUNTS))):
        token, slot = (placement.owner(routing.ids_TK) == rank).nonzero(as_tuple=True)
        received = rows_TKH[token, slot], placement.local_id(routing.ids_TK[token, slot])
        received = spoil(*received) if rank == 1 else received
        taps = Taps(
            ids_TK=routing.ids_TK[own],
            weights_TK=routing.weights_TK[own],
            sent_TKH=rows_TKH[own] if config.router_weight_on_input else None,
            received_hidden=received[0],
            received_ids=received[1],
        )
        seen.append(RankObservation(out_TH[own], taps))
    return judge(seen, Truth(config, weights, hidden), reference_contract(config)).findings


def same_row_twice(rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrite the second row by the first."""
    rows = rows.clone()
    rows[1] = rows[0]
    return rows, ids


def one_bit(rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Change one value a little."""
    rows = rows.clone()
    rows[0, 3] = rows[0, 3].nextafter(rows[0, 3] + 1)
    return rows, ids


@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
@pytest.mark.parametrize(
    "spoil",
    [
        same_row_twice,
        one_bit,
        lambda rows, ids: (rows[1:], ids[1:]),
        lambda rows, ids: (rows, (ids + 1) % 4),
        lambda rows, ids: (torch.zeros_like(rows), ids),
    ],
    ids=["twice", "one bit", "lost", "other expert", "zeros"],
)
def test_a_row_that_does_not_arrive_is_dispatchs(spoil: Spoil, on_input: bool) -> None:
    """The token, its rank and the receiving rank are named, weighted rows or not."""
    (finding,) = verdict_after(spoil, router_weight_on_input=on_input)
    assert finding.stage == "dispatch"
    assert f"token {finding.token} on rank {finding.rank}" in finding.message
    assert "of rank 1 did not arrive" in finding.message


def test_a_row_too_many_is_dispatchs() -> None:
    """Rows that nobody sent, beside all that were."""
    (finding,) = verdict_after(
        lambda rows, ids: (torch.cat([rows, rows[:1]]), torch.cat([ids, ids[:1]]))
    )
    assert finding.stage == "dispatch"
    assert "rank 1 received rows that nobody sent it" in finding.message


@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
def test_the_order_of_rows_is_the_dispatchers_own_affair(on_input: bool) -> None:
    """As they come, or turned round."""
    turned: Spoil = lambda rows, ids: (rows.flip(0), ids.flip(0))  # noqa: E731
    for spoil in (turned, lambda rows, ids: (rows, ids)):
        assert not verdict_after(spoil, router_weight_on_input=on_input)


def test_rows_without_ids_are_not_compared() -> None:
    """Nothing says whose they are; the misshapen tap is a finding of its own."""
    (finding,) = verdict_after(lambda rows, ids: (rows, ids[:, None]))
    assert (finding.stage, finding.rank) == ("dispatch", 1)
    assert "received_ids has shape" in finding.message
