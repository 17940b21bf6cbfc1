"""Tensors as the bits that they are: what is equal here is the same memory, NaN included."""

import torch
from torch import Tensor

#: Integers of a tensor's own width, to compare and add up its bits.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaN included."""
    return (
        one.shape == other.shape
        and one.dtype == other.dtype
        and bool((as_bits(one) == as_bits(other)).all())
    )


def as_bits(tensor: Tensor) -> Tensor:
    """The same memory as integers: NaN equals itself, and -0 is not 0."""
    return tensor.contiguous().view(_BITS[tensor.element_size()])
