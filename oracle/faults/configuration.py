"""Faults of configuration: options that are lost, and decisions taken twice, or by the wrong key.

Legend: T tokens of one rank, N rows of a bucket, H hidden_size, R ranks.
"""

from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from twinmoe.optimized.communication import pool_setup
from twinmoe.optimized.communication.agreement import exchange
from twinmoe.optimized.dispatcher import InferenceCUDAGraphTokenDispatcher
from twinmoe.optimized.experts.fused import GemmTiles, TritonBackend
from twinmoe.optimized.graph import GraphRunner
from twinmoe.optimized.layer import MoELayer
from twinmoe.optimized.router import InferenceTopKRouter
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults.fault import fault
from twinmoe.oracle.faults.misread import misread
from twinmoe.oracle.faults.seams import Seams, Wrong
from twinmoe.oracle.faults.triggers import (
    bucket_of,
    gathers,
    has_tokens,
    in_graph,
    on_several_ranks,
)
from twinmoe.oracle.faults.visits import crosses, sent
from twinmoe.oracle.faults.wrong_routers import ROUTERS, routes_otherwise
from twinmoe.oracle.strategies import usable_backends
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.dispatch import MoEAlltoAllTokenDispatcher
from twinmoe.reference.router import TopKRouter
from twinmoe.reference.weights import MoEWeights


@fault(
    "CF01",
    "vllm-project/tpu-inference#746",
    "the wish for expert parallelism is not passed on: every rank computes all experts",
    stage="dispatch",
    when=on_several_ranks,
    changes_output=False,
)
def parallelism_ignored(seams: Seams) -> None:
    """Each rank takes all weights and no group; only what did not run, and memory, tell."""

    def whole(weights: MoEWeights) -> MoEWeights:
        shards: list[MoEWeights] = exchange(weights, seams.context.group)

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(shard, name) for shard in shards])

        experts = range(shards[-1].experts.stop)
        return replace(weights, w13_LFH=joined("w13_LFH"), w2_LHI=joined("w2_LHI"), experts=experts)

    layers: WeakSet[MoELayer] = WeakSet()

    def construct(
        original: Wrong, layer: Any, config: Any, weights: MoEWeights, group: Any, *rest: Any
    ) -> None:
        original(layer, config, weights if group is None else whole(weights), None, *rest)
        if group is not None:
            layers.add(layer)

    def reload(original: Wrong, layer: Any, weights: MoEWeights) -> None:
        original(layer, whole(weights) if layer in layers else weights)

    seams.around(MoELayer, "__init__", construct)
    seams.around(MoELayer, "reload", reload)


#: Rows of a rank from which the second predicate sees several chunks.
_ONE_CHUNK = 4


@fault(
    "CF03",
    "NVIDIA/TensorRT-LLM#7954",
    "dispatch and combine each decide for themselves whether tokens travel by all-to-all",
    stage="combine",
    when=lambda case: gathers(case) and bucket_of(case) > _ONE_CHUNK and crosses(case),
)
def two_predicates(seams: Seams) -> None:
    """From two chunks on, combine believes that the expert outputs have come home already."""

    def combine(original: Wrong, dispatcher: Any, partial: Tensor) -> Tensor:
        transport = dispatcher.transport
        rows = len(partial) // transport.world_size
        if rows <= _ONE_CHUNK:
            summed: Tensor = original(dispatcher, partial)
            return summed
        return partial[transport.rank * rows :][:rows].float()

    seams.around(InferenceCUDAGraphTokenDispatcher, "token_combine", combine)


def _second_layer_is_larger(case: Case) -> bool:
    is_pooled = in_graph(case) and case.transport in ("p2p", "nvls")
    return is_pooled and case.config.hidden_size < 128 and "o" in case.history


@fault(
    "CF04",
    "vllm-project/vllm#42976",
    "the workspace that layers share is sized by the first of them",
    stage="",
    when=_second_layer_is_larger,
)
def sized_by_first_layer(seams: Seams) -> None:
    """A pool that exists is good enough for every layer."""

    def never_grow(agree: Wrong, request: Any, pool: Any, group: Any) -> Any:
        if pool is None:
            return agree(request, pool, group)
        return pool_setup.PoolRequest(request.name, pool.capacity, pool.num_ctas), False

    seams.around(pool_setup, "_agree_on_size", never_grow)


