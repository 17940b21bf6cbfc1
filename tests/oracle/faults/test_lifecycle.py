"""Each planted fault of life and death keeps what it should give back, or stays away."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracle.faults.at_functions import planted
from tests.oracle.faults.planting import assert_names_its_stage, verdict_alone
from twinmoe.optimized import layer as layer_module
from twinmoe.optimized.cpu_graph import CpuGraph
from twinmoe.optimized.dispatcher import InferenceCUDAGraphTokenDispatcher
from twinmoe.optimized.graph import GraphRunner
from twinmoe.optimized.layer import MoELayer
from twinmoe.oracle import resources
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults import FAULTS, lifecycle

_LAYER = "H=96,I=40,E=4,k=2,dtype=bf16"


@pytest.mark.parametrize("name", ["cached_by_id", "tensor_kept"])
@pytest.mark.parametrize("line", [f"T=3,{_LAYER}", f"T=3,{_LAYER},mode=graphed,history=f0.n.f0"])
def test_memory_is_kept(name: str, line: str) -> None:
    """The forwards are right, and what stays mapped is found."""
    assert_names_its_stage(name, line)
    findings = verdict_alone(f"{line},fault={name}").findings
    assert {finding.relation for finding in findings} == {resources.RELATION}
    assert any("still mapped" in finding.message for finding in findings)


def test_idle_rank_returns_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a forward nor a replay starts where there is no token; others go on."""
    started: list[object] = []

    def forward(_layer: Any, x: Tensor, num_valid: Tensor | None = None) -> Tensor:
        started.append(num_valid)
        return x

    monkeypatch.setattr(MoELayer, "forward", forward)
    monkeypatch.setattr(GraphRunner, "__call__", lambda _runner, x: forward(None, x))
    layer: Any = SimpleNamespace(_tap=lambda *_: None)
    with planted("idle_rank_returns", Case.parse(f"T=3/0,{_LAYER}")):
        MoELayer.forward(layer, torch.zeros(0, 4))
        MoELayer.forward(layer, torch.zeros(2, 4), torch.tensor([0]))
        GraphRunner.__call__(layer, torch.zeros(0, 4))
        assert started == []
        MoELayer.forward(layer, torch.zeros(2, 4), torch.tensor([1]))
        GraphRunner.__call__(layer, torch.zeros(2, 4))
        assert len(started) == 2


@pytest.mark.parametrize(("rank", "combines"), [(0, 3), (1, 2)])
def test_last_rank_leaves_one_out(
    monkeypatch: pytest.MonkeyPatch, rank: int, combines: int
) -> None:
    """Of three combines the last rank takes part in two."""
    seen: list[Tensor] = []

    def combine(_dispatcher: Any, partial: Tensor) -> Tensor:
        seen.append(partial)
        return partial[:2]

    monkeypatch.setattr(InferenceCUDAGraphTokenDispatcher, "token_combine", combine)
    with planted("one_ahead", Case.parse(f"T=3/3,{_LAYER},history=f0.f1.f0"), rank):
        dispatcher: Any = object()
        shapes = [
            InferenceCUDAGraphTokenDispatcher.token_combine(dispatcher, torch.ones(4, 3)).shape
            for _ in range(3)
        ]
    assert (len(seen), set(shapes)) == (combines, {torch.Size([2, 3])})


def test_replays_leave_nothing_out() -> None:
    """Python does not run in a replay: the fault waits for a second forward outside graphs."""
    line = f"T=3/3,{_LAYER},mode=graphed,history=f0.f1.f0"
    assert not FAULTS["one_ahead"].reaches(Case.parse(line))
    assert FAULTS["one_ahead"].reaches(Case.parse(f"{line}.a0.g0"))


def test_cache_forgets_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another group gets the first one's transport, another tier its own."""

    def select(group: object, *, tier: object, kill_switch: bool) -> tuple[object, object, bool]:
        return group, tier, kill_switch

    monkeypatch.setattr(layer_module, "select_transport", select)
    with planted("cached_without_layout", Case.parse(f"T=3/5,{_LAYER},relation=alone")):
        ask: Any = layer_module.select_transport
        assert ask("both", tier=1, kill_switch=False) == ("both", 1, False)
        assert ask("alone", tier=1, kill_switch=False) == ("both", 1, False)
        assert ask("alone", tier=2, kill_switch=False) == ("alone", 2, False)


def test_failed_capture_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the last rank is only told once its peers have come to the barrier."""
    barriers: list[object] = []

    @contextmanager
    def capture(_graph: Any) -> Any:
        yield

    monkeypatch.setattr(CpuGraph, "capture", capture)
    monkeypatch.setattr(lifecycle.dist, "barrier", barriers.append)
    case = Case.parse(f"T=3/5,{_LAYER},mode=graphed")
    with (
        planted("collective_on_exit", case, rank=1),
        pytest.raises(MemoryError, match="no memory for the graph"),
        CpuGraph().capture(),
    ):
        pass
    assert len(barriers) == 1
