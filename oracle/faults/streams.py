"""Faults of streams: one reads, or returns, before the other has finished.

Legend: T tokens, H hidden_size, S dispatched rows.
"""

from typing import Any

import torch
from torch import Tensor

from twinmoe.optimized.experts import InferenceGroupedMLP
from twinmoe.optimized.launch import run
from twinmoe.optimized.shared_expert import InferenceSharedExpert
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults.fault import fault
from twinmoe.oracle.faults.leftover import Leftover
from twinmoe.oracle.faults.lives import consecutive, some_moment
from twinmoe.oracle.faults.seams import Seams, Wrong
from twinmoe.oracle.faults.triggers import has_shared
from twinmoe.oracle.subject import BUCKETS


def _batch_behind_another(case: Case) -> bool:
    """Some rank has a token of a batch, and had one of another batch right before."""
    return has_shared(case) and any(
        before.step.number != now.step.number
        and any(min(counts) > 0 for counts in zip(before.tokens, now.tokens, strict=True))
        for before, now in consecutive(case)
    )


@fault(
    "ST01",
    "vllm-project/vllm#28430",
    "the shared expert's stream does not wait for the hidden states that it reads",
    stage="output",
    when=_batch_behind_another,
)
def unawaited_input(seams: Seams) -> None:
    """The shared expert still finds the batch before in as many rows as that had."""
    left: dict[object, Leftover] = {}

    def forward(original: Wrong, expert: Any, x_TH: Tensor) -> Tensor:
        seen_TH = torch.empty_like(x_TH)

        def read() -> None:
            if expert not in left:
                left[expert] = Leftover(x_TH.new_empty(BUCKETS[-1], x_TH.shape[1]))
            seen_TH.copy_(left[expert].exchange(x_TH, x_TH))

        run("read_early", read)
        y_TH: Tensor = original(expert, seen_TH)
        return y_TH

    seams.around(InferenceSharedExpert, "forward", forward)


@fault(
    "ST03",
    "EfficientMoE/MoE-Infinity#197",
    "experts return when their work is queued, not when it is done",
    stage="experts",
    when=some_moment(lambda _case, moment: moment.path == "alltoall" and moment.poisoned),
)
def returned_early(seams: Seams) -> None:
    """The last row is whatever new memory holds, which shows where that is filled."""

    def rows(original: Wrong, experts: Any, *args: Tensor) -> Tensor:
        y_SH: Tensor = original(experts, *args)
        if torch.are_deterministic_algorithms_enabled():
            y_SH[-1:] = torch.empty_like(y_SH[-1:])
        return y_SH

    seams.around(InferenceGroupedMLP, "expert_rows", rows)
