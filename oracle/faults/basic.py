"""Gross faults, the first that a judge must see, and two that kill or stall a rank."""

import os
import signal
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from twinmoe.optimized.dispatcher import Gathered, InferenceCUDAGraphTokenDispatcher
from twinmoe.optimized.experts import InferenceGroupedMLP
from twinmoe.optimized.layer import MoELayer
from twinmoe.oracle.faults.fault import fault
from twinmoe.oracle.faults.seams import Seams, Wrong
from twinmoe.oracle.faults.triggers import gathers, has_tokens, on_several_ranks
from twinmoe.reference.dispatch import MoEAlltoAllTokenDispatcher


@fault("", "", "the output is all zeros", stage="output", when=has_tokens)
def zeros(seams: Seams) -> None:
    """Nothing is computed, in the right shape."""

    def blank(forward: Wrong, *args: Any) -> Tensor:
        return torch.zeros_like(forward(*args))

    seams.around(MoELayer, "forward", blank)


@fault("", "", "the last slot of the first token is never added", stage="experts", when=has_tokens)
def dropped_slot(seams: Seams) -> None:
    """The first row loses its last slot, on either dispatch."""

    def drop_id(
        forward: Wrong, self: object, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor
    ) -> None:
        valid = (ids[:, 0] >= 0).int()
        first = (valid.cumsum(0) == 1) & (valid == 1)
        last = torch.where(first, -1, ids[:, -1])
        forward(self, x, torch.cat([ids[:, :-1], last[:, None]], 1), weights, out)

    def drop_output(combine: Wrong, *args: Any) -> Tensor:
        y_TKH: Tensor = combine(*args)
        y_TKH[:1, -1] = 0
        return y_TKH

    seams.around(InferenceGroupedMLP, "forward", drop_id)
    seams.around(MoEAlltoAllTokenDispatcher, "token_combine", drop_output)


@fault(
    "",
    "",
    "one rank exchanges the segments of ranks 0 and 1 after the all-gather",
    stage="dispatch",
    when=lambda case: gathers(case) and case.tokens[0] != 0,
)
def swapped_segments(seams: Seams) -> None:
    """The last rank takes rank 0's hidden states for rank 1's and the other way round."""

    def swapped(dispatch: Wrong, *args: Any) -> Gathered:
        gathered: Gathered = dispatch(*args)
        if not seams.is_last_rank:
            return gathered
        first, second, *rest = gathered.hidden.chunk(seams.context.world_size)
        return replace(gathered, hidden=torch.cat([second, first, *rest]))

    seams.around(InferenceCUDAGraphTokenDispatcher, "token_dispatch", swapped)


@fault(
    "",
    "",
    "the last rank returns without taking part in the combine",
    stage="combine",
    when=on_several_ranks,
)
def skipped_collective(seams: Seams) -> None:
    """The last rank leaves the combine out, and so leaves its peers waiting in it."""

    def skip_scatter(combine: Wrong, self: object, x: Tensor) -> Tensor:
        if seams.is_last_rank:
            unreduced: Tensor = x.float()[: len(x) // seams.context.world_size]
            return unreduced
        result: Tensor = combine(self, x)
        return result

    def skip_alltoall(combine: Wrong, self: object, y_SH: Tensor, metadata: Any) -> Tensor:
        if seams.is_last_rank:
            pairs = metadata.num_tokens, metadata.experts_per_token
            return y_SH.new_zeros(*pairs, y_SH.shape[-1])
        result: Tensor = combine(self, y_SH, metadata)
        return result

    seams.around(InferenceCUDAGraphTokenDispatcher, "token_combine", skip_scatter)
    seams.around(MoEAlltoAllTokenDispatcher, "token_combine", skip_alltoall)


@fault(
    "", "", "the last rank's process dies before it routes", stage="router", when=lambda case: True
)
def killed_worker(seams: Seams) -> None:
    """The last rank's process is killed in mid-forward."""

    def killed(forward: Wrong, *args: Any, **kwargs: Any) -> Tensor:
        if seams.is_last_rank:
            os.kill(os.getpid(), signal.SIGKILL)
        result: Tensor = forward(*args, **kwargs)
        return result

    seams.around(MoELayer, "forward", killed)


@fault(
    "", "", "the last rank stops before the combine and never goes on", stage="combine",
    when=on_several_ranks,
)  # fmt: skip
def stalled_rank(seams: Seams) -> None:
    """The last rank sleeps where the others wait for it."""

    def stall(combine: Wrong, *args: Any) -> Tensor:
        if seams.is_last_rank:
            time.sleep(3600)
        result: Tensor = combine(*args)
        return result

    seams.around(InferenceCUDAGraphTokenDispatcher, "token_combine", stall)
    seams.around(MoEAlltoAllTokenDispatcher, "token_combine", stall)


@fault(
    "", "", "the last rank gathers where all others reduce", stage="combine",
    when=gathers,
)  # fmt: skip
def mismatched_collective(seams: Seams) -> None:
    """Two collectives of different kinds meet in one place of the program."""

    def gather(combine: Wrong, self: Any, partial: Tensor) -> Tensor:
        if seams.is_last_rank:
            rows = partial.float()[: len(partial) // seams.context.world_size].clone()
            self.transport.all_gather([rows[:, :1].contiguous()])
            return rows
        result: Tensor = combine(self, partial)
        return result

    seams.around(InferenceCUDAGraphTokenDispatcher, "token_combine", gather)
