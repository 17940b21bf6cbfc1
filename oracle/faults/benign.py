"""Correct variations of dispatch, experts and memory: other orders, other sizes, more care.

Legend: T tokens, N padded rows of one rank, S slots, R ranks, H hidden_size, K experts per
token, L local experts.
"""

import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from twinmoe.optimized import launch, layer
from twinmoe.optimized.communication import transport
from twinmoe.optimized.communication.collective_transport import CollectiveTransport
from twinmoe.optimized.communication.order import Collective, CollectiveOrder
from twinmoe.optimized.communication.pool import Capacity
from twinmoe.optimized.communication.symmetric_transport import SymmetricTransport
from twinmoe.optimized.experts import InferenceGroupedMLP, grouped_mm
from twinmoe.optimized.experts.fused import GemmTiles
from twinmoe.optimized.layer import MoELayer
from twinmoe.oracle import subject
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults.fault import variant
from twinmoe.oracle.faults.seams import Seams, Wrong
from twinmoe.oracle.faults.triggers import gathers, has_tokens, in_graph, symmetric
from twinmoe.oracle.rounding import FORMATS, round_to
from twinmoe.reference.dispatch import MoEAlltoAllTokenDispatcher
from twinmoe.reference.weights import MoEWeights


def _by_library(case: Case) -> bool:
    return has_tokens(case) and case.backend == "grouped_mm"


def _by_triton(case: Case) -> bool:
    return has_tokens(case) and case.backend == "triton"


# --- sums in another order --------------------------------------------------------------------


def _grouped(x_SK: Tensor, w_LKN: Tensor, ends_L: Tensor, product: Any) -> Tensor:
    """Multiply each group's rows by ``product``, without asking the host where groups end."""
    row_S = torch.arange(len(x_SK), device=x_SK.device)
    starts_L = torch.cat([ends_L.new_zeros(1), ends_L[:-1]])
    out_SN = x_SK.new_zeros(len(x_SK), w_LKN.shape[2])
    for local in range(len(ends_L)):
        inside = (row_S >= starts_L[local]) & (row_S < ends_L[local])
        rows_SK = x_SK.masked_fill(~inside[:, None], 0)
        out_SN = torch.where(inside[:, None], product(rows_SK, w_LKN[local]), out_SN)
    return out_SN


@variant("expert GEMMs are summed in fp64 and rounded once", when=_by_library)
def wide_experts(seams: Seams) -> None:
    """More precise than promised."""

    def wide(_original: Wrong, x: Tensor, w: Tensor, *, offs: Tensor) -> Tensor:
        def product(rows: Tensor, matrix: Tensor) -> Tensor:
            return round_to(rows.double() @ matrix.double(), FORMATS[x.dtype]).to(x.dtype)

        return _grouped(x, w, offs, product)

    seams.around(grouped_mm, "grouped_mm", wide)


@variant("expert GEMMs are summed in three parts, the last one first", when=_by_library)
def split_k_experts(seams: Seams) -> None:
    """Split-K with a reduction in fp32."""

    def product(rows: Tensor, matrix: Tensor) -> Tensor:
        parts = zip(rows.float().chunk(3, dim=1), matrix.float().chunk(3, dim=0), strict=True)
        sums = [left @ right for left, right in parts]
        return sum(reversed(sums[:-1]), sums[-1]).to(rows.dtype)

    def split(_original: Wrong, x: Tensor, w: Tensor, *, offs: Tensor) -> Tensor:
        return _grouped(x, w, offs, product)

    seams.around(grouped_mm, "grouped_mm", split)


@variant("channels are summed in the reverse order", when=_by_library)
def reversed_channels(seams: Seams) -> None:
    """Both factors of every GEMM are turned around."""

    def turned(product: Wrong, x: Tensor, w: Tensor, *, offs: Tensor) -> Tensor:
        # grouped_mm wants the second factor as a transposed view, as the layer hands it.
        reversed_LNK = w.transpose(1, 2).flip(2)
        result: Tensor = product(x.flip(1), reversed_LNK.transpose(1, 2), offs=offs)
        return result

    seams.around(grouped_mm, "grouped_mm", turned)


@variant("Triton's experts take narrow tiles and short steps", when=_by_triton)
def small_tiles(seams: Seams) -> None:
    """Another tiling is another order of the same sum."""

    def narrow(_choose: Wrong, *_args: Any, **_kwargs: Any) -> GemmTiles:
        return GemmTiles(block_n=16, block_k=32, num_warps=1, num_stages=1)

    seams.around(GemmTiles, "choose", narrow)


@variant("a row's terms are added from its last slot to its first", when=in_graph)
def reversed_slots(seams: Seams) -> None:
    """The experts see the routing map with its columns turned around."""

    def turned(
        forward: Wrong, self: object, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor
    ) -> None:
        forward(self, x, ids.flip(1).contiguous(), weights.flip(1).contiguous(), out)

    seams.around(InferenceGroupedMLP, "forward", turned)


