"""How a stored tensor gets its format: as declared, or not.

A cast takes fp32 values and the format to store them in (None: kept in fp32), and
returns the stored values, still held in fp32 tensors.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from twinmoe.oracle.rounding import BF16, FORMATS, FP32, Format, ulp

Cast = Callable[[Tensor, Format | None], Tensor]

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
