"""What a forward leaves behind for a planted fault to find, in a graph's replays as well."""

import torch
from torch import Tensor

from twinmoe.optimized.launch import capturing


class Leftover:
    """The rows of the forward before, in a tensor of their own: a replay runs no Python.

    ``like`` has as many rows as any forward, and is made outside a capture, which would record
    that the rows are cleared.
    """

    def __init__(self, like: Tensor) -> None:
        self._rows = torch.zeros_like(like)
        self._left = torch.zeros(len(like), *[1] * (like.ndim - 1), dtype=torch.bool).to(
            like.device
        )

    def exchange(self, now: Tensor, first: Tensor) -> Tensor:
        """Leave ``now``; return the forward before in as many rows, ``first`` where it had none."""
        rows, left = self._rows[: len(now)], self._left[: len(now)]
        before = rows.where(left, first)
        if not rehearsing(now):
            rows.copy_(now)
            self._left.fill_(False)
            left.fill_(True)
        return before


def rehearsing(tensor: Tensor) -> bool:
    """Whether this run is the CPU stand-in's capture, which computes what a GPU only records."""
    return capturing() and not tensor.is_cuda