#: Columns of a tile, small enough that layers here have several.
_COLUMNS = 16


def _down_has_more_columns(case: Case) -> bool:
    config = case.config
    chosen = usable_backends(config)[0] if case.backend == "auto" else case.backend
    tiles = -(-config.hidden_size // _COLUMNS), -(-config.moe_intermediate_size // _COLUMNS)
    return has_tokens(case) and chosen == "triton" and tiles[0] > tiles[1]


@fault(
    "CF06",
    "flashinfer-ai/flashinfer#2817",
    "launch plans are cached by the number of tokens alone, though more than that decides them",
    stage="experts",
    when=_down_has_more_columns,
)
def plan_by_tokens_alone(seams: Seams) -> None:
    """The second GEMM takes the first one's grid; tiles are narrow, so that grids differ."""
    column_tiles: dict[int, int] = {}

    def narrow(choose: Wrong, *args: Any) -> GemmTiles:
        tiles: GemmTiles = choose(*args)
        return replace(tiles, block_n=_COLUMNS)

    def cached(grid: Wrong, experts: Any, plan: Any, *args: Any) -> tuple[int, int]:
        rows, columns = grid(experts, plan, *args)
        tokens = len(plan.slots_S) // plan.experts_per_row
        return rows, column_tiles.setdefault(tokens, columns)

    def left_out(rows: Wrong, experts: Any, x_MH: Tensor, weights_MK: Any, plan: Any) -> Tensor:
        y_SH: Tensor = rows(experts, x_MH, weights_MK, plan)
        tokens = len(plan.slots_S) // plan.experts_per_row
        # New memory may be an old answer: what no program wrote must not be right by luck.
        y_SH[:, column_tiles.get(tokens, 0) * _COLUMNS :] = 0
        return y_SH

    seams.around(GemmTiles, "choose", narrow)
    seams.around(TritonBackend, "sorted_rows", left_out)
    seams.around(TritonBackend, "_grid", cached)


def _first_rank_differs(case: Case) -> bool:
    if case.transport != "alltoall":
        return case.mode != "eager" and case.tokens[0] < max(case.tokens)
    slots_RR = sent(case)
    return bool((slots_RR != slots_RR[:1]).any())


@fault(
    "CF08",
    "NVIDIA/TensorRT-LLM#16207",
    "of the list with every rank's count only the first is used",
    stage="",
    when=_first_rank_differs,
)
def first_count_for_all(seams: Seams) -> None:
    """Graphs are chosen for rank 0's batch; every rank expects as many rows as rank 0 sends."""

    def replay(call: Wrong, runner: Any, hidden_TH: Tensor, **_max_tokens: Any) -> Any:
        first, *_ = exchange(len(hidden_TH), runner.layer.group)
        return call(runner, hidden_TH, max_tokens=first)

    def counts(original: Wrong, dispatcher: Any, sent_R: Tensor) -> Tensor:
        received_R: Tensor = original(dispatcher, sent_R)
        return received_R[:1].repeat(len(received_R))

    seams.around(GraphRunner, "__call__", replay)
    seams.around(MoEAlltoAllTokenDispatcher, "_counts_for_me", counts)


# --- normalisation that no one asked for ------------------------------------------------------


def _normalised(config: MoEConfig) -> MoEConfig:
    return replace(config, norm_topk_prob=True)


@fault(
    "CF10",
    "HabanaAI/vllm-fork#671",
    "weights are normalised whatever the model says",
    stage="router",
    when=routes_otherwise(TopKRouter, _normalised),
)
def always_normalised(seams: Seams) -> None:
    """The option is wired to True on both paths."""
    misread(seams, ROUTERS, _normalised)


@fault(
    "CF11",
    "lightseekorg/tokenspeed#603",
    "the kernel's option to normalise defaults to True, and its caller leaves it out",
    stage="router",
    when=lambda case: in_graph(case) and routes_otherwise(TopKRouter, _normalised)(case),
)
def normalised_by_default(seams: Seams) -> None:
    """Only the fused router normalises what it should not."""
    misread(seams, (InferenceTopKRouter,), _normalised)
