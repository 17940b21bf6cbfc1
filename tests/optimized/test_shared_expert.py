"""The shared expert for inference: the reference on a CPU, and its stream."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from twinmoe.optimized.shared_expert import InferenceSharedExpert, SideStream
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.shared_expert import SharedExpertMLP
from twinmoe.reference.weights import MoEWeights


def test_on_a_cpu_it_is_the_reference() -> None:
    """With a gate and without, bit for bit."""
    for gated in (True, False):
        config = MoEConfig(
            hidden_size=24,
            moe_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
            shared_expert_intermediate_size=40,
            shared_expert_gate=gated,
        )
        weights = MoEWeights.random(config, 0)
        x_TH = torch.randn(5, 24, generator=torch.Generator().manual_seed(1)).bfloat16()
        expected = SharedExpertMLP(config, weights)(x_TH)
        assert torch.equal(InferenceSharedExpert(config, weights)(x_TH), expected)


def test_without_streams_work_runs_when_it_is_started() -> None:
    """On a CPU a later write to the input does not change what was started."""
    x = torch.ones(3)
    join = SideStream(torch.device("cpu")).start(lambda: x * 2)
    x.zero_()
    assert torch.equal(join(), torch.full((3,), 2.0))


def test_a_failure_beside_leaves_no_stream_astray(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture that ends with a stream astray would raise its own error over the real one."""
    waits: list[tuple[str, str]] = []

    def stream(name: str) -> SimpleNamespace:
        def wait(other: SimpleNamespace) -> None:
            waits.append((name, other.name))

        return SimpleNamespace(name=name, wait_stream=wait)

    def fails() -> torch.Tensor:
        raise OSError("no memory")

    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream("current"))
    monkeypatch.setattr(torch.cuda, "stream", lambda _side: nullcontext())
    with pytest.raises(OSError, match="no memory"):
        SideStream(torch.device("cuda", 0)).start(fails)
    assert waits == [("side", "current"), ("current", "side")]
