"""Faults of sizes: collectives that ranks size differently, and batches without a token.

Legend: T tokens of one rank, N rows of a bucket, H hidden_size, S slots received.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from twinmoe.optimized.dispatcher import Gathered, InferenceCUDAGraphTokenDispatcher
from twinmoe.optimized.experts import InferenceGroupedMLP
from twinmoe.optimized.graph import GraphRunner
from twinmoe.optimized.launch import capturing
from twinmoe.optimized.layer import MoELayer
from twinmoe.optimized.router import Routing
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults.fault import fault
from twinmoe.oracle.faults.seams import Seams, Wrong
from twinmoe.oracle.faults.triggers import gathers, has_tokens
from twinmoe.oracle.faults.visits import starves_a_rank
from twinmoe.reference.dispatch import DispatchMetadata, MoEAlltoAllTokenDispatcher

# --- collectives in chunks, which the dispatcher does not have: planted with the wrong sizes ---

#: Rows of a chunk, scaled down from 256.
_CHUNK = 4

#: (this rank's tokens, rows of the bucket, rank) to the chunks of rows that are gathered.
Chunks = Callable[[int, int, int], Iterator[slice]]


def _gather_in(seams: Seams, chunks: Chunks) -> None:
    """Gather each chunk by a collective of its own; rows in no chunk arrive as padding."""

    def in_chunks(
        _dispatch: Wrong, dispatcher: Any, hidden_NH: Tensor, routing: Routing
    ) -> Gathered:
        transport = dispatcher.transport
        own = routing.ids_TK, routing.weights_TK, hidden_NH
        everyone = [tensor.new_zeros(transport.world_size, *tensor.shape) for tensor in own]
        everyone[0].fill_(-1)
        tokens = min(seams.case.tokens[transport.rank], len(hidden_NH))
        for rows in chunks(tokens, len(hidden_NH), transport.rank):
            received = transport.all_gather([tensor[rows] for tensor in own])
            for whole, part in zip(everyone, received, strict=True):
                whole[:, rows] = part.view(whole[:, rows].shape)
        ids, weights, hidden = (whole.flatten(0, 1) for whole in everyone)
        return Gathered(hidden, ids, weights)

    seams.around(InferenceCUDAGraphTokenDispatcher, "token_dispatch", in_chunks)


def _uneven(case: Case) -> bool:
    return gathers(case) and min(case.tokens) < max(case.tokens)


def _own_chunks(tokens: int, _rows: int, _rank: int) -> Iterator[slice]:
    for start in range(0, tokens, _CHUNK):
        yield slice(start, min(start + _CHUNK, tokens))


@fault(
    "DP10",
    "vllm-project/vllm#21963",
    "each rank sizes its chunks by what it has left, without staying in step with the others",
    stage="dispatch",
    when=_uneven,
)
def chunks_out_of_step(seams: Seams) -> None:
    """A rank that has run out of tokens leaves the loop; the last chunk is as short as it is."""
    _gather_in(seams, _own_chunks)


def _two_halves(tokens: int, _rows: int, _rank: int) -> Iterator[slice]:
    yield slice(0, tokens // 2)
    yield slice(tokens // 2, tokens)


@fault(
    "DP12",
    "NVIDIA/TensorRT-LLM#7965",
    "every rank halves its own tokens, so one with a single token sends a chunk of none",
    stage="dispatch",
    when=_uneven,
)
def empty_chunks(seams: Seams) -> None:
    """As many chunks on all ranks, but not as large, and some of them empty."""
    _gather_in(seams, _two_halves)


def _before_the_split(_tokens: int, rows: int, rank: int) -> Iterator[slice]:
    yield slice(0, rows if rank % 2 == 0 else 0)


@fault(
    "DP13",
    "lightseekorg/tokenspeed#405, lightseekorg/tokenspeed#419",
    "collectives are sized by the counts from before each pair of ranks split its tokens",
    stage="dispatch",
    when=gathers,
)
def counts_before_split(seams: Seams) -> None:
    """The first rank of a pair is believed to hold all rows, the second none."""
    _gather_in(seams, _before_the_split)


# --- ranks without tokens -----------------------------------------------------------------------


def _alltoall(case: Case) -> bool:
    return case.transport == "alltoall"


def _sees_no_tokens(case: Case) -> bool:
    """A rank's own count of 0 is known to the host: there, or where a graph is replayed."""
    return min(case.tokens) == 0 and (_alltoall(case) or case.mode != "eager")


def _receives_nothing(case: Case) -> bool:
    return _alltoall(case) and starves_a_rank(case)


@fault(
    "DP16",
    "deepseek-ai/DeepEP#374",
    "dispatch refuses a rank that has no tokens",
    stage="",
    when=_sees_no_tokens,
)
def empty_rank_refused(seams: Seams) -> None:
    """Both dispatches demand at least one row."""

    def demand(tokens: int) -> None:
        if tokens == 0:
            raise RuntimeError("num_tokens (0) must be positive")

    def alltoall(dispatch: Wrong, dispatcher: Any, x: Tensor, ids_TK: Tensor) -> Any:
        demand(len(ids_TK))
        return dispatch(dispatcher, x, ids_TK)

    def replay(call: Wrong, runner: Any, hidden_TH: Tensor, *args: Any, **kwargs: Any) -> Any:
        demand(len(hidden_TH))
        return call(runner, hidden_TH, *args, **kwargs)

    seams.around(MoEAlltoAllTokenDispatcher, "token_dispatch", alltoall)
    seams.around(GraphRunner, "__call__", replay)


