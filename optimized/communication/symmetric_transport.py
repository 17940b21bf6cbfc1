"""The nvls and p2p tiers: our kernels over a pool of symmetric memory."""

from collections.abc import Sequence

import torch

from twinmoe.optimized.communication.all_gather import all_gather
from twinmoe.optimized.communication.barrier import barrier
from twinmoe.optimized.communication.checks import check_gatherable, check_partial_shape
from twinmoe.optimized.communication.eligibility import Refusal, Refusals, Tier
from twinmoe.optimized.communication.errors import TransportError
from twinmoe.optimized.communication.multimem import Leaf
from twinmoe.optimized.communication.order import Collective
from twinmoe.optimized.communication.packing import MIN_MULTICAST_LANE_BYTES, PackedTensor, pack
from twinmoe.optimized.communication.pool import SymmetricPool
from twinmoe.optimized.communication.reduce_scatter import reduce_scatter
from twinmoe.optimized.communication.report import TransportReport, counts_of
from twinmoe.optimized.launch import capturing

_LABELS = {
    Leaf.P2P: "p2p",
    Leaf.MULTICAST: "nvls",
    Leaf.MULTICAST_EMULATED: "nvls (emulated)",
}


class SymmetricTransport:
    """See `Transport`.  Which leaf a call takes is a function of its shapes alone."""

    def __init__(
        self, pool: SymmetricPool, leaf: Leaf, device: torch.device, refusals: Refusals
    ) -> None:
        self.tier = Tier.P2P if leaf is Leaf.P2P else Tier.NVLS
        self.rank = pool.memory.rank
        self.world_size = pool.memory.world_size
        self._pool = pool
        self._leaf = leaf
        self._device = device
        self._refusals = refusals
        self._shape_refusals: dict[str, Refusal] = {}

    @property
    def generation(self) -> int:
        """See `Transport.generation`."""
        return self._pool.generation

    def check_peers(self) -> None:
        """See `Transport.check_peers`."""
        self._pool.memory.patience.check(self.rank)

    def mistrust(self) -> None:
        """See `Transport.mistrust`."""
        self._pool.order.record(Collective.UNKNOWN)

    def all_gather(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Push all tensors in one launch; see `Transport.all_gather`."""
        check_gatherable(tensors, self._device)
        shapes = [(len(t) * self.world_size, *t.shape[1:]) for t in tensors]
        packed, total = pack([t.numel() * t.element_size() for t in tensors], self.world_size)
        if total == 0:
            return [t.new_empty(shape) for t, shape in zip(tensors, shapes, strict=True)]
        region = self._pool.all_gather_region(total)
        self._refuse_gathered_sources(tensors)
        leaf, label = self._leaf_for(packed, f"all_gather {[list(t.shape) for t in tensors]}")
        all_gather(
            self._pool.memory,
            region,
            tensors,
            packed,
            leaf=leaf,
            num_ctas=self._pool.num_ctas,
            leading_barrier=self._pool.order.repeats(Collective.ALL_GATHER),
            name=f"all_gather[{label}]",
        )
        self._launched(Collective.ALL_GATHER)
        return [
            self._pool.view(region + slot.offset, shape, t.dtype)
            for t, shape, slot in zip(tensors, shapes, packed, strict=True)
        ]

    def partial_buffer(self, num_rows: int, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
        """View the pool where no peer reads any more; see `Transport.partial_buffer`."""
        check_partial_shape(num_rows, dtype, self.world_size)
        region = self._pool.reduce_scatter_region(num_rows * hidden_size * dtype.itemsize)
        if num_rows and self._pool.order.repeats(Collective.REDUCE_SCATTER):
            barrier(self._pool.memory, self._pool.num_ctas)
            self._launched(Collective.BARRIER)
        return self._pool.view(region, (num_rows, hidden_size), dtype)

    def reduce_scatter(self, partial: torch.Tensor) -> torch.Tensor:
        """Pull and sum this rank's rows; see `Transport.reduce_scatter`."""
        num_rows, hidden_size = partial.shape
        check_partial_shape(num_rows, partial.dtype, self.world_size)
        num_rows //= self.world_size
        out = torch.empty(num_rows, hidden_size, dtype=torch.float32, device=self._device)
        packed = PackedTensor(0, out.numel() * partial.element_size())
        if packed.slice_bytes == 0:
            return out
        region = self._pool.reduce_scatter_region(packed.slice_bytes * self.world_size)
        self._check_partial(partial, region)
        leaf, label = self._leaf_for(
            (packed,), f"reduce_scatter {list(partial.shape)} {partial.dtype}"
        )
        reduce_scatter(
            self._pool.memory,
            region,
            out,
            packed,
            partial.dtype,
            leaf=leaf,
            num_ctas=self._pool.num_ctas,
            name=f"reduce_scatter[{label}]",
        )
        self._launched(Collective.REDUCE_SCATTER)
        return out

    def report(self) -> TransportReport:
        """See `Transport.report`."""
        labels = {_LABELS[self._leaf]}
        if self._shape_refusals:
            labels.add(_LABELS[Leaf.P2P])
        names = {
            f"{kind}[{label}]" for kind in ("all_gather", "reduce_scatter") for label in labels
        }
        return TransportReport(
            tier=self.tier,
            label=_LABELS[self._leaf],
            rank=self.rank,
            world_size=self.world_size,
            refusals=self._refusals,
            shape_refusals=dict(self._shape_refusals),
            launches=counts_of({*names, "barrier"}),
            pool_bytes=self._pool.capacity.total_bytes,
        )

    def _leaf_for(self, packed: Sequence[PackedTensor], call: str) -> tuple[Leaf, str]:
        """Pick the leaf that these lanes allow, and the name that its launches are counted under.

        Multicast needs wide lanes.  Narrower ones go from peer to peer, but in the loops that
        round a sum as the switch does: one tier, one contract for all shapes.
        """
        narrow = any(slot.lane_bytes < MIN_MULTICAST_LANE_BYTES for slot in packed)
        if self._leaf is Leaf.P2P or not narrow:
            return self._leaf, _LABELS[self._leaf]
        self._shape_refusals[call] = Refusal.MISALIGNED
        return Leaf.MULTICAST_EMULATED, _LABELS[Leaf.P2P]

    def _launched(self, collective: Collective) -> None:
        self.check_peers()
        self._pool.order.record(collective)
        self._pool.captured = self._pool.captured or capturing()

    def _refuse_gathered_sources(self, tensors: Sequence[torch.Tensor]) -> None:
        start = self._pool.memory.buffer.data_ptr() + self._pool.capacity.all_gather_offset
        end = start + self._pool.capacity.all_gather_bytes
        for i, tensor in enumerate(tensors):
            if start <= tensor.data_ptr() < end:
                raise TransportError(
                    f"tensor {i} of the all-gather is itself a gathered view of pool "
                    f"{self._pool.name!r}: peers overwrite it while it is read; pass a clone"
                )

    def _check_partial(self, partial: torch.Tensor, region: int) -> None:
        start = self._pool.memory.buffer.data_ptr() + region
        if partial.data_ptr() != start or not partial.is_contiguous():
            raise TransportError(
                f"partial {list(partial.shape)} does not lie in pool {self._pool.name!r}: peers "
                "read this rank's rows there; write them into partial_buffer() of this transport"
            )
        if self._pool.order.repeats(Collective.REDUCE_SCATTER):
            raise TransportError(
                "two reduce-scatters in a row on one partial buffer: peers may have been reading "
                "it while it was written; call partial_buffer() before writing each time"
            )
