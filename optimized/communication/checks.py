"""What every tier demands of the tensors that it is given."""

from collections.abc import Sequence

import torch

from twinmoe.optimized.communication.reduce_scatter import WIRE_DTYPES


def check_gatherable(tensors: Sequence[torch.Tensor], device: torch.device) -> None:
    """Raise ValueError unless ``tensors`` are contiguous [n, ...] of one n on ``device``."""
    for i, tensor in enumerate(tensors):
        if tensor.dim() == 0 or len(tensor) != len(tensors[0]):
            raise ValueError(
                f"tensor {i} of the all-gather has shape {list(tensor.shape)}, tensor 0 "
                f"{list(tensors[0].shape)}: they are gathered along a first dimension that they "
                "share; pass [n, ...] tensors of one n"
            )
        if not tensor.is_contiguous():
            raise ValueError(
                f"tensor {i} of the all-gather, shape {list(tensor.shape)}, has strides "
                f"{list(tensor.stride())}: only contiguous bytes are moved; pass .contiguous()"
            )
        if tensor.device != device:
            raise ValueError(
                f"tensor {i} of the all-gather is on {tensor.device}, the transport on {device}: "
                "kernels address one device; move the tensor"
            )


def check_partial_shape(num_rows: int, dtype: torch.dtype, world_size: int) -> None:
    """Raise ValueError unless partial results of ``dtype`` can be summed and split evenly."""
    if num_rows % world_size:
        raise ValueError(
            f"num_rows ({num_rows}) must be divisible by the world size ({world_size}): every "
            "rank gets as many rows back as it gathered; pad to a common number of tokens"
        )
    if dtype not in WIRE_DTYPES:
        raise ValueError(
            f"dtype ({dtype}) is not summed by a reduce-scatter: partial results are stored as "
            f"one of {', '.join(str(known) for known in WIRE_DTYPES)}"
        )
