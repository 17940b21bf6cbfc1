"""Each planted fault of graphs shows at the replay that its trigger names, and only there."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracle.faults.at_functions import planted
from tests.oracle.faults.planting import assert_does_not_reach, assert_names_its_stage
from twinmoe.optimized import layer as layer_module
from twinmoe.optimized.communication import symmetric_transport
from twinmoe.optimized.communication.eligibility import Tier
from twinmoe.optimized.communication.symmetric_transport import SymmetricTransport
from twinmoe.optimized.cpu_graph import CpuGraph
from twinmoe.optimized.graph import GraphRunner
from twinmoe.optimized.shared_expert import SideStream
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults import graphs

_LAYER = "H=96,I=40,E=4,k=2,dtype=bf16"
_GRAPHED = f"T=5,{_LAYER},mode=graphed"
_TWO_RANKS = f"T=3/5,{_LAYER},shared=24,mode=graphed"

_ALONE = {
    "unrefreshed_pad": _GRAPHED,
    "dangling_temporary": f"{_GRAPHED},history=f0.f2.f0",
    "abandoned_weights": f"{_GRAPHED},history=f0.w1.f0",
    "unrecorded_collective": _GRAPHED,
}


@pytest.mark.parametrize(("name", "line"), _ALONE.items())
def test_names_its_stage(name: str, line: str) -> None:
    """On one rank, the fault is found, and found where it lies."""
    assert_names_its_stage(name, line)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("unrefreshed_pad", f"T=5,{_LAYER.replace('96', '64')},mode=graphed"),
        ("dangling_temporary", f"{_GRAPHED},history=f2.f0"),
        ("abandoned_weights", f"{_GRAPHED},history=f0.w1.g0.w0.f0"),
        ("unrecorded_collective", f"T=5,{_LAYER}"),
        ("lazy_rendezvous", f"{_GRAPHED},history=g0.f0"),
    ],
)
def test_does_not_reach(name: str, line: str) -> None:
    """Where no replay meets the fault, the layer is right."""
    assert_does_not_reach(name, line)


def _replays(monkeypatch: pytest.MonkeyPatch, name: str, line: str, count: int) -> list[float]:
    """What ``count`` replays of rank 0's sum give: own share 1, peers' 10, 20, ... more."""
    peers = torch.zeros(1)

    def scatter(_transport: Any, partial: Tensor) -> Tensor:
        return partial[:1] + peers

    monkeypatch.setattr(SymmetricTransport, "reduce_scatter", scatter)
    transport: Any = SimpleNamespace(world_size=2, rank=0)
    with planted(name, Case.parse(line)):
        partial, graph = torch.ones(2, 1), CpuGraph()
        with graph.capture():
            summed = SymmetricTransport.reduce_scatter(transport, partial)
        seen = []
        for replay in range(1, count + 1):
            peers.fill_(10 * replay)
            graph.replay()
            seen.append(summed.item())
    return seen


def test_tags_go_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first replay is right, each later one adds what the peers sent for the one before."""
    line = f"{_TWO_RANKS},history=f0.f1.f0"
    assert _replays(monkeypatch, "stale_tags", line, 3) == [11.0, 11.0, 21.0]


@pytest.mark.parametrize(
    ("name", "after_a_replay"), [("replayed_before_upload", True), ("never_registered", False)]
)
def test_addresses_are_missing(
    monkeypatch: pytest.MonkeyPatch, name: str, after_a_replay: bool
) -> None:
    """A small graph captures a table of own addresses, which one of the two fills in later."""
    buffer = torch.zeros(4, dtype=torch.uint8)
    memory = SimpleNamespace(rank=1, buffer=buffer, buffer_ptrs=torch.tensor([7, 8]))
    tables: list[Tensor] = []
    monkeypatch.setattr(
        symmetric_transport, "reduce_scatter", lambda memory: tables.append(memory.buffer_ptrs)
    )

    def capture(_runner: Any, _bucket: int) -> None:
        with CpuGraph().capture():
            symmetric_transport.reduce_scatter(memory)  # type: ignore[call-arg]

    monkeypatch.setattr(GraphRunner, "_capture", capture)
    monkeypatch.setattr(GraphRunner, "__call__", lambda _runner: None)
    with planted(name, Case.parse(_TWO_RANKS.replace("3/5", "3/4"))):
        runner: Any = object()
        GraphRunner._capture(runner, 4)
        assert tables[0].tolist() == [buffer.data_ptr()] * 2
        GraphRunner.__call__(runner)  # type: ignore[call-arg]
    assert (tables[0].tolist() == [7, 8]) is after_a_replay


def test_rank_takes_its_own_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest batch of all ranks is not asked for."""
    monkeypatch.setattr(GraphRunner, "__call__", lambda _runner, _x, max_tokens: max_tokens)
    with planted("local_bucket", Case.parse(_TWO_RANKS)):
        runner: Any = GraphRunner.__call__
        assert runner(object(), torch.zeros(3, 4), max_tokens=8) == 3


def test_transport_is_chosen_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Selecting only remembers the question; the first use asks it, once."""
    asked: list[Tier] = []

    def select(*, tier: Tier) -> Any:
        asked.append(tier)
        return SimpleNamespace(rank=3)

    monkeypatch.setattr(layer_module, "select_transport", select)
    with planted("lazy_rendezvous", Case.parse(_TWO_RANKS)):
        transport: Any = layer_module.select_transport(tier=Tier.P2P)  # type: ignore[call-arg]
        assert (transport.tier, asked) == (Tier.P2P, [])
        assert (transport.rank, transport.rank, asked) == (3, 3, [Tier.P2P])


def test_shared_answer_lies_in_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under capture the shared expert's answer is read from the region of partial sums."""
    region = torch.full((2, 4), 7.0)
    pool = SimpleNamespace(
        capacity=SimpleNamespace(reduce_scatter_offset=0), view=lambda *_: region
    )
    monkeypatch.setattr(graphs, "pools_of", lambda _group: [pool])
    with planted("unreserved_region", Case.parse(_TWO_RANKS)):
        stream = SideStream(torch.device("cpu"))
        assert torch.equal(stream.start(lambda: torch.ones(2, 4))(), torch.ones(2, 4))
        with CpuGraph().capture():
            answer = stream.start(lambda: torch.ones(2, 4))()
    assert answer is region
