"""AllGather/ReduceScatter token dispatch, fit for a CUDA graph.

Every rank gets every rank's tokens, computes its own experts on them, and the partial
sums are reduced back to their owners.  Sizes are those of the graph's bucket and never
depend on routing, so there is nothing to synchronise with the host.

Legend: N rows of the bucket on each rank, R ranks, H hidden_size, K experts per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from twinmoe.optimized.communication.interface import Transport
from twinmoe.optimized.router import Routing


@dataclass(frozen=True)
class Gathered:
    """Every rank's rows, rank after rank: hidden [R*N, H], ids and weights [R*N, K]."""

    hidden: Tensor
    ids: Tensor
    weights: Tensor


class InferenceCUDAGraphTokenDispatcher:
    """Dispatch by one fused all-gather, combine by one reduce-scatter.

    The method names are those of Megatron-Core's class of this name.  The two
    pass-through steps exist because its layer calls them; here, as there, no permutation
    is needed: the experts read the routing map themselves.
    """

    def __init__(self, transport: Transport, wire_dtype: torch.dtype) -> None:
        self.transport = transport
        self.wire_dtype = wire_dtype

    def token_dispatch(self, hidden_NH: Tensor, routing: Routing) -> Gathered:
        """Gather routing map, weights and hidden states of all ranks in one launch."""
        ids, weights, hidden = self.transport.all_gather(
            [routing.ids_TK, routing.weights_TK, hidden_NH]
        )
        return Gathered(hidden, ids, weights)

    def dispatch_postprocess(self, gathered: Gathered) -> Gathered:
        """Pass through: experts take rows unpermuted."""
        return gathered

    def partial_buffer(self, gathered: Gathered) -> Tensor:
        """Where the experts write this rank's share of every row, [R*N, H]."""
        rows, hidden = gathered.hidden.shape
        return self.transport.partial_buffer(rows, hidden, self.wire_dtype)

    def combine_preprocess(self, partial: Tensor) -> Tensor:
        """Pass through: the shares are already in row order."""
        return partial

    def token_combine(self, partial: Tensor) -> Tensor:
        """Sum all ranks' shares of this rank's rows: fp32 [N, H]."""
        return self.transport.reduce_scatter(partial)
