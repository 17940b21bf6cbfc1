"""Each planted race is lost every time, by the rank and in the rows that it says."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracle.faults.at_functions import planted
from tests.oracle.faults.planting import assert_does_not_reach, assert_names_its_stage
from twinmoe.optimized.communication.symmetric_transport import SymmetricTransport
from twinmoe.optimized.dispatcher import Gathered, InferenceCUDAGraphTokenDispatcher
from twinmoe.optimized.router import Routing
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults import FAULTS

_LAYER = "H=96,I=40,E=4,k=4,dtype=bf16"
_TWO_RANKS = Case.parse(f"T=3/5,{_LAYER}")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("last_event_only", f"T=5,{_LAYER}"),
        ("last_event_only", f"T=5,{_LAYER},transport=alltoall"),
        ("late_fill", f"T=5,{_LAYER},history=f0.p.f0"),
        ("late_fill", f"T=5,{_LAYER},mode=graphed,history=p.f0"),
        ("mixed_row", f"T=8,{_LAYER},history=f0.f0"),
        ("mixed_row", f"T=8,{_LAYER},mode=graphed,history=f0.f0"),
    ],
)
def test_names_its_stage(name: str, line: str) -> None:
    """On one rank, the fault is found, and found where it lies."""
    assert_names_its_stage(name, line)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("last_event_only", f"T=4,{_LAYER}"),
        ("late_fill", f"T=5,{_LAYER},mode=graphed,history=f0.p.f0"),
        ("mixed_row", f"T=7,{_LAYER},history=f0.f0"),
        ("mixed_row", f"T=8,{_LAYER}"),
    ],
)
def test_does_not_reach(name: str, line: str) -> None:
    """A batch of one chunk, an earlier capture, a bucket with room: nothing shows."""
    assert_does_not_reach(name, line)


def test_last_columns_come_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three quarters of a row are this call's; the rest of the peers' share is the last call's."""
    peers = torch.zeros(1, 4)
    monkeypatch.setattr(
        SymmetricTransport, "reduce_scatter", lambda _, partial: partial[:1] + peers
    )
    transport: Any = SimpleNamespace(world_size=2, rank=0)
    with planted("flag_before_data", _TWO_RANKS):
        sums = []
        for sent in (10, 20):
            peers.fill_(sent)
            sums.append(SymmetricTransport.reduce_scatter(transport, torch.ones(2, 4)))
    assert [row.flatten().tolist() for row in sums] == [[11, 11, 11, 1], [21, 21, 21, 11]]


class _Transport(SymmetricTransport):
    """Two ranks' gather, as rank 0 sees it, through one buffer that every call overwrites."""

    def __init__(self) -> None:
        self.world_size, self.rank = 2, 0
        self._pool: Any = SimpleNamespace(num_ctas=2)
        self.buffer = torch.zeros(1024, dtype=torch.uint8)
        self.calls: list[list[int]] = []

    def all_gather(self, tensors: Any) -> list[Tensor]:
        """Both ranks send the same."""
        self.calls.append([self._pool.num_ctas, *(tensor.shape[1] for tensor in tensors)])
        views, start = [], 0
        for tensor in tensors:
            both = torch.cat([tensor, tensor])
            size = both.numel() * both.element_size()
            view = self.buffer[start : start + size].view(both.dtype).view(both.shape)
            views.append(view.copy_(both))
            start += size
        return views


def _gather(name: str, rank: int, transport: _Transport, fill: int = 1) -> Gathered:
    routing = Routing(torch.full((3, 2), 5, dtype=torch.int32), torch.ones(3, 2))
    with planted(name, _TWO_RANKS, rank):
        dispatcher = InferenceCUDAGraphTokenDispatcher(transport, torch.float32)
        return dispatcher.token_dispatch(torch.full((3, 8), float(fill)), routing)


@pytest.mark.parametrize(("rank", "is_overwritten"), [(0, False), (1, True)])
def test_slow_rank_reads_what_came_next(rank: int, is_overwritten: bool) -> None:
    """Only the last rank finds ids where the first hidden states were."""
    gathered = _gather("reused_before_read", rank, _Transport())
    assert bool((gathered.hidden[:2] != 1).any()) is is_overwritten
    assert bool((gathered.hidden[4:] == 1).all())
    assert bool((gathered.ids == 5).all())


def test_second_rows_come_late() -> None:
    """Of two batches in turn, the peer's second row of the later one is the earlier one's."""
    transport = _Transport()
    routing = Routing(torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2))
    with planted("unfinished_warps", _TWO_RANKS):
        dispatcher = InferenceCUDAGraphTokenDispatcher(transport, torch.float32)
        for fill in (1.0, 2.0):
            gathered = dispatcher.token_dispatch(torch.full((3, 8), fill), routing)
    assert gathered.hidden[:, 0].tolist() == [2, 2, 2, 2, 1, 2]


@pytest.mark.parametrize(("rank", "sent"), [(0, [[1, 2, 2], [2, 8]]), (1, [[2, 8], [1, 2, 2]])])
def test_streams_swap(rank: int, sent: list[list[int]]) -> None:
    """The small gather of one program comes first, on the last rank the large one of two."""
    transport = _Transport()
    _gather("swapped_on_device", rank, transport)
    assert transport.calls == sent


def test_reaches_only_what_crosses() -> None:
    """Without a peer's share in a symmetric sum, none can be late."""
    one_each = "H=96,I=40,E=2,k=1,dtype=bf16"
    for line in (f"T=3,{one_each}", f"T=3/5,{_LAYER},transport=gloo"):
        assert not FAULTS["flag_before_data"].reaches(Case.parse(line))
        assert not FAULTS["unfinished_warps"].reaches(Case.parse(line))
