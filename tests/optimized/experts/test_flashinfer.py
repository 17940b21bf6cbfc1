"""Backend ``flashinfer`` against a stand-in for its package: what is handed over, and when.

Legend: M rows, H hidden_size, F rows of w13, L local experts.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.optimized.experts.fake_flashinfer import FakeFlashInfer
from tests.optimized.experts.inputs import (
    config_of,
    integer_call,
    integer_weights,
    poison_rows,
    poisoned_output,
    weighted_sum,
)
from twinmoe.optimized import launch
from twinmoe.optimized.communication import AllocationDuringCapture
from twinmoe.optimized.cpu_graph import CpuGraph
from twinmoe.optimized.experts import flashinfer, grouped_mlp
from twinmoe.optimized.experts.flashinfer import (
    Absence,
    FlashInferBackend,
    declared_tactics,
    up_gate_rows,
)
from twinmoe.reference.placement import Placement

CUDA = torch.device("cuda")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeFlashInfer:
    """Put the stand-in where the package would be, and take the backend for supported."""
    fake = FakeFlashInfer()
    monkeypatch.setattr(flashinfer, "_modules", lambda: (fake.fused_moe, fake.autotuner))
    monkeypatch.setattr(FlashInferBackend, "unsupported", classmethod(lambda *_: None))
    return fake


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a Hopper GPU, as far as the refusals can see."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))


def test_up_gate_rows_exchanges_the_halves_of_every_expert() -> None:
    """[gate | up] becomes [up | gate]; twice is the identity."""
    w13_LFH = torch.arange(2 * 6 * 4).view(2, 6, 4)
    swapped, back = torch.empty_like(w13_LFH), torch.empty_like(w13_LFH)
    up_gate_rows(w13_LFH, swapped)
    assert torch.equal(swapped, torch.cat([w13_LFH[:, 3:], w13_LFH[:, :3]], dim=1))
    up_gate_rows(swapped, back)
    assert torch.equal(back, w13_LFH)


@pytest.mark.parametrize("settings", [{"hidden_act": "silu"}, {"gated": False}])
@pytest.mark.parametrize("rank", [0, 1])
def test_shares_of_every_rank_round_to_the_model_dtype(
    fake: FakeFlashInfer, settings: dict[str, Any], rank: int
) -> None:
    """Padding, foreign experts and int64 ids; into fp32 and 16-bit buffers alike."""
    config = config_of(**settings)
    weights, placement = integer_weights(config, 1), Placement(config.num_experts, 2)
    call = poison_rows(integer_call(config, 7, 2), [3, 4])
    mlp = grouped_mlp.InferenceGroupedMLP(
        config, weights.shard(placement, rank), placement, rank, "flashinfer"
    )
    expected = weighted_sum(config, weights, call, placement.experts_of(rank), rounds_all=True)
    for dtype in (torch.float32, config.dtype):
        out_MH = poisoned_output(7, config, dtype)
        before = launch.COUNTS["cutlass_fused_moe"]
        mlp(call.x_MH, call.ids_MK.long(), call.weights_MK, out_MH)
        assert launch.COUNTS["cutlass_fused_moe"] == before + 1
        torch.testing.assert_close(out_MH.double(), expected, rtol=2**-7, atol=2**-6)
        assert torch.equal(out_MH, out_MH.to(config.dtype).to(dtype))
    assert len(fake.tuned) == 2


def test_tactics_that_round_elsewhere_are_never_measured() -> None:
    """First GEMM: [0-2 | 3-5 | 6, 7 older]; second: [3 | 3 that add | 3 | 3 that add | 2]."""
    first, second = declared_tactics(8, 14)
    assert first == [0, 1, 2, 3, 4, 5]
    assert second == [8 + i for i in (6, 7, 8, 12, 13)]


def test_the_tuner_s_own_list_is_restored(fake: FakeFlashInfer) -> None:
    """Both GEMMs' lists are cut, but only while this backend tunes."""

    class Runner:
        fused_moe_runner = SimpleNamespace(
            get_gemm1_tactic_count=lambda: 8, get_gemm2_tactic_count=lambda: 14
        )

        def get_valid_tactics(self, *_: object) -> list[int]:
            return [1]

    class Stranger:
        """Another operation's, tuned by another thread meanwhile."""

        def get_valid_tactics(self, *_: object) -> list[int]:
            return [7, 8, 9]

    tuner, original = fake.autotuner.AutoTuner(), fake.autotuner.AutoTuner.choose_one
    with flashinfer._declared_tactics_only(fake.autotuner):
        first, second = (tuner.choose_one(f"moe::gemm{i}", [Runner()]) for i in (1, 2))
        assert tuner.choose_one("fp4_gemm", [Stranger()]) == [7, 8, 9]
    assert (first, second) == declared_tactics(8, 14)
    assert tuner.choose_one("moe::gemm2", [Runner()]) == [1]
    assert fake.autotuner.AutoTuner.choose_one is original


