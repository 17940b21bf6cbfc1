"""Capture on one GPU: what it refuses, what it survives, and the stream beside it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.gpu.layers import BUCKET, CONFIG, batch, layer_of
from twinmoe.optimized.communication import AllocationDuringCapture
from twinmoe.optimized.experts import backend_report
from twinmoe.optimized.graph import GraphRunner
from twinmoe.optimized.shared_expert import InferenceSharedExpert
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.weights import MoEWeights

HERE = RankContext(0, 1, None, torch.device("cuda", 0))
#: About a millisecond of a Hopper GPU's cycles.
DELAY = 2_000_000


def backend(name: str) -> str:
    """``name``, or a skip that says why it does not run here."""
    reason = backend_report(CONFIG, HERE.device)[name]
    if reason is not None:
        pytest.skip(reason)
    return name


def test_a_rendezvous_during_capture_is_refused_by_name() -> None:
    """Choosing a transport inside a capture raises before it can hang or be baked in."""
    layer = layer_of(HERE)
    with pytest.raises(AllocationDuringCapture), torch.cuda.graph(torch.cuda.CUDAGraph()):
        layer.set_kill_switch(True)


def test_tuning_during_capture_is_refused_by_name() -> None:
    """FlashInfer's tuner allocates and synchronises: a size it has not seen is no capture's."""
    layer = layer_of(HERE, backend=backend("flashinfer"))
    with layer.graphed():
        layer(batch(HERE, CONFIG, 4, seed=0))  # compiles what does not depend on the size
    hidden_NH = batch(HERE, CONFIG, 3, seed=0)
    with (
        layer.graphed(),
        pytest.raises(AllocationDuringCapture),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        layer(hidden_NH)


@pytest.mark.parametrize("name", ["grouped_mm", "triton", "flashinfer"])
def test_weights_reloaded_under_a_live_graph_take_effect(name: str) -> None:
    """The graph captured with the old weights gives the bits of a layer built with the new."""
    runner = GraphRunner(layer_of(HERE, backend=backend(name)), (BUCKET,))
    hidden_TH = batch(HERE, CONFIG, 9, seed=1)
    old_TH = runner(hidden_TH)
    runner.layer.reload(MoEWeights.random(CONFIG, 1).to("cuda"))
    fresh = GraphRunner(layer_of(HERE, backend=name, seed=1), (BUCKET,))
    new_TH = runner(hidden_TH)
    assert not torch.equal(new_TH, old_TH)
    assert torch.equal(new_TH, fresh(hidden_TH))


@pytest.mark.parametrize("late", ["beside", "main"])
def test_the_shared_expert_s_stream_is_forked_and_joined(
    late: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever stream is late, in a graph or not: the same bits as when neither is."""
    hidden_TH = batch(HERE, CONFIG, 9, seed=2)
    expected_TH = GraphRunner(layer_of(HERE), (BUCKET,))(hidden_TH)
    _delay(monkeypatch, late)
    layer = layer_of(HERE)
    runner = GraphRunner(layer, (BUCKET,))
    for seed in (5, 2, 6, 2):
        output_TH = runner(batch(HERE, CONFIG, 9, seed))
        if seed == 2:
            assert torch.equal(output_TH, expected_TH)
    padded_NH = torch.zeros(BUCKET, CONFIG.hidden_size, dtype=CONFIG.dtype, device="cuda")
    for _ in range(3):
        torch.cuda._sleep(DELAY)
        padded_NH[:9].copy_(hidden_TH)
        with layer.graphed():
            output_NH = layer(padded_NH, torch.tensor([9], dtype=torch.int32, device="cuda"))
        padded_NH.fill_(torch.nan)
        assert torch.equal(output_NH[:9], expected_TH)


def _delay(monkeypatch: pytest.MonkeyPatch, late: str) -> None:
    """Let the shared expert, or what runs beside it, start a millisecond late."""
    forward: Callable[..., Tensor] = InferenceSharedExpert.forward
    if late == "main":
        from twinmoe.optimized.router import InferenceTopKRouter as Delayed  # noqa: PLC0415

        forward = Delayed.forward
    else:
        Delayed = InferenceSharedExpert  # type: ignore[misc, assignment]

    def delayed(*args: object, **kwargs: object) -> object:
        torch.cuda._sleep(DELAY)
        return forward(*args, **kwargs)

    monkeypatch.setattr(Delayed, "forward", delayed)
