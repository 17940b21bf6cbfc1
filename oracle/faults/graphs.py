"""Faults of captured graphs: what a replay reads, or does, is not what the capture thought.

Legend: N rows of a bucket, R ranks, H hidden_size.
"""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from twinmoe.optimized import layer as layer_module
from twinmoe.optimized.communication import symmetric_transport
from twinmoe.optimized.communication.eligibility import Tier
from twinmoe.optimized.communication.pool_setup import pools_of
from twinmoe.optimized.dispatcher import Gathered, InferenceCUDAGraphTokenDispatcher
from twinmoe.optimized.graph import GraphRunner
from twinmoe.optimized.launch import capturing, run
from twinmoe.optimized.router import Routing
from twinmoe.optimized.shared_expert import SideStream
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults.fault import fault
from twinmoe.oracle.faults.lives import Moment, some_moment, sums_symmetric
from twinmoe.oracle.faults.races import read_peers_early
from twinmoe.oracle.faults.seams import Seams, Wrong
from twinmoe.oracle.faults.triggers import has_shared
from twinmoe.oracle.subject import bucket_for
from twinmoe.reference.weights import MoEWeights

# --- addresses that a graph keeps -----------------------------------------------------------------

#: Widths that need no padding, in elements: scaled down from a few hundred.
_WIDTH = 64


@fault(
    "GR01",
    "vllm-project/vllm#52383",
    "padding to a kernel's width is optimised into an alias that no replay fills again",
    stage="dispatch",
    when=some_moment(
        lambda case, moment: moment.path == "captured" and case.config.hidden_size % _WIDTH > 0
    ),
)
def unrefreshed_pad(seams: Seams) -> None:
    """Hidden states that are no multiple of 64 wide are zeros, as at capture; routing is live."""
    padded: list[Tensor] = []

    def capture(original: Wrong, runner: Any, bucket: int) -> Any:
        config = runner.layer.config
        device = runner.layer.device
        padded[:] = [torch.zeros(bucket, config.hidden_size, dtype=config.dtype, device=device)]
        return original(runner, bucket)

    def dispatch(original: Wrong, dispatcher: Any, hidden_NH: Tensor, routing: Routing) -> Gathered:
        if capturing() and hidden_NH.shape[1] % _WIDTH:
            hidden_NH = padded[0]
        gathered: Gathered = original(dispatcher, hidden_NH, routing)
        return gathered

    seams.around(GraphRunner, "_capture", capture)
    seams.around(InferenceCUDAGraphTokenDispatcher, "token_dispatch", dispatch)


