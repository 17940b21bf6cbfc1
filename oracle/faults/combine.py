"""Faults of the combine: how a token's expert outputs become one row, on one rank and over all.

Where a fault sits in the sum over slots, the graphed path shows it in a rank's share (stage
experts), the AlltoAll path in the row itself (stage combine).

Legend: T tokens of one rank, M rows of all ranks, K experts per row, S slots, H hidden_size.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from twinmoe.optimized import layer as layers
from twinmoe.optimized.dispatcher import Gathered, InferenceCUDAGraphTokenDispatcher
from twinmoe.optimized.experts import InferenceGroupedMLP, backend
from twinmoe.optimized.layer import MoELayer
from twinmoe.optimized.shared_expert import InferenceSharedExpert, SideStream
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults.fault import fault
from twinmoe.oracle.faults.seams import Seams, Wrong
from twinmoe.oracle.faults.triggers import (
    asks_again,
    gathers,
    has_shared,
    has_tokens,
    in_graph,
    several_experts,
    shows_padding,
)
from twinmoe.oracle.faults.visits import visited
from twinmoe.reference.dispatch import MoEAlltoAllTokenDispatcher
from twinmoe.reference.placement import Placement

#: Ranks of one node: 16 in the field.
NODE_RANKS = 2

#: From the weighted terms of each row in fp32 [M, K, H] to their sum [M, H].
Total = Callable[[Tensor], Tensor]


def _sum_by(seams: Seams, total: Total) -> None:
    """Let both paths add up a row's terms, 0 for slots of other ranks, by ``total``."""
    kept: dict[str, Tensor] = {}

    def graphed(
        combine: Wrong, y_SH: Tensor, ids_MK: Tensor, weights_MK: Tensor, out_MH: Tensor, **how: Any
    ) -> None:
        combine(y_SH, ids_MK, weights_MK, out_MH, **how)
        y_MKH = y_SH[how["plan"].positions_S.view_as(ids_MK)].float()
        terms_MKH = weights_MK[..., None] * y_MKH if how["weighted"] else y_MKH
        out_MH.copy_(total(terms_MKH.where(_is_local(ids_MK, how)[..., None], 0.0)))

    def weigh(weigh_input: Wrong, *args: Any) -> tuple[Tensor, Tensor]:
        slots_TKH, kept["weights_TK"] = weigh_input(*args)
        return slots_TKH, kept["weights_TK"]

    def bring_home(token_combine: Wrong, *args: Any) -> Tensor:
        kept["y_TKH"] = token_combine(*args)
        return kept["y_TKH"]

    def eager(path: Wrong, *args: Any) -> Tensor:
        path(*args)
        return total(kept["weights_TK"][..., None] * kept["y_TKH"].float())

    seams.around(backend, "combine", graphed)
    seams.around(layers, "_weigh_input", weigh)
    seams.around(MoEAlltoAllTokenDispatcher, "token_combine", bring_home)
    seams.around(MoELayer, "_eager_path", eager)


def _is_local(ids_MK: Tensor, how: dict[str, Any]) -> Tensor:
    """Which slots are this rank's, by the arguments of ``combine``."""
    first: int = how["first_expert"]
    num_local: int = len(how["plan"].ends_L)
    local_MK = ids_MK - first
    return (local_MK >= 0) & (local_MK < num_local)


def _one_after_another(terms_MKH: Tensor) -> Tensor:
    return functools.reduce(torch.add, terms_MKH.unbind(1))


def _slots_together(case: Case) -> int:
    """Most slots of one row that are added up in one place."""
    if not in_graph(case):
        return case.config.num_experts_per_tok
    owner_TK = Placement(case.config.num_experts, case.ep_size).owner(torch.cat(visited(case)))
    return max(int(row.bincount().max()) for row in owner_TK)


# --- the sum over slots -----------------------------------------------------------------------


def _sums_narrowly(case: Case) -> bool:
    """A sum in the model's dtype differs from one that is rounded to it at the end."""
    narrow = has_tokens(case) and case.config.dtype is not torch.float32
    # two narrow terms have a sum that is rounded once either way
    return narrow and _slots_together(case) > (1 if case.wire == "fp32" else 2)


