"""Each planted fault of collectives changes a sum, a slice or the path that is reported."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracle.faults.at_functions import planted
from twinmoe.optimized.communication import all_gather as gathering
from twinmoe.optimized.communication.eligibility import Tier
from twinmoe.optimized.communication.multimem import Leaf
from twinmoe.optimized.communication.packing import PackedTensor
from twinmoe.optimized.communication.symmetric_transport import SymmetricTransport
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults import FAULTS, collectives

_RANKS = 4
_LAYER = "H=96,I=40,E=8,k=8,dtype=bf16,wire=model"
_NVLS = Case.parse(f"T=5/5/5/5,{_LAYER},transport=nvls")


def _partials() -> Tensor:
    """Each rank's share of all rows, [R, R * N, H]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_RANKS, _RANKS * 8, 16, generator=generator).bfloat16()


def _reduced(monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[Tensor, Tensor]:
    """Rank 1's (right, wrong) sums."""
    partials = _partials()
    right = partials.float().sum(0).chunk(_RANKS)[1]

    def gather(everyone: list[Tensor], _own: Tensor, **_: object) -> None:
        for mine, theirs in zip(everyone, partials, strict=True):
            mine.copy_(theirs.view(torch.uint8))

    monkeypatch.setattr(SymmetricTransport, "reduce_scatter", lambda *_: right.clone())
    monkeypatch.setattr(collectives.dist, "all_gather", gather)
    transport: Any = SimpleNamespace(tier=Tier.NVLS, world_size=_RANKS, rank=1)
    with planted(name, _NVLS, rank=1):
        return right, SymmetricTransport.reduce_scatter(transport, partials[1])


@pytest.mark.parametrize("name", ["narrow_accumulator", "rounded_at_each_hop"])
def test_sums_round_between(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The sum is near, and farther off than its one rounding to bf16."""
    right, wrong = _reduced(monkeypatch, name)
    assert torch.allclose(wrong, right, rtol=0.05, atol=0.1)
    assert not torch.equal(wrong, right.bfloat16().float())


def test_payload_is_truncated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first four rows are summed, the others are the rank's own."""
    right, wrong = _reduced(monkeypatch, "truncated_payload")
    assert torch.equal(wrong[:4], right[:4])
    assert torch.equal(wrong[4:], _partials()[1].chunk(_RANKS)[1][4:].float())


def test_odd_address_is_rounded_down() -> None:
    """A view one element into a buffer is read from the buffer's start."""
    buffer = torch.arange(9.0).bfloat16()
    packed = PackedTensor(0, 16)
    right = gathering.as_words(buffer[1:], packed).view(torch.bfloat16)
    with planted("address_rounded_down", _NVLS):
        wrong = gathering.as_words(buffer[1:], packed).view(torch.bfloat16)
    assert (right.tolist(), wrong.tolist()) == ([*range(1, 9)], [*range(8)])


def test_wide_lanes_are_refused() -> None:
    """Lanes of 16 bytes, fit for multicast, go from peer to peer."""
    transport: Any = SimpleNamespace(_leaf=Leaf.MULTICAST_EMULATED, _shape_refusals={})
    packed = (PackedTensor(0, 64),)
    _, label = SymmetricTransport._leaf_for(transport, packed, "all_gather")
    with planted("judged_by_buffer", _NVLS):
        _, wrong = SymmetricTransport._leaf_for(transport, packed, "all_gather")
    assert (label, wrong) == ("nvls (emulated)", "p2p")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("narrow_accumulator", f"T=5/5,{_LAYER},transport=nvls"),
        ("rounded_at_each_hop", f"T=5/5,{_LAYER},transport=nvls"),
        ("truncated_payload", f"T=4/4,{_LAYER}"),
        ("address_rounded_down", "T=1,H=33,I=40,E=6,k=3,dtype=bf16"),
        ("judged_by_buffer", f"T=5/5,{_LAYER}"),
        ("judged_by_buffer", "T=1/1,H=33,I=40,E=6,k=3,dtype=bf16,transport=nvls"),
    ],
)
def test_equivalent_cases_are_not_reached(name: str, line: str) -> None:
    """Where the fault changes nothing, its trigger says so."""
    assert not FAULTS[name].reaches(Case.parse(line))
