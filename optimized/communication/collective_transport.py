"""The tier that is always there: torch.distributed, over NCCL or gloo."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from twinmoe.optimized import launch
from twinmoe.optimized.communication.agreement import group_rank, group_size
from twinmoe.optimized.communication.checks import check_gatherable, check_partial_shape
from twinmoe.optimized.communication.eligibility import Refusals, Tier
from twinmoe.optimized.communication.report import TransportReport, counts_of

# torch 2.13 renamed both; the old names still work there, but warn.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class CollectiveTransport:
    """See `Transport`.  Outputs are ordinary tensors, allocated before the collective runs.

    The reduce-scatter adds in the wire dtype, in the backend's order.
    """

    tier = Tier.COLLECTIVE
    generation = 0  # no memory of its own

    def __init__(
        self, group: dist.ProcessGroup | None, device: torch.device, refusals: Refusals
    ) -> None:
        self.rank = group_rank(group)
        self.world_size = group_size(group)
        self._group = group
        self._device = device
        self._refusals = refusals
        self._label = "local" if group is None else _backend(group, device)

    def all_gather(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """One collective per tensor, of its bytes; see `Transport.all_gather`."""
        check_gatherable(tensors, self._device)
        return [self._gather(tensor) for tensor in tensors]

    def partial_buffer(self, num_rows: int, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
        """Ordinary memory; see `Transport.partial_buffer`."""
        check_partial_shape(num_rows, dtype, self.world_size)
        return torch.empty(num_rows, hidden_size, dtype=dtype, device=self._device)

    def reduce_scatter(self, partial: torch.Tensor) -> torch.Tensor:
        """Sum in the wire dtype, then widen; see `Transport.reduce_scatter`."""
        num_rows, hidden_size = partial.shape
        check_partial_shape(num_rows, partial.dtype, self.world_size)
        own = partial.new_empty(num_rows // self.world_size, hidden_size)
        if own.numel():
            launch.run(
                f"reduce_scatter[{self._label}]",
                lambda: self._run_scatter(own, partial),
                launch.sizes(partial),
            )
        return own.float()

    def check_peers(self) -> None:
        """Nothing to do: these collectives raise what befalls them."""

    def mistrust(self) -> None:
        """Nothing to do: these collectives protect themselves."""

    def report(self) -> TransportReport:
        """See `Transport.report`."""
        names = {f"{kind}[{self._label}]" for kind in ("all_gather", "reduce_scatter")}
        return TransportReport(
            tier=self.tier,
            label=self._label,
            rank=self.rank,
            world_size=self.world_size,
            refusals=self._refusals,
            shape_refusals={},
            launches=counts_of(names),
            pool_bytes=0,
        )

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        gathered = tensor.new_empty(len(tensor) * self.world_size, *tensor.shape[1:])
        if gathered.numel():
            launch.run(
                f"all_gather[{self._label}]",
                lambda: self._run_gather(gathered, tensor),
                launch.sizes(tensor),
            )
        return gathered

    def _run_gather(self, gathered: torch.Tensor, tensor: torch.Tensor) -> None:
        if self._group is None:
            gathered.copy_(tensor)
        else:
            # As bytes: a backend need not know the dtype to copy it.
            source = tensor.view(-1).view(torch.uint8)
            _all_gather(gathered.view(-1).view(torch.uint8), source, group=self._group)

    def _run_scatter(self, own: torch.Tensor, partial: torch.Tensor) -> None:
        if self._group is None:
            own.copy_(partial)
        else:
            _reduce_scatter(own, partial, group=self._group)


def _backend(group: dist.ProcessGroup, device: torch.device) -> str:
    """The backend that serves ``device``; "cpu:gloo,cuda:nccl" names one per device type."""
    name: str = dist.get_backend(group)
    for part in name.split(","):
        kind, _, backend = part.rpartition(":")
        if kind == device.type:
            return backend
    return name