@fault(
    "GR04",
    "sgl-project/sglang#29946, sgl-project/sglang#33037",
    "symmetric memory of a graph counts as free once captured, and another tensor moves in",
    stage="output",
    when=some_moment(
        lambda case, moment: (
            has_shared(case) and case.ep_size > 1 and moment.symmetric and moment.path == "captured"
        )
    ),
)
def unreserved_region(seams: Seams) -> None:
    """The shared expert's answer lies where this rank writes its partial sums, which come later."""

    def start(original: Wrong, stream: Any, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        join: Callable[[], Tensor] = original(stream, compute)
        pools = pools_of(seams.context.group)
        if not pools or not capturing():
            return join

        def from_region() -> Tensor:
            shared = join()
            offset = pools[0].capacity.reduce_scatter_offset
            return pools[0].view(offset, tuple(shared.shape), shared.dtype)

        return from_region

    seams.around(SideStream, "start", start)


#: Elements of the widest batch that a fault's cases have, and then some.
_ADDRESS = 2**20


@fault(
    "GR05",
    "ROCm/aiter#3838, flashinfer-ai/flashinfer#1894",
    "of a graph's registered tensors only addresses are kept, which the next capture uses again",
    stage="dispatch",
    when=some_moment(lambda _case, moment: moment.path == "captured" and moment.captured_later > 0),
)
def dangling_temporary(seams: Seams) -> None:
    """A graph gathers from the one address of all copies, which only the latest capture's fills."""
    captures = itertools.count(1)
    number, address, latest = 0, torch.empty(0), torch.empty(0)

    def capture(original: Wrong, runner: Any, bucket: int) -> Any:
        nonlocal number, address, latest
        number, device = next(captures), runner.layer.device
        if number == 1:  # outside the capture, which would record that these are cleared
            address = torch.zeros(_ADDRESS, device=device)
            latest = torch.zeros(1, dtype=torch.int64, device=device)
        captured = original(runner, bucket)
        latest.fill_(number)
        return captured

    def dispatch(original: Wrong, dispatcher: Any, hidden_NH: Tensor, routing: Routing) -> Gathered:
        if capturing():
            own, mine = hidden_NH.float(), latest == number
            there = address[: own.numel()].view_as(own)
            there.copy_(own.where(mine, there))
            hidden_NH = there.to(hidden_NH.dtype)
        gathered: Gathered = original(dispatcher, hidden_NH, routing)
        return gathered

    seams.around(GraphRunner, "_capture", capture)
    seams.around(InferenceCUDAGraphTokenDispatcher, "token_dispatch", dispatch)


def _reads_abandoned(_case: Case, moment: Moment) -> bool:
    return moment.path == "captured" and moment.captured_version != moment.version


@fault(
    "GR14",
    "vllm-project/vllm#48312, vllm-project/vllm#40390",
    "a reload makes new tensors, while captured graphs read the old ones",
    stage="experts",
    when=some_moment(_reads_abandoned),
)
def abandoned_weights(seams: Seams) -> None:
    """The routed experts' weights move; everything else is overwritten in place."""

    def reload(copy_: Wrong, weights: MoEWeights, other: MoEWeights) -> None:
        for name in ("w13_LFH", "w2_LHI"):
            # Weights are frozen for everyone but this fault.
            object.__setattr__(weights, name, getattr(weights, name).clone())
        copy_(weights, other)

    seams.around(MoEWeights, "copy_", reload)


# --- peers' addresses -----------------------------------------------------------------------------


def _unregistered_tables(
    seams: Seams, is_registered: Callable[[], bool]
) -> list[tuple[Tensor, Tensor]]:
    """Let graphs that are not registered when captured sum over a table of own addresses.

    Returns the tables, each with the right addresses, for whoever uploads them.
    """
    tables: list[tuple[Tensor, Tensor]] = []

    def scatter(original: Wrong, memory: Any, *args: Any, **kwargs: Any) -> None:
        if not capturing() or is_registered():
            original(memory, *args, **kwargs)
            return
        unregistered = copy.copy(memory)
        unregistered.buffer_ptrs = torch.empty_like(memory.buffer_ptrs)

        def begin() -> None:
            if capturing():  # the host writes the table, once
                unregistered.buffer_ptrs.fill_(memory.buffer.data_ptr())

        run("begin_table", begin)
        tables.append((unregistered.buffer_ptrs, memory.buffer_ptrs))
        original(unregistered, *args, **kwargs)

    seams.around(symmetric_transport, "reduce_scatter", scatter)
    return tables


@fault(
    "GR07",
    "vllm-project/vllm#28334",
    "a graph is replayed before the peers' addresses that it needs are uploaded",
    stage="combine",
    when=some_moment(
        lambda case, moment: case.ep_size > 1 and moment.symmetric and moment.first_replay
    ),
)
def replayed_before_upload(seams: Seams) -> None:
    """A graph's first replay adds up this rank's own share as often as there are ranks."""
    tables = _unregistered_tables(seams, lambda: False)

    def call(original: Wrong, runner: Any, *args: Any, **kwargs: Any) -> Tensor:
        output_TH: Tensor = original(runner, *args, **kwargs)
        for table_R, right_R in tables:
            table_R.copy_(right_R)
        return output_TH

    seams.around(GraphRunner, "__call__", call)


#: Rows of a bucket that is captured in another way than larger ones.
_SMALL = 4


@fault(
    "GR08",
    "sgl-project/sglang#14193",
    "one of two ways to capture never registers the peers' addresses",
    stage="combine",
    when=some_moment(
        lambda case, moment: (
            case.ep_size > 1
            and moment.symmetric
            and moment.path == "captured"
            and moment.bucket <= _SMALL
        )
    ),
)
def never_registered(seams: Seams) -> None:
    """Graphs of small buckets: an address that is not there is this rank's own."""
    captured: list[int] = []

    def capture(original: Wrong, runner: Any, bucket: int) -> Any:
        captured.append(bucket)
        return original(runner, bucket)

    _unregistered_tables(seams, lambda: captured[-1] > _SMALL)
    seams.around(GraphRunner, "_capture", capture)


# --- collectives of a graph -----------------------------------------------------------------------


@fault(
    "GR02",
    "deepseek-ai/DeepGEMM#451",
    "tags of arrival are not cleared, so a replay goes by those of the replay before",
    stage="combine",
    when=some_moment(
        lambda case, moment: (
            moment.later_replay and moment.asks_anew and sums_symmetric(case, moment)
        )
    ),
)
def stale_tags(seams: Seams) -> None:
    """From its second replay on, a graph adds what the peers had written for the one before."""
    read_peers_early(seams, lambda _now_NH, before_NH: before_NH, replays_only=True)


def _ranks_differ(case: Case, moment: Moment) -> bool:
    own = {bucket_for(tokens) for tokens in moment.tokens}
    return moment.path == "captured" and len(own) > 1


@fault(
    "GR12",
    "vllm-project/vllm#25906",
    "each rank takes the graph that fits its own tokens",
    stage="",
    when=some_moment(_ranks_differ),
)
def local_bucket(seams: Seams) -> None:
    """Ranks with fewer tokens replay, or even capture, another graph than their peers."""

    def call(original: Wrong, runner: Any, hidden_TH: Tensor, max_tokens: int) -> Tensor:
        output_TH: Tensor = original(runner, hidden_TH, max_tokens=len(hidden_TH))
        return output_TH

    seams.around(GraphRunner, "__call__", call)


@fault(
    "GR15",
    "vllm-project/vllm#30650",
    "the reduce-scatter does nothing during capture, so no replay has one",
    stage="combine",
    when=some_moment(lambda _case, moment: moment.path == "captured"),
)
def unrecorded_collective(seams: Seams) -> None:
    """An empty answer takes its place; the counters miss it as well."""

    def combine(original: Wrong, dispatcher: Any, partial: Tensor) -> Tensor:
        if capturing():
            rows = len(partial) // dispatcher.transport.world_size
            return partial.new_zeros(rows, partial.shape[1], dtype=torch.float32)
        summed_NH: Tensor = original(dispatcher, partial)
        return summed_NH

    seams.around(InferenceCUDAGraphTokenDispatcher, "token_combine", combine)


class _LazyTransport:
    """Chooses the transport when something is first asked of it, apart from its tier."""

    def __init__(self, select: Callable[[], Any], tier: Tier) -> None:
        self._select, self.tier = select, tier

    def __getattr__(self, name: str) -> Any:
        if "_chosen" not in self.__dict__:
            self._chosen = self._select()
        return getattr(self._chosen, name)


@fault(
    "GR17",
    "vllm-project/vllm#54626, pytorch/pytorch#198140",
    "ranks find each other's buffers at the first use, which may be under capture",
    stage="",
    when=some_moment(lambda _case, moment: moment.first_replay and moment.unused_transport),
)
def lazy_rendezvous(seams: Seams) -> None:
    """The transport is chosen, and its memory mapped, by the first forward that needs it."""

    def select(original: Wrong, *args: Any, **kwargs: Any) -> _LazyTransport:
        tier = kwargs["tier"] or Tier.COLLECTIVE
        return _LazyTransport(lambda: original(*args, **kwargs), tier)

    seams.around(layer_module, "select_transport", select)
