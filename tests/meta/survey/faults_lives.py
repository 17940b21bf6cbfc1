"""Faults that need a history: graphs, reloads, starved ranks; of 2025 and 2026.

Legend: T tokens, S rows received, H hidden_size, N rows of a bucket.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from tests.meta.survey.planting import planted
from twinmoe.optimized.experts import InferenceGroupedMLP
from twinmoe.optimized.graph import GraphRunner
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults.lives import Moment, some_moment
from twinmoe.oracle.faults.seams import Seams, Wrong
from twinmoe.oracle.faults.triggers import has_bias, has_tokens, lives_through, takes_eager_path
from twinmoe.oracle.faults.visits import starves_a_rank
from twinmoe.reference.dispatch import MoEAlltoAllTokenDispatcher
from twinmoe.reference.weights import MoEWeights


def _reloads(case: Case) -> bool:
    return has_tokens(case) and lives_through(case, "wl")


@planted("NVIDIA/Megatron-LM#1482", "router", when=lambda case: _reloads(case) and has_bias(case))
def bias_reloaded_in_16_bits(seams: Seams) -> None:
    """A reload passes the fp32 correction bias through the model's dtype."""

    def copy(original: Wrong, weights: MoEWeights, other: MoEWeights) -> None:
        original(weights, other)
        if weights.correction_bias_E is not None:
            bias_E = weights.correction_bias_E
            bias_E.copy_(bias_E.to(weights.router_EH.dtype).float())

    seams.around(MoEWeights, "copy_", copy)


@planted("sgl-project/sglang#28676", "experts", when=_reloads)
def stale_shuffle(seams: Seams) -> None:
    """After a reload rows are shuffled by cached indices whose memory was given away."""

    def copy(original: Wrong, weights: MoEWeights, other: MoEWeights) -> None:
        original(weights, other)
        weights.w2_LHI.copy_(weights.w2_LHI.roll(1, dims=1))

    seams.around(MoEWeights, "copy_", copy)


@planted("vllm-project/vllm-ascend#13012", "router", when=_reloads)
def router_not_restored(seams: Seams) -> None:
    """A wake-up restores what is registered, and the router's buffers are not."""

    def copy(original: Wrong, weights: MoEWeights, other: MoEWeights) -> None:
        kept_EH = weights.router_EH.clone()
        original(weights, other)
        weights.router_EH.copy_(kept_EH)

    seams.around(MoEWeights, "copy_", copy)


@planted(
    "flashinfer-ai/flashinfer#4531",
    "",
    when=lambda case: case.ep_size > 1 and takes_eager_path(case) and starves_a_rank(case),
)
def waits_for_no_rows(seams: Seams) -> None:
    """A rank that has received no rows waits for tiles that nobody will finish."""

    def rows(original: Wrong, experts: Any, x_SH: Tensor, local_S: Tensor) -> Tensor:
        while not len(x_SH):
            time.sleep(0.1)
        y_SH: Tensor = original(experts, x_SH, local_S)
        return y_SH

    seams.around(InferenceGroupedMLP, "expert_rows", rows)


def _after_a_larger(_case: Case, moment: Moment) -> bool:
    return moment.path == "captured" and moment.captured_later > 0


@planted(
    "flashinfer-ai/flashinfer#4827", "router|dispatch|output", when=some_moment(_after_a_larger)
)
def grown_workspace(seams: Seams) -> None:
    """A larger batch frees the workspace that earlier graphs still write to."""
    captured: list[Any] = []

    def capture(original: Wrong, runner: Any, bucket: int) -> Any:
        one = original(runner, bucket)
        captured.append(one)
        return one

    def call(original: Wrong, runner: Any, *args: Any, **kwargs: Any) -> Tensor:
        output_TH: Tensor = original(runner, *args, **kwargs)
        lost = len(captured) > 1 and runner.last is not captured[-1]
        return torch.zeros_like(output_TH) if lost else output_TH

    seams.around(GraphRunner, "_capture", capture)
    seams.around(GraphRunner, "__call__", call)


def _counts_change(case: Case) -> bool:
    steps = [step for step in case.steps() if step.is_forward]
    return case.ep_size > 1 and takes_eager_path(case) and len({step.number for step in steps}) > 1


@planted("ByteDance-Seed/VeOmni#896", "", when=_counts_change)
def counts_of_the_first_call(seams: Seams) -> None:
    """How many rows come from each rank is exchanged once, and kept."""
    kept: list[Tensor] = []

    def counts(original: Wrong, dispatcher: Any, sent_R: Tensor) -> Tensor:
        kept.append(original(dispatcher, sent_R))
        return kept[0]

    seams.around(MoEAlltoAllTokenDispatcher, "_counts_for_me", counts)
