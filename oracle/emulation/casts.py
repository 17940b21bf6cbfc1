"""How a stored tensor gets its format: as declared, or not.

A cast takes fp32 values and the format to store them in (None: kept in fp32), and
returns the stored values, still held in fp32 tensors.  A Quantise takes values [..., n] and
a quantiser (None: nothing to do), and returns what the next GEMM multiplies: code x scale.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from twinmoe.oracle.quantise import Quantiser
from twinmoe.oracle.rounding import BF16, FORMATS, FP32, Format, round_to, ulp

Cast = Callable[[Tensor, Format | None], Tensor]
Quantise = Callable[[Tensor, Quantiser | None], Tensor]

_DTYPES = {fmt: dtype for dtype, fmt in FORMATS.items()}


def nearest(value: Tensor, stored: Format | None) -> Tensor:
    """To nearest, ties to even: PyTorch's own cast, which from fp32 rounds once."""
    if stored is None or stored is FP32:
        return value
    return value.to(_DTYPES[stored]).float()


def truncated(value: Tensor, stored: Format | None) -> Tensor:
    """WRONG: towards zero, as by cutting off the low bits."""
    if stored is None or stored is FP32:
        return value
    wide = value.double()
    unit = ulp(wide, stored)
    return (torch.trunc(wide / unit) * unit).float()


def zeros(value: Tensor, stored: Format | None) -> Tensor:
    """WRONG: the store never happened, and the buffer was cleared."""
    return torch.zeros_like(value)


def to_bf16(value: Tensor) -> Tensor:
    """Round to bf16, whatever the contract says."""
    return nearest(value, BF16)


def as_stored(value: Tensor, stored: Format | None) -> Tensor:
    """Values already rounded to ``stored``, in a tensor of its dtype."""
    return value if stored is None else value.to(_DTYPES[stored])


def divided(value: Tensor, quantiser: Quantiser | None) -> Tensor:
    """The quotients amax / 448 for a scale and value / scale for a code."""
    if quantiser is None:
        return value
    blocks = _blocks(value, quantiser)
    scale = _amax(blocks) / quantiser.codes.max_value
    return _dequantised(blocks / scale, scale, value, quantiser)


def by_reciprocals(value: Tensor, quantiser: Quantiser | None) -> Tensor:
    """The same, multiplying by a rounded 1 / 448 and by a rounded 1 / scale."""
    if quantiser is None:
        return value
    blocks = _blocks(value, quantiser)
    scale = _amax(blocks) * (1 / torch.tensor(quantiser.codes.max_value))
    return _dequantised(blocks * (1 / scale), scale, value, quantiser)


def neighbours_scale(value: Tensor, quantiser: Quantiser | None) -> Tensor:
    """WRONG: codes of one row meet the scales of the row before it."""
    if quantiser is None:
        return value
    blocks = _blocks(value, quantiser)
    scale = _amax(blocks) / quantiser.codes.max_value
    return _dequantised(blocks / scale, scale.roll(1, dims=0), value, quantiser)


def _blocks(value: Tensor, quantiser: Quantiser) -> Tensor:
    padded: Tensor = F.pad(value, (0, -value.shape[-1] % quantiser.block))
    return padded.view(*padded.shape[:-1], -1, quantiser.block)


def _amax(blocks: Tensor) -> Tensor:
    return blocks.abs().amax(dim=-1, keepdim=True)


def _dequantised(codes: Tensor, scale: Tensor, value: Tensor, quantiser: Quantiser) -> Tensor:
    codes = round_to(codes.nan_to_num().double(), quantiser.codes).float()
    return (codes * scale).flatten(-2)[..., : value.shape[-1]]
