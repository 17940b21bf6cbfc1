"""What a dispatcher may ask of a transport, whichever tier runs."""

from collections.abc import Sequence
from typing import Protocol

import torch

from twinmoe.optimized.communication.eligibility import Tier
from twinmoe.optimized.communication.report import TransportReport


class Transport(Protocol):
    """Two collectives over one group.

    Every method but `report` is called by all ranks in the same order, with the same shapes and
    dtypes.
    """

    @property
    def tier(self) -> Tier:
        """The tier that all ranks agreed on."""

    @property
    def rank(self) -> int:
        """Rank of this process in the group."""

    @property
    def world_size(self) -> int:
        """Number of ranks R."""

    @property
    def generation(self) -> int:
        """Which memory the collectives run on: graphs captured on another one are void."""

    def all_gather(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Gather contiguous [n, ...] tensors along their first dimension: [R * n, ...] each.

        Results hold exactly the bits that went in.  They may be views of a shared buffer, valid
        until the next all-gather of any transport on the same pool.  Raises ValueError for a
        tensor that is not contiguous or on another device, `SymmetricBufferOverflow` for one that
        is too large.
        """

    def partial_buffer(self, num_rows: int, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
        """[num_rows, hidden_size] of fp32, bf16 or fp16 to write this rank's partial results into.

        Content is undefined.  Ask again for every reduce-scatter: asking is what makes sure that
        no peer still reads the previous partial results.
        """

    def reduce_scatter(self, partial: torch.Tensor) -> torch.Tensor:
        """Sum `partial_buffer`'s rows over ranks; return this rank's, fp32 [num_rows / R, hidden].

        The summation order is the tier's: rank order for p2p, unspecified for the others.
        """

    def check_peers(self) -> None:
        """Raise `PeerTimeout` if a kernel of this rank waited for a peer in vain.

        Never waits: what is still running on a device is heard of later.
        """

    def mistrust(self) -> None:
        """Start the next collective as safely as if anything had been launched before it.

        For all ranks, when a capture failed: what a rank launched last, it may now remember
        otherwise than its peers.
        """

    def report(self) -> TransportReport:
        """Say what runs, why nothing better does, and what was launched so far."""
