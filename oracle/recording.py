"""Real hidden states as an input kind: what a trained transformer feeds its MLP on real prose.

Random inputs have channels of equal size.  Trained transformers do not: a few channels are many
times larger than the rest on nearly every token, and it is there that a lossy accumulation or
a shared quantisation scale shows.  Provenance and licence: ``oracle/recordings/README.md``.

Shapes: T tokens asked for, H hidden_size asked for, N tokens and C channels recorded.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import torch
from safetensors.torch import load

RECORDING = "minilm_alice.safetensors"
#: Of the whole file.  Another recording is another input, so old replay lines would mean less.
RECORDING_SHA256 = "672aaa30116692927198aafa092fcbdcb00a65f8d9e9f75762e880125056b283"


def recorded_hidden_states(num_tokens: int, hidden_size: int, seed: int) -> torch.Tensor:
    """Return recorded hidden states, bf16 ``[T, H]`` on the CPU, the same for the same arguments.

    Rows are the recorded tokens in a seeded order, each once before any repeats.  Columns are the
    recorded channels in their own order, starting at a seeded one and going round: a narrower
    layer sees a window, a wider one the channels again from the start.  The start is drawn such
    that the strongest outlier channel lies inside every window, even one of width 1.

    Raises:
        ValueError: ``num_tokens`` is negative or ``hidden_size`` is less than 1.
    """
    if num_tokens < 0:
        raise ValueError(f"num_tokens ({num_tokens}) must be at least 0: it counts rows")
    if hidden_size < 1:
        raise ValueError(f"hidden_size ({hidden_size}) must be at least 1: it counts channels")
    recorded_NC = _recording()
    num_recorded, num_channels = recorded_NC.shape
    generator = torch.Generator().manual_seed(seed)

    token_order = torch.randperm(num_recorded, generator=generator)
    rows_T = token_order[torch.arange(num_tokens) % num_recorded]

    column_of_outlier = torch.randint(min(hidden_size, num_channels), (), generator=generator)
    first_channel = strongest_channel(recorded_NC) - int(column_of_outlier)
    columns_H = (first_channel + torch.arange(hidden_size)) % num_channels
    return recorded_NC[rows_T][:, columns_H].contiguous()


def channel_rms(hidden_TH: torch.Tensor) -> torch.Tensor:
    """Return the root mean square of each channel over the tokens, fp32 ``[H]``."""
    return hidden_TH.float().square().mean(dim=0).sqrt()


def strongest_channel(hidden_TH: torch.Tensor) -> int:
    """Return the index of the channel with the largest root mean square."""
    return int(channel_rms(hidden_TH).argmax())


@cache
def _recording() -> torch.Tensor:
    """Return everything recorded, bf16 ``[N, C]``.  Shared by all callers: never write to it."""
    resource = files("twinmoe.oracle") / "recordings" / RECORDING
    return load(resource.read_bytes())["hidden_TH"]
