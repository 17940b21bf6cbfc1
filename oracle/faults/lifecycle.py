"""Faults of life and death: memory that is never given back, ranks that leave each other waiting.

Legend: T tokens of this rank, H hidden_size, S dispatched rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from twinmoe.optimized import layer as layer_module
from twinmoe.optimized.communication.cpu_symmetric_memory import CpuSymmetricMemory
from twinmoe.optimized.communication.pool import SymmetricPool
from twinmoe.optimized.cpu_graph import CpuGraph
from twinmoe.optimized.dispatcher import InferenceCUDAGraphTokenDispatcher
from twinmoe.optimized.graph import GraphRunner
from twinmoe.optimized.launch import capturing
from twinmoe.optimized.layer import MoELayer
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults.fault import fault
from twinmoe.oracle.faults.lives import Moment, moments, some_moment
from twinmoe.oracle.faults.seams import Seams, Wrong
from twinmoe.oracle.faults.triggers import gathers
from twinmoe.reference.dispatch import MoEAlltoAllTokenDispatcher

# --- memory that is never given back --------------------------------------------------------------


def _has_pool(case: Case) -> bool:
    """The layer's transport holds symmetric memory, whatever path is taken."""
    return case.transport not in ("gloo", "nccl")


@fault(
    "LC01",
    "NVIDIA/TensorRT-LLM#18182, NVIDIA/TensorRT-LLM#17529",
    "buffers are kept under the id of a group, and never let go",
    stage="output",
    when=_has_pool,
    changes_output=False,
)
def cached_by_id(seams: Seams) -> None:
    """Released pools stay mapped, for a group that may come back under its old id."""
    cache: dict[int, list[Any]] = {}

    def close(_close: Wrong, pool: Any) -> None:
        cache.setdefault(id(seams.context.group), []).append(pool._memory)
        pool._memory = None

    seams.around(SymmetricPool, "close", close)


@fault(
    "LC06",
    "triton-lang/triton#8900",
    "a release drops its handles, but something still holds the tensor",
    stage="output",
    when=_has_pool,
    changes_output=False,
)
def tensor_kept(seams: Seams) -> None:
    """A view of the first bytes keeps all of the buffer."""
    views: list[Tensor] = []

    def close(original: Wrong, memory: Any) -> None:
        views.append(memory.buffer[:16])
        original(memory)

    seams.around(CpuSymmetricMemory, "close", close)


# --- ranks that do not come -----------------------------------------------------------------------


@fault(
    "LC03",
    "vllm-project/vllm#43547, vllm-project/vllm#51984",
    "a rank without work returns early, and its peers wait for it",
    stage="",
    when=some_moment(lambda case, moment: case.ep_size > 1 and min(moment.tokens) == 0),
)
def idle_rank_returns(seams: Seams) -> None:
    """On all paths; of a captured graph it is the replay that does not take place."""

    def forward(
        original: Wrong, layer: Any, hidden_TH: Tensor, num_valid: Tensor | None = None
    ) -> Tensor:
        idle = num_valid is not None and not capturing() and int(num_valid) == 0
        if idle or not len(hidden_TH):
            for name in ("ids", "weights", "routed"):
                layer._tap(name, hidden_TH[:0])
            return hidden_TH
        output_TH: Tensor = original(layer, hidden_TH, num_valid)
        return output_TH

    def call(original: Wrong, runner: Any, hidden_TH: Tensor, **kwargs: Any) -> Tensor:
        return original(runner, hidden_TH, **kwargs) if len(hidden_TH) else hidden_TH

    seams.around(MoELayer, "forward", forward)
    seams.around(GraphRunner, "__call__", call)


def _second_combine(case: Case) -> bool:
    """Python runs a second combine: replays are not asked."""
    combines = [moment for moment in moments(case) if moment.path != "captured"]
    return case.ep_size > 1 and len(combines) > 1


@fault(
    "LC07",
    "vllm-project/vllm#48720",
    "now and then one rank leaves out a collective, and is one ahead of the others",
    stage="combine",
    when=_second_combine,
)
def one_ahead(seams: Seams) -> None:
    """The last rank leaves out its second combine outside graphs: control flow of its own."""
    combines: list[object] = []

    def leaves_out() -> bool:
        if not seams.is_last_rank or capturing():
            return False
        combines.append(None)
        return len(combines) == 2

    def scatter(combine: Wrong, dispatcher: Any, partial: Tensor) -> Tensor:
        if leaves_out():
            return partial[: len(partial) // seams.context.world_size].float()
        summed_NH: Tensor = combine(dispatcher, partial)
        return summed_NH

    def alltoall(combine: Wrong, dispatcher: Any, y_SH: Tensor, metadata: Any) -> Tensor:
        if leaves_out():
            pairs = metadata.num_tokens, metadata.experts_per_token
            return y_SH.new_zeros(*pairs, y_SH.shape[-1])
        y_TKH: Tensor = combine(dispatcher, y_SH, metadata)
        return y_TKH

    seams.around(InferenceCUDAGraphTokenDispatcher, "token_combine", scatter)
    seams.around(MoEAlltoAllTokenDispatcher, "token_combine", alltoall)


@fault(
    "LC08",
    "NVIDIA/TensorRT-LLM#18715",
    "a communicator is taken from a cache that does not know which ranks it connects",
    stage="",
    when=lambda case: gathers(case) and case.relation == "alone",
)
def cached_without_layout(seams: Seams) -> None:
    """A layer of one rank alone gets the transport of all, and waits for peers without work."""
    cache: dict[object, Any] = {}

    def select(original: Wrong, *args: Any, tier: Any, kill_switch: bool, **rest: Any) -> Any:
        key = tier, kill_switch
        if key not in cache:
            cache[key] = original(*args, tier=tier, kill_switch=kill_switch, **rest)
        return cache[key]

    seams.around(layer_module, "select_transport", select)


def _captured(case: Case, moment: Moment) -> bool:
    return gathers(case) and moment.first_replay


@fault(
    "LC09",
    "sgl-project/sglang#11275",
    "a capture ends with a collective even after an error, which so never gets told",
    stage="",
    when=some_moment(_captured),
)
def collective_on_exit(seams: Seams) -> None:
    """The error is planted along: the last rank has no memory for its graph."""

    @contextmanager
    def capture(original: Wrong, graph: Any) -> Iterator[None]:
        with original(graph):
            try:
                if seams.is_last_rank:
                    raise MemoryError("no memory for the graph")
                yield
            finally:
                dist.barrier(seams.context.group)

    seams.around(CpuGraph, "capture", capture)