@variant(
    "gloo's sum over ranks is taken in the reverse order of ranks",
    when=lambda case: gathers(case) and case.transport == "gloo",
)
def reversed_ranks(seams: Seams) -> None:
    """All ranks' shares travel, and each rank adds its own rows."""

    def scatter(original: Wrong, self: Any, own: Tensor, partial: Tensor) -> None:
        if self._group is None:
            original(self, own, partial)
            return
        shares = [torch.empty_like(partial) for _ in range(self.world_size)]
        dist.all_gather(shares, partial, group=self._group)
        total = own.new_zeros(own.shape)
        for share in reversed(shares):
            total += share.chunk(self.world_size)[self.rank]
        own.copy_(total)

    seams.around(CollectiveTransport, "_run_scatter", scatter)


# --- other sizes ------------------------------------------------------------------------------


@variant("graphs are captured for twice the rows that the batch needs", when=in_graph)
def larger_bucket(seams: Seams) -> None:
    """More padding, the same answers."""
    buckets = (*subject.BUCKETS[1:], 2 * subject.BUCKETS[-1])
    seams.put(subject, "BUCKETS", buckets)


@variant("collectives run on three programs instead of the usual number", when=symmetric)
def more_programs(seams: Seams) -> None:
    """Lanes are shared out otherwise."""

    def three(acquire: Wrong, request: Any, *args: Any) -> Any:
        return acquire(type(request)(request.name, request.capacity, 3), *args)

    seams.around(transport, "acquire_pool", three)


@variant(
    "ids, weights and rows are gathered one after the other",
    when=lambda case: symmetric(case) and case.transport == "p2p",
)
def separate_gathers(seams: Seams) -> None:
    """Three launches where one would do; each result is kept before the next overwrites it."""

    def one_by_one(gather: Wrong, self: Any, tensors: Any) -> list[Tensor]:
        return [gather(self, [tensor])[0].clone() for tensor in tensors]

    seams.around(SymmetricTransport, "all_gather", one_by_one)


@variant("every rank's symmetric buffers have room to spare", when=symmetric)
def roomy_pool(seams: Seams) -> None:
    """Offsets move; nothing else."""

    def roomy(select: Wrong, group: Any, *, capacity: Capacity, **options: Any) -> Any:
        larger = Capacity(capacity.all_gather_bytes + 4096, capacity.reduce_scatter_bytes + 4096)
        return select(group, capacity=larger, **options)

    seams.around(layer, "select_transport", roomy)


# --- more care than needed --------------------------------------------------------------------


@variant("an all-gather always waits for all ranks before it writes", when=symmetric)
def careful_gather(seams: Seams) -> None:
    """One barrier more than the order of collectives asks for."""

    def careful(repeats: Wrong, self: object, next_one: Collective) -> bool:
        return next_one is Collective.ALL_GATHER or bool(repeats(self, next_one))

    seams.around(CollectiveOrder, "repeats", careful)


@variant("the last rank is late for every operation", when=gathers)
def late_rank(seams: Seams) -> None:
    """Slow is not wrong."""
    if not seams.is_last_rank:
        return

    def late(execute: Wrong, *args: Any) -> None:
        time.sleep(0.002)
        execute(*args)

    seams.around(launch, "execute", late)


@variant("memory that nobody has written yet holds NaN", when=has_tokens)
def poisoned_memory(seams: Seams) -> None:
    """What a correct layer never reads."""

    def poisoned(forward: Wrong, *args: Any) -> Tensor:
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            output: Tensor = forward(*args)
            return output
        finally:
            torch.use_deterministic_algorithms(before, warn_only=True)

    seams.around(MoELayer, "forward", poisoned)


@variant("the output is a view of a larger buffer", when=has_tokens)
def strided_output(seams: Seams) -> None:
    """Its rows do not follow each other in memory."""

    def strided(forward: Wrong, *args: Any) -> Tensor:
        out_TH: Tensor = forward(*args)
        backing = out_TH.new_zeros(len(out_TH), out_TH.shape[1] + 5)
        backing[:, 2:-3] = out_TH
        return backing[:, 2:-3]

    seams.around(MoELayer, "forward", strided)


@variant("weights are copied once more before use", when=has_tokens)
def copied_weights(seams: Seams) -> None:
    """Reloads then have to reach the copy: they do."""

    def construct(build: Wrong, self: Any, config: Any, weights: MoEWeights, *args: Any) -> None:
        copies = {name: tensor.clone() for name, tensor in weights.tensors().items()}
        build(self, config, replace(weights, **copies), *args)  # type: ignore[arg-type]
        self._source = weights

    def refresh(original: Wrong, self: Any) -> None:
        self._backend.weights.copy_(self._source)
        original(self)

    seams.around(InferenceGroupedMLP, "__init__", construct)
    seams.around(InferenceGroupedMLP, "refresh", refresh)


@variant(
    "rows are dispatched in the reverse order of tokens",
    when=lambda case: has_tokens(case) and case.transport == "alltoall",
)
def reversed_dispatch(seams: Seams) -> None:
    """AlltoAll of turned rows, turned back at home."""

    def dispatch(original: Wrong, self: Any, x_TKH: Tensor, ids_TK: Tensor) -> Any:
        return original(self, x_TKH.flip(0), ids_TK.flip(0))

    def combine(original: Wrong, self: Any, *args: Any) -> Tensor:
        turned: Tensor = original(self, *args)
        return turned.flip(0)

    seams.around(MoEAlltoAllTokenDispatcher, "token_dispatch", dispatch)
    seams.around(MoEAlltoAllTokenDispatcher, "token_combine", combine)