@fault(
    "DP17",
    "uccl-project/uccl#940",
    "a rank without tokens returns before it tells its peers that it has none",
    stage="",
    when=lambda case: (
        case.ep_size > 1 and has_tokens(case) and min(case.tokens) == 0 and case.mode == "eager"
    ),
)
def early_return(seams: Seams) -> None:
    """The peers wait in the exchange of counts, or in the gather."""
    has_left = False

    def send(dispatch: Wrong, dispatcher: Any, x: Tensor, ids_TK: Tensor) -> Any:
        if len(ids_TK):
            return dispatch(dispatcher, x, ids_TK)
        none = [0] * dispatcher.placement.ep_size
        nothing = ids_TK.new_empty(0)
        metadata = DispatchMetadata(0, ids_TK.shape[1], nothing, none, none)
        return x.new_empty(0, x.shape[-1]), nothing, metadata

    def bring_home(combine: Wrong, dispatcher: Any, y_SH: Tensor, metadata: Any) -> Tensor:
        if metadata.num_tokens:
            y_TKH: Tensor = combine(dispatcher, y_SH, metadata)
            return y_TKH
        return y_SH.new_empty(0, metadata.experts_per_token, y_SH.shape[1])

    def gather(dispatch: Wrong, dispatcher: Any, hidden_NH: Tensor, routing: Routing) -> Gathered:
        nonlocal has_left
        # A count on the device is out of reach under capture.
        has_left = not capturing() and not bool((routing.ids_TK >= 0).any())
        if not has_left:
            gathered: Gathered = dispatch(dispatcher, hidden_NH, routing)
            return gathered
        parts = hidden_NH, routing.ids_TK, routing.weights_TK
        return Gathered(*(part.repeat(dispatcher.transport.world_size, 1) for part in parts))

    def scatter(combine: Wrong, dispatcher: Any, partial: Tensor) -> Tensor:
        if has_left:
            return partial.float().chunk(dispatcher.transport.world_size)[0].clone()
        summed: Tensor = combine(dispatcher, partial)
        return summed

    seams.around(MoEAlltoAllTokenDispatcher, "token_dispatch", send)
    seams.around(MoEAlltoAllTokenDispatcher, "token_combine", bring_home)
    seams.around(InferenceCUDAGraphTokenDispatcher, "token_dispatch", gather)
    seams.around(InferenceCUDAGraphTokenDispatcher, "token_combine", scatter)


@fault(
    "DP19",
    "NVIDIA/Megatron-LM#1877, NVIDIA/Megatron-LM#3626",
    "dispatched rows are viewed in a shape that has at least one row",
    stage="",
    when=_receives_nothing,
)
def view_of_empty(seams: Seams) -> None:
    """A rank whose experts nobody chose has received nothing to view."""

    def viewed(dispatch: Wrong, *args: Any) -> Any:
        x_SH, *rest = dispatch(*args)
        return x_SH.view(max(1, len(x_SH)), x_SH.shape[1]), *rest

    seams.around(MoEAlltoAllTokenDispatcher, "token_dispatch", viewed)


@fault(
    "DP23",
    "sgl-project/sglang#22455",
    "no tokens at all pass for a power of two, and choose a tile of that size",
    stage="",
    when=_sees_no_tokens,
)
def zero_is_no_power_of_two(seams: Seams) -> None:
    """``M & (M - 1) == 0`` holds for 0, which has no highest bit."""

    def choose_tile(tokens: int) -> int:
        return 1 << (tokens.bit_length() - 1) if tokens & (tokens - 1) == 0 else 16

    def forward(path: Wrong, layer: Any, hidden_TH: Tensor) -> Any:
        choose_tile(len(hidden_TH))
        return path(layer, hidden_TH)

    def replay(call: Wrong, runner: Any, hidden_TH: Tensor, *args: Any, **kwargs: Any) -> Any:
        choose_tile(len(hidden_TH))
        return call(runner, hidden_TH, *args, **kwargs)

    seams.around(MoELayer, "_eager_path", forward)
    seams.around(GraphRunner, "__call__", replay)


@fault(
    "DP24",
    "sgl-project/sglang#38780",
    "the expert kernel takes a tensor without rows, whose address is null, for a missing one",
    stage="",
    when=_receives_nothing,
)
def null_address(seams: Seams) -> None:
    """A rank that received no rows calls its experts all the same."""

    def demand(rows: Wrong, experts: Any, x_SH: Tensor, local_expert_S: Tensor) -> Tensor:
        if x_SH.data_ptr() == 0:
            raise RuntimeError("x (null pointer) must be allocated")
        y_SH: Tensor = rows(experts, x_SH, local_expert_S)
        return y_SH

    seams.around(InferenceGroupedMLP, "expert_rows", demand)
