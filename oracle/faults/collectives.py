"""Faults of collectives: how sums round, what fits, where a slice starts, which path is taken.

Legend: N rows of a bucket, H hidden_size, R ranks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from twinmoe.optimized.communication import all_gather as gathering
from twinmoe.optimized.communication.eligibility import Refusal, Tier
from twinmoe.optimized.communication.multimem import Leaf
from twinmoe.optimized.communication.packing import (
    MIN_MULTICAST_LANE_BYTES,
    PackedTensor,
    lane_bytes,
)
from twinmoe.optimized.communication.symmetric_transport import SymmetricTransport
from twinmoe.optimized.dispatcher import InferenceCUDAGraphTokenDispatcher
from twinmoe.optimized.launch import run, sizes
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults.fault import fault
from twinmoe.oracle.faults.seams import Seams, Wrong
from twinmoe.oracle.faults.triggers import bucket_of, in_graph, symmetric
from twinmoe.oracle.faults.visits import owners_of_a_token, visited
from twinmoe.reference.placement import Placement

# --- how sums round -----------------------------------------------------------------------------

#: All ranks' partial results for one rank, in rank order, in the wire dtype; and its own place.
Add = Callable[[Sequence[Tensor], int], Tensor]


def _sum_by(seams: Seams, add: Add, tiers: Sequence[Tier]) -> None:
    """Let the reduce-scatter of ``tiers`` add by ``add``; its own sum is thrown away."""

    def summed(scatter: Wrong, transport: Any, partial: Tensor) -> Tensor:
        right: Tensor = scatter(transport, partial)
        if transport.tier not in tiers or transport.world_size == 1:
            return right
        everyone = [torch.empty_like(partial) for _ in range(transport.world_size)]

        def gather() -> None:
            as_bytes = [tensor.view(torch.uint8) for tensor in (partial, *everyone)]
            dist.all_gather(as_bytes[1:], as_bytes[0], group=seams.context.group)

        run("all_gather_partials", gather, sizes(partial))
        own = [other.chunk(transport.world_size)[transport.rank] for other in everyone]
        return add(own, transport.rank).float()

    seams.around(SymmetricTransport, "reduce_scatter", summed)


def _narrow_wire(case: Case) -> bool:
    return symmetric(case) and case.wire == "model" and case.config.dtype is not torch.float32


def _rounds_between(case: Case) -> bool:
    """Terms of three ranks meet: the switch's one rounding is not all that can happen."""
    return _narrow_wire(case) and case.transport == "nvls" and owners_of_a_token(case) > 2


def _in_turn(terms: Sequence[Tensor], first: int) -> Tensor:
    """Start at rank ``first``, round after each addition."""
    total = terms[first]
    for step in range(1, len(terms)):
        total = total + terms[(first + step) % len(terms)]
    return total


@fault(
    "CL12",
    "pytorch/pytorch#137529",
    "the switch adds 16-bit numbers in 16 bits instead of fp32",
    stage="combine",
    when=_rounds_between,
)
def narrow_accumulator(seams: Seams) -> None:
    """Every addition rounds to the wire dtype; two terms would still round only once."""
    _sum_by(seams, _in_turn, (Tier.NVLS,))


@fault(
    "CL13",
    "tenstorrent/tt-metal#36749",
    "a reduce-scatter passes sums round a ring and rounds them at each hop",
    stage="combine",
    when=lambda case: (
        _rounds_between(case)
        or (_narrow_wire(case) and case.transport == "p2p" and owners_of_a_token(case) > 1)
    ),
)
def rounded_at_each_hop(seams: Seams) -> None:
    """The ring ends at the rank that keeps the sum."""
    _sum_by(seams, lambda terms, rank: _in_turn(terms, (rank + 1) % len(terms)), tuple(Tier))


# --- what fits ----------------------------------------------------------------------------------

#: Rows of each rank that the buffer is believed to hold.
_FITTING = 4


