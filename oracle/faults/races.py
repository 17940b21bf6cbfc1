"""Races of collectives, each decided beforehand: the late rank is late every time.

Legend: T tokens of one rank, N rows of a bucket, R ranks, H hidden_size.
"""

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from twinmoe.optimized import layer as layer_module
from twinmoe.optimized.communication.symmetric_transport import SymmetricTransport
from twinmoe.optimized.dispatcher import Gathered, InferenceCUDAGraphTokenDispatcher
from twinmoe.optimized.launch import capturing, run
from twinmoe.optimized.layer import MoELayer
from twinmoe.optimized.router import Routing
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults.fault import fault
from twinmoe.oracle.faults.leftover import Leftover, rehearsing
from twinmoe.oracle.faults.lives import Moment, crosses, moments, some_moment, sums_symmetric
from twinmoe.oracle.faults.seams import Seams, Wrong
from twinmoe.oracle.faults.triggers import symmetric
from twinmoe.oracle.faults.visits import visited
from twinmoe.reference.placement import Placement

# --- what peers wrote is read before it is there ------------------------------------------------

#: (what peers add now, what they added the time before) to what is read of the two.
Reading = Callable[[Tensor, Tensor], Tensor]


def read_peers_early(seams: Seams, reading: Reading, *, replays_only: bool = False) -> None:
    """Let each sum over symmetric memory take its peers' shares by ``reading``.

    The time before is the last sum of this shape, zeros at first; with ``replays_only`` it is
    the last replay, and a first one reads what is there.
    """
    by_shape: dict[object, Leftover] = {}

    def sum_early(scatter: Wrong, transport: Any, partial: Tensor) -> Tensor:
        right_NH: Tensor = scatter(transport, partial)
        if transport.world_size == 1:
            return right_NH
        read_NH, in_graph = torch.empty_like(right_NH), capturing()

        def read() -> None:
            own_NH = partial.chunk(transport.world_size)[transport.rank].float()
            peers_NH = right_NH - own_NH
            if right_NH.shape not in by_shape:
                by_shape[right_NH.shape] = Leftover(peers_NH)
            if replays_only and not in_graph:
                read_NH.copy_(right_NH)
                return
            first_NH = peers_NH if replays_only else torch.zeros_like(peers_NH)
            taken_NH = reading(peers_NH, by_shape[right_NH.shape].exchange(peers_NH, first_NH))
            read_NH.copy_(right_NH.where(taken_NH == peers_NH, own_NH + taken_NH))

        run("read_early", read)
        return read_NH

    seams.around(SymmetricTransport, "reduce_scatter", sum_early)


def _first_sum_crosses(case: Case) -> bool:
    """The first sum over symmetric memory adds something of a peer."""
    sums = [moment for moment in moments(case) if moment.symmetric]
    return bool(sums) and sums_symmetric(case, sums[0])


