"""The recorded hidden states: unchanged, dealt out by seed, and truly with outlier channels."""

from __future__ import annotations

import hashlib
from importlib.resources import files

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twinmoe.oracle.recording import (
    RECORDING,
    RECORDING_SHA256,
    channel_rms,
    recorded_hidden_states,
    strongest_channel,
)

NUM_RECORDED = 377
NUM_CHANNELS = 384

#: The recording measures 10.4 (its README); seeded normal data of its shape stays below 1.2.
OUTLIER_FACTOR = 10.0


def outlier_factor(hidden_TH: torch.Tensor) -> float:
    """Return the largest channel rms over the median channel rms."""
    rms_H = channel_rms(hidden_TH)
    return float(rms_H.max() / rms_H.median())


def test_the_recording_is_the_one_described() -> None:
    """The file shipped has the SHA-256 that the code and its README name, and is small."""
    folder = files("twinmoe.oracle") / "recordings"
    content = (folder / RECORDING).read_bytes()
    assert hashlib.sha256(content).hexdigest() == RECORDING_SHA256
    assert RECORDING_SHA256 in (folder / "README.md").read_text(encoding="utf-8")
    assert len(content) < 500_000


def test_it_has_the_outlier_channels_that_random_data_lacks() -> None:
    """One channel's rms is more than ten times the median; normal data has no such channel."""
    recorded_TH = recorded_hidden_states(NUM_RECORDED, NUM_CHANNELS, seed=0)
    normal_TH = torch.randn(recorded_TH.shape, generator=torch.Generator().manual_seed(0))
    assert outlier_factor(recorded_TH) > OUTLIER_FACTOR
    assert outlier_factor(normal_TH) < 1.2


@given(
    num_tokens=st.integers(0, 800),
    hidden_size=st.integers(1, 800),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_shape_is_finite_and_keeps_the_outlier(
    num_tokens: int, hidden_size: int, seed: int
) -> None:
    """Any shape and seed: bf16, finite, contiguous, the same twice, with the outlier channel."""
    hidden_TH = recorded_hidden_states(num_tokens, hidden_size, seed)
    assert hidden_TH.shape == (num_tokens, hidden_size)
    assert hidden_TH.dtype == torch.bfloat16
    assert hidden_TH.is_contiguous()
    assert hidden_TH.isfinite().all()
    assert torch.equal(hidden_TH, recorded_hidden_states(num_tokens, hidden_size, seed))

    everything_TH = recorded_hidden_states(NUM_RECORDED, hidden_size, seed)
    whole_TH = recorded_hidden_states(NUM_RECORDED, NUM_CHANNELS, seed=0)
    assert channel_rms(everything_TH).max() == channel_rms(whole_TH).max()


def test_rows_come_once_each_before_any_repeats() -> None:
    """The first 377 rows are 377 different tokens; row 377 is row 0 again."""
    hidden_TH = recorded_hidden_states(NUM_RECORDED + 1, NUM_CHANNELS, seed=3)
    assert len(torch.unique(hidden_TH[:-1].view(torch.int16), dim=0)) == NUM_RECORDED
    assert torch.equal(hidden_TH[0], hidden_TH[-1])


def test_the_seed_moves_tokens_and_channels() -> None:
    """Another seed gives other rows, and puts the outlier channel in another column."""
    columns = {strongest_channel(recorded_hidden_states(64, 64, seed)) for seed in range(8)}
    first_TH, second_TH = (recorded_hidden_states(64, 64, seed) for seed in (0, 1))
    assert len(columns) > 1
    assert not torch.equal(first_TH, second_TH)


def test_a_caller_cannot_spoil_the_recording() -> None:
    """What is returned is the caller's own: writing to it changes nothing for the next one."""
    before_TH = recorded_hidden_states(8, NUM_CHANNELS, seed=0)
    recorded_hidden_states(8, NUM_CHANNELS, seed=0).zero_()
    assert torch.equal(before_TH, recorded_hidden_states(8, NUM_CHANNELS, seed=0))


@pytest.mark.parametrize(
    ("num_tokens", "hidden_size", "message"),
    [(-1, 8, r"num_tokens \(-1\) must be at least 0"), (8, 0, r"hidden_size \(0\) must be")],
)
def test_impossible_shapes_are_refused(num_tokens: int, hidden_size: int, message: str) -> None:
    """A negative token count or an empty hidden size raises, naming the value and the rule."""
    with pytest.raises(ValueError, match=message):
        recorded_hidden_states(num_tokens, hidden_size, seed=0)