@fault(
    "CB01",
    "vllm-project/vllm#15045, vllm-project/vllm#46643",
    "the terms of a row are added up in the model's dtype, rounding after each",
    stage="experts",
    stage_by_alltoall="combine",
    when=_sums_narrowly,
)
def narrow_sum(seams: Seams) -> None:
    """Every term and every partial sum is rounded to 8 or 11 bits."""
    dtype = seams.case.config.dtype
    _sum_by(seams, lambda terms_MKH: _one_after_another(terms_MKH.to(dtype)).float())


def _order_shows(case: Case) -> bool:
    """A sum of three terms or more is asked for twice, kept wide, and promised bit for bit."""
    wide = case.wire == "fp32" or case.config.dtype is torch.float32
    promised = case.transport in ("p2p", "alltoall")
    return asks_again(case) and _slots_together(case) > 2 and wide and promised


@fault(
    "CB12",
    "huggingface/transformers#43362",
    "terms are added up by atomics, in another order each time",
    stage="combine",
    when=_order_shows,
)
def order_of_atomics(seams: Seams) -> None:
    """A table of orders takes the place of the race; a counter on the device walks it.

    Two terms have no order: a row needs three in one place.
    """
    generator = torch.Generator().manual_seed(seams.case.seed)
    slots = seams.case.config.num_experts_per_tok
    orders = torch.stack([torch.randperm(slots, generator=generator) for _ in range(61)])
    orders, calls = orders.to(seams.context.device), torch.zeros(1, dtype=torch.int64)
    calls = calls.to(seams.context.device)

    def in_some_order(terms_MKH: Tensor) -> Tensor:
        calls.add_(1)
        order_K = orders.index_select(0, calls % len(orders))[0]
        return _one_after_another(terms_MKH.index_select(1, order_K))

    _sum_by(seams, in_some_order)


@fault(
    "CB15",
    "deepspeedai/DeepSpeed#8213",
    "with one rank the sum over a token's slots is skipped: T * k rows are taken for T",
    stage="experts",
    when=lambda case: case.ep_size == 1 and several_experts(case),
)
def skipped_local_sum(seams: Seams) -> None:
    """The first T of the T * k rows come back."""
    if seams.context.world_size > 1:
        return

    def first_rows(terms_TKH: Tensor) -> Tensor:
        return terms_TKH.flatten(0, 1)[: len(terms_TKH)]

    _sum_by(seams, first_rows)


@fault(
    "CB11",
    "huggingface/transformers#45621",
    "slots of other ranks are silenced by a weight of 0, but their rows hold whatever was there",
    stage="experts",
    when=lambda case: gathers(case) or shows_padding(case),
)
def zero_times_garbage(seams: Seams) -> None:
    """0 * NaN: the rows that nobody writes are taken to hold NaN, as poisoned memory does."""

    def unmasked(
        combine: Wrong, y_SH: Tensor, ids_MK: Tensor, weights: Tensor, out_MH: Tensor, **how: Any
    ) -> None:
        combine(y_SH, ids_MK, weights, out_MH, **how)
        sentinel_MK = torch.where(_is_local(ids_MK, how), 0.0, torch.nan)
        out_MH.add_(sentinel_MK.sum(dim=1, keepdim=True))

    seams.around(backend, "combine", unmasked)


def _far_apart(case: Case) -> bool:
    """Neighbouring ranks have tokens of different owners, in a group beyond one node."""
    if not gathers(case) or case.ep_size <= NODE_RANKS:
        return False
    rows = max(case.tokens)
    owner = torch.full((case.ep_size, rows, case.config.num_experts_per_tok), -1)
    placement = Placement(case.config.num_experts, case.ep_size)
    for rank, ids_TK in enumerate(visited(case)):
        owner[rank, : len(ids_TK)] = placement.owner(ids_TK)
    return not torch.equal(owner, owner.roll(1, 0))


