"""Gross faults, the first that a judge must see, and two that kill or stall a rank."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from twinmoe.optimized.dispatcher import Gathered, InferenceCUDAGraphTokenDispatcher
from twinmoe.optimized.experts import InferenceGroupedMLP
from twinmoe.optimized.layer import MoELayer
from twinmoe.optimized.router import InferenceTopKRouter
from twinmoe.oracle.faults.patching import wrapped
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.dispatch import MoEAlltoAllTokenDispatcher
from twinmoe.reference.router import TopKRouter

Function = Callable[..., Any]


@contextmanager
def zeros(_context: RankContext) -> Iterator[None]:
    """Forward returns zeros of the right shape."""

    def wrap(forward: Function) -> Function:
        return lambda *args, **kwargs: torch.zeros_like(forward(*args, **kwargs))

    with wrapped(MoELayer, "forward", wrap):
        yield


@contextmanager
def swapped_gate_up(_context: RankContext) -> Iterator[None]:
    """Every expert's first matrix has its halves exchanged."""

    def wrap(construct: Function) -> Function:
        def constructed(self: object, config: Any, weights: Any, *args: Any) -> None:
            gate, up = weights.w13_LFH.chunk(2, dim=1)
            construct(self, config, replace(weights, w13_LFH=torch.cat([up, gate], 1)), *args)

        return constructed

    with wrapped(InferenceGroupedMLP, "__init__", wrap):
        yield


@contextmanager
def dropped_slot(_context: RankContext) -> Iterator[None]:
    """The first row loses its last slot, on either dispatch."""

    def drop_id(forward: Function) -> Function:
        def dropped(self: object, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None:
            valid = (ids[:, 0] >= 0).int()
            first = (valid.cumsum(0) == 1) & (valid == 1)
            last = torch.where(first, -1, ids[:, -1])
            forward(self, x, torch.cat([ids[:, :-1], last[:, None]], 1), weights, out)

        return dropped

    def drop_output(combine: Function) -> Function:
        def dropped(self: object, *args: Any) -> Tensor:
            y_TKH: Tensor = combine(self, *args)
            y_TKH[:1, -1] = 0
            return y_TKH

        return dropped

    with (
        wrapped(InferenceGroupedMLP, "forward", drop_id),
        wrapped(MoEAlltoAllTokenDispatcher, "token_combine", drop_output),
    ):
        yield


@contextmanager
def bias_in_weights(_context: RankContext) -> Iterator[None]:
    """Weights are gathered from the biased score: w + bias / (the scale of w)."""

    def wrap(forward: Function) -> Function:
        def biased(self: Any, *args: Any) -> Any:
            routing = forward(self, *args)
            bias_TK = self.weights.correction_bias_E[routing.ids_TK.clamp(min=0).long()]
            wrong = routing.weights_TK + bias_TK * self.config.routed_scaling_factor
            return replace(routing, weights_TK=wrong.to(routing.weights_TK.dtype))

        return biased

    with (
        wrapped(InferenceTopKRouter, "forward", wrap),
        wrapped(TopKRouter, "forward", wrap),
    ):
        yield


@contextmanager
def swapped_segments(context: RankContext) -> Iterator[None]:
    """The last rank takes rank 0's hidden states for rank 1's and the other way round."""

    def wrap(dispatch: Function) -> Function:
        def swapped(self: object, hidden: Tensor, *args: Any) -> Gathered:
            gathered: Gathered = dispatch(self, hidden, *args)
            if context.rank != context.world_size - 1:
                return gathered
            first, second, *rest = gathered.hidden.chunk(context.world_size)
            return replace(gathered, hidden=torch.cat([second, first, *rest]))

        return swapped

    with wrapped(InferenceCUDAGraphTokenDispatcher, "token_dispatch", wrap):
        yield


@contextmanager
def skipped_collective(context: RankContext) -> Iterator[None]:
    """The last rank leaves the combine out, and so leaves its peers waiting in it."""

    def wrap(combine: Function) -> Function:
        def skipped(self: Any, x: Tensor, *args: Any) -> Tensor:
            if context.rank == context.world_size - 1:
                unreduced: Tensor = x.float()[: len(x) // context.world_size]
                return unreduced
            result: Tensor = combine(self, x, *args)
            return result

        return skipped

    with (
        wrapped(InferenceCUDAGraphTokenDispatcher, "token_combine", wrap),
        wrapped(MoEAlltoAllTokenDispatcher, "token_combine", _skip_alltoall(context)),
    ):
        yield


def _skip_alltoall(context: RankContext) -> Callable[[Function], Function]:
    def wrap(combine: Function) -> Function:
        def skipped(self: Any, y_SH: Tensor, metadata: Any) -> Tensor:
            if context.rank == context.world_size - 1:
                pairs = metadata.num_tokens, metadata.experts_per_token
                return y_SH.new_zeros(*pairs, y_SH.shape[-1])
            result: Tensor = combine(self, y_SH, metadata)
            return result

        return skipped

    return wrap


@contextmanager
def killed_worker(context: RankContext) -> Iterator[None]:
    """The last rank's process is killed in mid-forward."""

    def wrap(forward: Function) -> Function:
        def killed(*args: Any, **kwargs: Any) -> Tensor:
            if context.rank == context.world_size - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            result: Tensor = forward(*args, **kwargs)
            return result

        return killed

    with wrapped(MoELayer, "forward", wrap):
        yield