@fault(
    "CL01",
    "vllm-project/vllm#2760",
    "a rank's flag is up before all of its data can be seen",
    stage="combine",
    when=_first_sum_crosses,
)
def flag_before_data(seams: Seams) -> None:
    """The last quarter of each row is still what the peers had sent the time before."""

    def late_columns(now_NH: Tensor, before_NH: Tensor) -> Tensor:
        column_H = torch.arange(now_NH.shape[1], device=now_NH.device)
        return now_NH.where(column_H < now_NH.shape[1] * 3 // 4, before_NH)

    read_peers_early(seams, late_columns)


def _first_gather_crosses(case: Case) -> bool:
    gathers = [moment for moment in moments(case) if moment.symmetric]
    return case.ep_size > 1 and bool(gathers) and crosses(case, gathers[0], row=1)


@fault(
    "CL04",
    "AMD-AGI/Primus-Turbo#482",
    "a release waits only for the threads that publish, while others are still storing",
    stage="dispatch",
    when=_first_gather_crosses,
)
def unfinished_warps(seams: Seams) -> None:
    """The second row of every peer, another warp's, is still that of the batch before."""
    before: dict[object, Leftover] = {}

    def early(dispatch: Wrong, dispatcher: Any, *args: Any) -> Gathered:
        gathered: Gathered = dispatch(dispatcher, *args)
        transport = dispatcher.transport
        if not isinstance(transport, SymmetricTransport):
            return gathered
        seen_MH = torch.empty_like(gathered.hidden)

        def read() -> None:
            now_RNH = gathered.hidden.clone().unflatten(0, (transport.world_size, -1))
            if now_RNH.shape not in before:
                before[now_RNH.shape] = Leftover(now_RNH)
            kept_RNH = before[now_RNH.shape].exchange(now_RNH, torch.zeros_like(now_RNH))
            own_NH = now_RNH[transport.rank].clone()
            now_RNH[:, 1:2] = kept_RNH[:, 1:2]
            now_RNH[transport.rank] = own_NH
            seen_MH.copy_(now_RNH.flatten(0, 1))

        run("read_early", read)
        return replace(gathered, hidden=seen_MH)

    seams.around(InferenceCUDAGraphTokenDispatcher, "token_dispatch", early)


# --- a buffer is used again too soon --------------------------------------------------------------


def _visits_last_rank(case: Case, moment: Moment) -> bool:
    """Rank 0 has a first token, and the last rank computes on it."""
    placement = Placement(case.config.num_experts, case.ep_size)
    owners_TK = placement.owner(visited(case, moment.step.number)[0])
    return case.ep_size > 1 and moment.symmetric and bool((owners_TK[:1] == case.ep_size - 1).any())


@fault(
    "CL02",
    "lightseekorg/tokenspeed#1017",
    "a collective's buffer takes the next call's data before a slow rank has read the last",
    stage="dispatch",
    when=some_moment(_visits_last_rank),
)
def reused_before_read(seams: Seams) -> None:
    """Hidden states are gathered by a call of their own; the last rank reads them after the next.

    Where rank 0's first rows were, it then finds expert ids.
    """

    def twice(dispatch: Wrong, dispatcher: Any, hidden_NH: Tensor, routing: Routing) -> Gathered:
        transport = dispatcher.transport
        if not isinstance(transport, SymmetricTransport):
            right: Gathered = dispatch(dispatcher, hidden_NH, routing)
            return right
        (hidden,) = transport.all_gather([hidden_NH])
        if not seams.is_last_rank:
            hidden = hidden.clone()
        ids, weights = transport.all_gather([routing.ids_TK, routing.weights_TK])
        return Gathered(hidden, ids, weights)

    seams.around(InferenceCUDAGraphTokenDispatcher, "token_dispatch", twice)


#: Rows of a chunk: scaled down to batches of a dozen.
_CHUNK = 4


def _has_two_chunks(_case: Case, moment: Moment) -> bool:
    return (moment.bucket if moment.in_graph else max(moment.tokens)) > _CHUNK


@fault(
    "CL16",
    "PrimeIntellect-ai/prime-rl#3411",
    "two chunks' combines share a buffer, and only the last one's end is waited for",
    stage="combine",
    when=some_moment(_has_two_chunks),
)
def last_event_only(seams: Seams) -> None:
    """Where the first chunk should be lies the second: planted in chunks of 4 rows."""

    def combine(original: Wrong, *args: Any) -> Tensor:
        combined: Tensor = original(*args)
        second = combined[_CHUNK : 2 * _CHUNK]
        return torch.cat([second, combined[len(second) :]])

    seams.around(InferenceCUDAGraphTokenDispatcher, "token_combine", combine)
    seams.around(MoELayer, "_eager_path", combine)


# --- what a fill, or a rare event, leaves behind --------------------------------------------------


def _filled(_case: Case, moment: Moment) -> bool:
    freshly_run = moment.path == "graphed" or moment.first_replay
    return moment.symmetric and moment.poisoned and freshly_run


@fault(
    "CL06",
    "deepseek-ai/DeepEP#589, deepseek-ai/DeepEP#600",
    "an output is made after the wait, so its fill may land on top of what arrived",
    stage="combine",
    when=some_moment(_filled),
)
def late_fill(seams: Seams) -> None:
    """Only where new memory is filled at all, as deterministic algorithms ask for."""

    def filled(scatter: Wrong, *args: Any) -> Tensor:
        summed_NH: Tensor = scatter(*args)
        if torch.are_deterministic_algorithms_enabled():
            summed_NH[:1].fill_(torch.nan)
        return summed_NH

    seams.around(SymmetricTransport, "reduce_scatter", filled)


#: Rows of a batch that shows the fault when it fills its bucket: scaled down from 256.
_LARGEST = 8


def _full_twice(case: Case) -> bool:
    full = [
        (rank, moment)
        for moment in moments(case)
        if moment.in_graph and moment.bucket >= _LARGEST
        for rank, tokens in enumerate(moment.tokens)
        if tokens == moment.bucket
    ]
    ranks = [rank for rank, _ in full]
    return any(ranks.count(rank) > 1 for rank in ranks)


@fault(
    "CL17",
    "deepseek-ai/DeepEP#700",
    "now and then a combine of the largest batch mixes two tokens in one row",
    stage="combine",
    when=_full_twice,
)
def mixed_row(seams: Seams) -> None:
    """Every second full bucket of at least 8 rows: half of row 0 is that of row 1."""
    # Weakly: a layer that is kept here would keep its memory.
    combines: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()

    def mix(path: Wrong, layer: Any, hidden_NH: Tensor, num_valid: Tensor | None) -> Tensor:
        routed_NH: Tensor = path(layer, hidden_NH, num_valid)
        half = routed_NH.shape[1] // 2

        def combine() -> None:
            if layer not in combines:
                combines[layer] = torch.zeros(1, dtype=torch.int64, device=routed_NH.device)
            if len(routed_NH) < _LARGEST or rehearsing(routed_NH):
                return
            full = torch.ones_like(combines[layer])
            if num_valid is not None:
                full = (num_valid == len(routed_NH)).to(torch.int64)
            combines[layer] += full
            mixed = (full == 1) & (combines[layer] % 2 == 0)
            routed_NH[0, half:] = routed_NH[1, half:].where(mixed, routed_NH[0, half:])

        run("mix", combine)
        return routed_NH

    seams.around(MoELayer, "_graphed_path", mix)


# --- two streams ----------------------------------------------------------------------------------


@fault(
    "CL07",
    "pytorch/pytorch#189228",
    "two collectives of one signal pad run on two streams, not everywhere in the same order",
    stage="",
    when=symmetric,
)
def swapped_on_device(seams: Seams) -> None:
    """On the last rank the larger gather runs first: each side spins in the other's barrier."""

    def two_programs(select: Wrong, *args: Any, **kwargs: Any) -> Any:
        return select(*args, **kwargs, num_ctas=2)

    def gather(dispatch: Wrong, dispatcher: Any, hidden_NH: Tensor, routing: Routing) -> Gathered:
        transport = dispatcher.transport
        if not isinstance(transport, SymmetricTransport) or transport.world_size == 1:
            right: Gathered = dispatch(dispatcher, hidden_NH, routing)
            return right

        def small() -> list[Tensor]:
            transport._pool.num_ctas = 1
            arrived = transport.all_gather([routing.ids_TK, routing.weights_TK])
            transport._pool.num_ctas = 2
            return [tensor.clone() for tensor in arrived]

        def large() -> list[Tensor]:
            return transport.all_gather([hidden_NH])

        in_order = (large, small) if seams.is_last_rank else (small, large)
        arrived = {collective: collective() for collective in in_order}
        return Gathered(arrived[large][0], *arrived[small])

    seams.around(layer_module, "select_transport", two_programs)
    seams.around(InferenceCUDAGraphTokenDispatcher, "token_dispatch", gather)