def _foreign_share_beyond(case: Case) -> bool:
    placement = Placement(case.config.num_experts, case.ep_size)
    return any(
        bool((placement.owner(ids_TK[_FITTING:]) != rank).any())
        for rank, ids_TK in enumerate(visited(case))
    )


@fault(
    "CL14",
    "sgl-project/sglang#24548",
    "a sum in place takes what fits into the symmetric buffer, and leaves the rest as it is",
    stage="combine",
    when=lambda case: symmetric(case) and _foreign_share_beyond(case),
)
def truncated_payload(seams: Seams) -> None:
    """From the fifth row on, a rank keeps its own share for the sum: a buffer scaled down."""

    def truncated(scatter: Wrong, transport: Any, partial: Tensor) -> Tensor:
        summed: Tensor = scatter(transport, partial)
        own = partial.chunk(transport.world_size)[transport.rank] if len(partial) else partial
        return torch.cat([summed[:_FITTING], own[_FITTING:].float()])

    seams.around(SymmetricTransport, "reduce_scatter", truncated)


# --- where a slice starts -----------------------------------------------------------------------


def _shares_a_lane(case: Case) -> bool:
    """A lane is wider than an element, so one element off is off a lane's boundary."""
    config = case.config
    elements = bucket_of(case) * config.hidden_size
    return in_graph(case) and case.transport in ("p2p", "nvls") and elements % 2 == 0


@fault(
    "CL15",
    "ztxz16/fastllm#724",
    "vector loads are chosen by size, not by alignment, and round an odd address down",
    stage="dispatch",
    when=_shares_a_lane,
)
def address_rounded_down(seams: Seams) -> None:
    """Hidden states arrive as a view one element into a buffer, as a slice may be."""

    def as_words(_as_words: Wrong, tensor: Tensor, packed: PackedTensor) -> Tensor:
        past = tensor.data_ptr() % packed.lane_bytes // tensor.element_size()
        start = tensor.storage_offset() - past
        loaded = tensor.as_strided((tensor.numel(),), (1,), start)
        return loaded.view(torch.uint8).view(packed.word_dtype)

    def dispatch(original: Wrong, dispatcher: Any, hidden_NH: Tensor, routing: Any) -> Any:
        buffer = hidden_NH.new_zeros(hidden_NH.numel() + 1)
        view_NH = buffer[1:].view(hidden_NH.shape).copy_(hidden_NH)
        return original(dispatcher, view_NH, routing)

    seams.around(gathering, "as_words", as_words)
    seams.around(InferenceCUDAGraphTokenDispatcher, "token_dispatch", dispatch)


# --- which path ---------------------------------------------------------------------------------


def _multicast_fits(case: Case) -> bool:
    """The gather or the sum has lanes that multicast takes, so that refusing it is wrong."""
    config, rows = case.config, bucket_of(case)
    routing = 4 * rows * config.num_experts_per_tok
    element = 4 if case.wire == "fp32" else config.dtype.itemsize
    hidden = rows * config.hidden_size
    gathered = min(lane_bytes(routing), lane_bytes(hidden * config.dtype.itemsize))
    return max(gathered, lane_bytes(hidden * element)) >= MIN_MULTICAST_LANE_BYTES


@fault(
    "CL18",
    "flashinfer-ai/flashinfer#3754",
    "whether the fast path takes a payload is decided by the size of the whole padded buffer",
    stage="dispatch",
    when=lambda case: symmetric(case) and case.transport == "nvls" and _multicast_fits(case),
    changes_output=False,
)
def judged_by_buffer(seams: Seams) -> None:
    """No payload is sent by multicast, since the buffer around it is too large for that."""

    def leaf_for(_leaf_for: Wrong, transport: Any, _packed: Any, call: str) -> tuple[Leaf, str]:
        transport._shape_refusals[call] = Refusal.MISALIGNED
        return Leaf.MULTICAST_EMULATED, Tier.P2P.value

    seams.around(SymmetricTransport, "_leaf_for", leaf_for)
