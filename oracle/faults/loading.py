"""Faults of loading: which rows of a weight file reach the layer, and in which layout.

A layer is built right; the faults are in what later replaces its weights.

Legend: H hidden_size, I intermediate size, F rows of w13, E experts, L experts of one rank.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinmoe.optimized.layer import MoELayer
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults.fault import fault
from twinmoe.oracle.faults.seams import Seams, Wrong
from twinmoe.oracle.faults.triggers import has_tokens, is_gated, on_several_ranks
from twinmoe.oracle.faults.visits import leaves_rank_0
from twinmoe.reference import checkpoint
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.layout import PER_EXPERT
from twinmoe.reference.weights import MoEWeights

Loaded = tuple[MoEConfig, dict[str, Tensor]]


def _loads(case: Case, kinds: str) -> list[int]:
    """The version that each forward runs on, among those behind a step of ``kinds``."""
    version: int | None = None
    versions = []
    for step in case.steps():
        if step.kind in kinds:
            version = step.number
        elif step.is_forward and version is not None:
            versions.append(version)
    return versions


@fault(
    "LD01",
    "vllm-project/vllm#42821, NovaSky-AI/SkyRL#1680",
    "a reload writes the file's layout over weights that were brought into the kernels' layout",
    stage="experts",
    when=lambda case: is_gated(case) and bool(_loads(case, "wl")),
)
def raw_reload(seams: Seams) -> None:
    """Kernels that want [up | gate] find [gate | up]: to ours, the halves are exchanged."""

    def raw(reload: Wrong, layer: Any, weights: MoEWeights) -> None:
        if layer.config.gated:
            gate, up = weights.w13_LFH.chunk(2, dim=1)
            weights = replace(weights, w13_LFH=torch.cat([up, gate], 1))
        reload(layer, weights)

    seams.around(MoELayer, "reload", raw)


@fault(
    "LD03",
    "vllm-project/vllm#47874",
    "a transposed tensor holds gate and up, is turned round for the first, and again for the next",
    stage="experts",
    when=lambda case: is_gated(case) and bool(_loads(case, "l")),
)
def transposed_twice(seams: Seams) -> None:
    """The loop's own variable is reassigned; planted where the sizes do not give it away."""

    def read(original: Wrong, *args: Any) -> Loaded:
        config, tensors = original(*args)
        if not config.gated:
            return config, tensors
        right_LFH = tensors["w13_LFH"]
        rows = config.moe_intermediate_size
        loaded, w13_LFH = right_LFH.transpose(1, 2), torch.empty_like(right_LFH)
        for part in (slice(0, rows), slice(rows, 2 * rows)):
            loaded = loaded.transpose(1, 2)
            w13_LFH[:, part] = loaded.reshape(right_LFH.shape)[:, part]
        return config, tensors | {"w13_LFH": w13_LFH}

    seams.around(checkpoint, "read_tensors", read)


@fault(
    "LD05",
    "vllm-project/vllm#34291",
    "weights that are this rank's share already are cut to this rank's share again",
    stage="experts",
    when=lambda case: on_several_ranks(case) and leaves_rank_0(case) and any(_loads(case, "wl")),
)
def cut_twice(seams: Seams) -> None:
    """Rank 0 is right; on the others the cut is empty, and the old experts stay."""

    def cut(reload: Wrong, layer: Any, weights: MoEWeights) -> None:
        held, given = layer.weights.tensors(), weights.tensors()

        def again(name: str) -> Tensor:
            share = given[name][weights.experts.start : weights.experts.stop]
            return torch.cat([share, held[name][len(share) :]])

        reload(layer, replace(weights, w13_LFH=again("w13_LFH"), w2_LHI=again("w2_LHI")))

    seams.around(MoELayer, "reload", cut)


#: What a rank's experts are padded to.
_PADDED_EXPERTS = 4


def _padded(experts: int) -> int:
    return -(-experts // _PADDED_EXPERTS) * _PADDED_EXPERTS


def _misplaced(case: Case) -> bool:
    experts = case.config.num_experts
    local = experts // case.ep_size
    shifts = [rank * (_padded(local) - local) % experts for rank in range(case.ep_size)]
    return any(shifts) and leaves_rank_0(case)


@fault(
    "LD06",
    "ROCm/ATOM#309",
    "where a rank's share starts in the file is computed from its padded size",
    stage="experts",
    when=lambda case: has_tokens(case) and bool(_loads(case, "l")) and _misplaced(case),
)
def padded_offset(seams: Seams) -> None:
    """Padded to a multiple of 4 experts; behind the file's end, reading goes on at its start."""

    def read(original: Wrong, path: Path, experts: range | None) -> Loaded:
        config, tensors = original(path, None)
        if experts is None:
            return config, tensors
        start = experts.start // len(experts) * _padded(len(experts))
        rows = torch.arange(start, start + len(experts)) % config.num_experts
        return config, tensors | {name: tensors[name][rows] for name in PER_EXPERT}

    seams.around(checkpoint, "read_tensors", read)


@fault(
    "LD07",
    "vllm-project/vllm#32718",
    "a second load finds the first one's tensors in a cache and does not read the new file",
    stage="router",
    when=lambda case: has_tokens(case) and len(set(_loads(case, "l"))) > 1,
)
def cached_tensors(seams: Seams) -> None:
    """Tensors are remembered by name and shape, whatever file they came from."""
    cache: dict[tuple[str, torch.Size], Tensor] = {}

    def read(original: Wrong, *args: Any) -> Loaded:
        config, tensors = original(*args)
        remembered = {
            name: cache.setdefault((name, tensor.shape), tensor) for name, tensor in tensors.items()
        }
        return config, remembered

    seams.around(checkpoint, "read_tensors", read)
