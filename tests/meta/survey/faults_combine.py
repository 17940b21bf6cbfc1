"""Faults of the combine and of the transports, from public reports of 2025 and 2026.

Legend: M rows, T tokens, K experts per token, H hidden_size, N rows of a bucket.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.meta.survey.planting import planted
from twinmoe.optimized import layer as layer_module
from twinmoe.optimized.communication.eligibility import Tier
from twinmoe.optimized.communication.pool import Capacity
from twinmoe.optimized.dispatcher import InferenceCUDAGraphTokenDispatcher
from twinmoe.optimized.experts import InferenceGroupedMLP
from twinmoe.optimized.launch import run
from twinmoe.oracle.faults.seams import Seams, Wrong
from twinmoe.oracle.faults.triggers import (
    bucket_of,
    gathers,
    in_graph,
    lives_through,
    symmetric,
    takes_eager_path,
)
from twinmoe.reference.dispatch import MoEAlltoAllTokenDispatcher


@planted("NVIDIA/Megatron-LM#6458", "combine", when=lambda c: gathers(c) and c.wire == "fp32")
def narrow_shares(seams: Seams) -> None:
    """Shares that travel in fp32 were rounded to the model's dtype."""

    def combine(original: Wrong, dispatcher: Any, partial: Tensor) -> Tensor:
        dtype = seams.case.config.dtype
        partial.copy_(partial.to(dtype).to(partial.dtype))
        summed_NH: Tensor = original(dispatcher, partial)
        return summed_NH

    seams.around(InferenceCUDAGraphTokenDispatcher, "token_combine", combine)


@planted(
    "intel/intel-xpu-backend-for-triton#7455",
    "combine|experts",
    when=lambda c: takes_eager_path(c) and c.config.num_experts_per_tok in (2, 3, 4),
)
def sum_ignores_strides(seams: Seams) -> None:
    """For k of 2 to 4 rows that lie slot after slot are summed as if they lay token after token."""

    def combine(original: Wrong, *args: Any) -> Tensor:
        y_TKH: Tensor = original(*args)
        if y_TKH.shape[1] not in (2, 3, 4):
            return y_TKH
        return y_TKH.transpose(0, 1).contiguous().view(y_TKH.shape)

    seams.around(MoEAlltoAllTokenDispatcher, "token_combine", combine)


@planted("triton-lang/triton#6547", "experts|combine", when=in_graph)
def tuned_in_place(seams: Seams) -> None:
    """The first call of a shape times two variants of a kernel that adds in place."""
    tuned: set[object] = set()

    def forward(
        original: Wrong, experts: Any, x: Tensor, ids: Tensor, w: Tensor, out: Tensor
    ) -> None:
        original(experts, x, ids, w, out)
        is_first = out.new_zeros(())

        def tune() -> None:
            is_first.fill_(float(out.shape not in tuned))
            tuned.add(out.shape)

        run("tune", tune)
        out.add_(out.clone() * is_first)

    seams.around(InferenceGroupedMLP, "forward", forward)


@planted("hw-native-sys/pypto#2242, item 2", "combine", when=symmetric)
def cut_by_whole_vectors(seams: Seams) -> None:
    """The sum leaves the last elements of a slice that fill no vector as they were: zero."""

    def combine(original: Wrong, dispatcher: Any, partial: Tensor) -> Tensor:
        summed_NH: Tensor = original(dispatcher, partial)
        whole = summed_NH.numel() // 32 * 32
        is_whole = torch.arange(summed_NH.numel(), device=summed_NH.device) < whole
        return summed_NH.where(is_whole.view_as(summed_NH), 0.0)

    seams.around(InferenceCUDAGraphTokenDispatcher, "token_combine", combine)


# --- which transport runs -------------------------------------------------------------------------


def _downgrade(seams: Seams, tier: Tier) -> None:
    """Where ``tier`` is demanded, plain collectives are taken, and honestly reported."""

    def select(original: Wrong, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("tier") is tier:
            kwargs["tier"] = Tier.COLLECTIVE
        return original(*args, **kwargs)

    seams.around(layer_module, "select_transport", select)


@planted(
    "vllm-project/vllm#42993",
    "output|dispatch",
    when=lambda case: symmetric(case) and case.transport == "p2p",
    changes_output=False,
)
def refused_at_the_limit(seams: Seams) -> None:
    """A size gate refuses what the buffer was made for, and another backend serves silently."""
    _downgrade(seams, Tier.P2P)


@planted(
    "sgl-project/sglang#30364",
    "output|dispatch",
    when=lambda case: symmetric(case) and case.transport == "nvls",
    changes_output=False,
)
def disabled_without_multicast(seams: Seams) -> None:
    """Where multicast is missing, the whole communicator disables itself."""
    _downgrade(seams, Tier.NVLS)


@planted(
    "vllm-project/vllm#45004",
    "output",
    when=lambda case: symmetric(case) and lives_through(case, "k"),
    changes_output=False,
)
def switch_still_sets_up(seams: Seams) -> None:
    """With the switch on, peers' memory is mapped all the same, and then not used."""

    def select(original: Wrong, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("kill_switch"):
            original(*args, **kwargs | {"kill_switch": False, "tier": Tier.P2P})
        return original(*args, **kwargs)

    seams.around(layer_module, "select_transport", select)


@planted(
    "NVIDIA/Megatron-LM#4576",
    "",
    when=lambda case: symmetric(case) and bucket_of(case) > 8,
)
def buffer_of_default_size(seams: Seams) -> None:
    """The symmetric buffer has a default size, whatever the layer will need."""

    def for_moe(original: Wrong, cls: Any, **sizes: Any) -> Capacity:
        capacity: Capacity = original(cls, **sizes | {"tokens_per_rank": 8})
        return capacity

    seams.around(Capacity, "for_moe", for_moe)


@planted("NVIDIA/Megatron-LM#5233", "", when=lambda case: in_graph(case) and case.ep_size == 1)
def no_buffer_alone(seams: Seams) -> None:
    """A buffer that a kernel always reads is only made for more than one rank."""

    def dispatch(original: Wrong, dispatcher: Any, *args: Any) -> Any:
        if dispatcher.transport.world_size == 1:
            raise RuntimeError("'NoneType' object has no attribute 'data_ptr'")
        return original(dispatcher, *args)

    seams.around(InferenceCUDAGraphTokenDispatcher, "token_dispatch", dispatch)