def test_dispatched_rows_go_to_one_expert_each_with_weight_one(fake: FakeFlashInfer) -> None:
    """The eager path: same roundings, no tuning for counts that change with every batch."""
    config = config_of(hidden_act="silu")
    weights = integer_weights(config, 3)
    placement = Placement(config.num_experts, 2)
    mlp = grouped_mlp.InferenceGroupedMLP(
        config, weights.shard(placement, 1), placement, 1, "flashinfer"
    )
    grouped = grouped_mlp.InferenceGroupedMLP(
        config, weights.shard(placement, 1), placement, 1, "grouped_mm"
    )
    x_SH = integer_call(config, 5, 4).x_MH
    local_expert_S = torch.tensor([0, 3, 3, 1, 2])
    y_SH = mlp.expert_rows(x_SH, local_expert_S)
    assert torch.equal(y_SH, grouped.expert_rows(x_SH, local_expert_S))
    assert mlp.expert_rows(x_SH[:0], local_expert_S[:0]).shape == (0, config.hidden_size)
    assert fake.tuned == [(False, (5,))]


def test_every_number_of_rows_is_tuned_once_and_never_in_a_capture(fake: FakeFlashInfer) -> None:
    """First call of a size tunes exactly that size; a capture of a new size is refused."""
    config = config_of(hidden_act="silu")
    backend = FlashInferBackend(config, integer_weights(config, 5), 0)

    def forward(rows: int) -> None:
        call = integer_call(config, rows, 6)
        out_MH = poisoned_output(rows, config, config.dtype)
        backend.forward(call.x_MH, call.ids_MK, call.weights_MK, out_MH)

    for rows in (4, 4, 9):
        forward(rows)
    assert fake.tuned == [(True, (4,)), (False, (4,)), (True, (9,))]
    with CpuGraph().capture():
        forward(9)
    with pytest.raises(AllocationDuringCapture, match="meets 5 rows"), CpuGraph().capture():
        forward(5)


@pytest.mark.usefixtures("fake")
def test_reloaded_weights_reach_the_reordered_copy_in_place() -> None:
    """After a refresh the same storage holds the new rows, so live graphs follow."""
    config = config_of(hidden_act="silu")
    weights, replacement = integer_weights(config, 7), integer_weights(config, 8)
    backend = FlashInferBackend(config, weights, 0)
    address = backend._w13_LFH.data_ptr()
    weights.copy_(replacement)
    backend.refresh()
    expected = torch.empty_like(weights.w13_LFH)
    up_gate_rows(replacement.w13_LFH, expected)
    assert backend._w13_LFH.data_ptr() == address
    assert torch.equal(backend._w13_LFH, expected)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("settings", "reason", "value"),
    [
        ({"dtype": torch.float16}, Absence.DTYPE, "(torch.float16)"),
        ({"hidden_act": "relu"}, Absence.ACTIVATION, "(gated relu)"),
        ({"hidden_act": "silu", "swiglu_limit": 7.0}, Absence.ACTIVATION, "(7.0)"),
        ({"hidden_act": "silu", "router_weight_on_input": True}, Absence.SETTING, "(True)"),
        ({"hidden_act": "silu", "hidden_size": 12}, Absence.SIZE, "hidden_size (12)"),
    ],
)
def test_a_layer_that_it_cannot_run_is_refused_with_a_reason_of_a_closed_list(
    settings: dict[str, Any], reason: Absence, value: str
) -> None:
    """The reason's word, the value, and what to use instead."""
    text = FlashInferBackend.unsupported(config_of(**settings), CUDA)
    assert text is not None
    assert text.startswith(f"{reason.value}: ")
    assert value in text
    assert "triton backend" in text


@pytest.mark.usefixtures("hopper")
def test_a_missing_package_is_a_reason_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Doctor and automatic choice go on without it, and say how to install it."""

    def missing() -> None:
        raise ImportError("no module named flashinfer")

    monkeypatch.setattr(flashinfer, "_modules", missing)
    flashinfer._import_failure.cache_clear()
    text = FlashInferBackend.unsupported(config_of(hidden_act="silu"), CUDA)
    flashinfer._import_failure.cache_clear()
    assert text is not None
    assert text.startswith("not installed: ")
    assert "pip install 'twinmoe[cuda]'" in text


def test_other_devices_are_refused_before_anything_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A CPU, and a GPU whose rounding nobody measured."""
    monkeypatch.setattr(flashinfer, "_modules", lambda: pytest.fail("imported"))
    config = config_of(hidden_act="silu")
    for device, capability in (("cpu", None), ("cuda", (10, 0)), ("cuda", (8, 0))):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _d, c=capability: c)
        text = FlashInferBackend.unsupported(config, torch.device(device))
        assert text is not None
        assert text.startswith("device: ")