@fault(
    "CB13",
    "vllm-project/vllm#52639",
    "beyond one node the combine is given the dispatched ids, which are other ranks' tokens'",
    stage="experts",
    when=_far_apart,
)
def ids_of_other_tokens(seams: Seams) -> None:
    """Slots are found by the ids of the rank before; 32 ranks of the field are here 4."""
    ranks = seams.context.world_size

    def overwritten(combine: Wrong, y_SH: Tensor, ids_MK: Tensor, *args: Any, **how: Any) -> None:
        if ranks > NODE_RANKS:
            ids_MK = ids_MK.roll(len(ids_MK) // ranks, 0)
        combine(y_SH, ids_MK, *args, **how)

    seams.around(backend, "combine", overwritten)


# --- router weights on the input --------------------------------------------------------------


def _weighs_input(case: Case) -> bool:
    """Weights other than 1 go into the experts' input."""
    config = case.config
    is_one = config.num_experts_per_tok == 1 and config.norm_topk_prob
    is_one &= config.routed_scaling_factor == 1.0
    return has_tokens(case) and config.router_weight_on_input and not is_one


@fault(
    "CB03",
    "vllm-project/vllm#43694",
    "router weights that went into the input are applied to the output as well",
    stage="experts",
    stage_by_alltoall="combine",
    when=_weighs_input,
)
def weighed_twice(seams: Seams) -> None:
    """The preparation weighs, and the combine does not know."""

    def graphed(combine: Wrong, *args: Any, **how: Any) -> None:
        combine(*args, **{**how, "weighted": True})

    def eager(
        weigh_input: Wrong, config: Any, hidden_TH: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        slots_TKH, _ = weigh_input(config, hidden_TH, weights_TK)
        return slots_TKH, weights_TK

    seams.around(backend, "combine", graphed)
    seams.around(layers, "_weigh_input", eager)


@fault(
    "CB16",
    "vllm-project/vllm#28879",
    "without a side stream the shared expert reads an input that was weighed in place",
    stage="output",
    when=lambda case: has_shared(case) and _weighs_input(case),
)
def weighed_in_place(seams: Seams) -> None:
    """The shared expert runs last, on rows that the preparation has overwritten."""

    def later(_start: Wrong, _stream: object, compute: Callable[[], Tensor]) -> Any:
        return compute

    def eager(
        weigh_input: Wrong, config: Any, hidden_TH: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        slots_TKH, left_TK = weigh_input(config, hidden_TH, weights_TK)
        if config.router_weight_on_input:
            hidden_TH.mul_(weights_TK[:, :1])
        return slots_TKH, left_TK

    def graphed(dispatch: Wrong, dispatcher: object, hidden_NH: Tensor, routing: Any) -> Gathered:
        gathered: Gathered = dispatch(dispatcher, hidden_NH, routing)
        if seams.case.config.router_weight_on_input:
            hidden_NH.mul_(routing.weights_TK[:, :1])
        return gathered

    seams.around(SideStream, "start", later)
    seams.around(layers, "_weigh_input", eager)
    seams.around(InferenceCUDAGraphTokenDispatcher, "token_dispatch", graphed)


# --- the shared expert ------------------------------------------------------------------------


@fault(
    "CB04",
    "sgl-project/sglang#31475, sgl-project/sglang#31476, vllm-project/vllm#49378",
    "every rank adds the shared expert's output before the reduction sums it over ranks",
    stage="experts",
    when=lambda case: gathers(case) and has_shared(case),
)
def shared_on_every_rank(seams: Seams) -> None:
    """The other ranks' copies come in with their shares: once becomes as often as ranks."""
    built: dict[int, Any] = {}

    def construct(build: Wrong, shared: Any, *args: Any) -> None:
        build(shared, *args)
        built[shared.config.hidden_size] = shared

    def add(
        forward: Wrong, experts: object, x_MH: Tensor, ids_MK: Tensor, weights: Tensor, out: Tensor
    ) -> None:
        forward(experts, x_MH, ids_MK, weights, out)
        ranks, rank = seams.context.world_size, seams.context.rank
        row_M = torch.arange(len(x_MH), device=x_MH.device)
        is_foreign_M = row_M // max(1, len(x_MH) // ranks) != rank
        is_foreign_M &= ids_MK[:, 0] >= 0
        if x_MH.shape[1] in built:
            shared_MH = built[x_MH.shape[1]](x_MH)
            out.add_(shared_MH.where(is_foreign_M[:, None], 0.0))

    seams.around(InferenceSharedExpert, "__init__", construct)
    seams.around(InferenceGroupedMLP, "forward", add)
