"""Faults of range: numbers squeezed through fp16, held at the largest, or replaced by zero.

Ordinary numbers come through unchanged; only cases at the ends of formats show these
(:mod:`twinmoe.oracle.magnitudes`).

Legend: M rows, K experts per row, S slots, H hidden_size.
"""

from typing import Any

import torch
from torch import Tensor

from twinmoe.optimized.experts import InferenceGroupedMLP, grouped_mm
from twinmoe.optimized.layer import MoELayer
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults.fault import fault
from twinmoe.oracle.faults.seams import Seams, Wrong
from twinmoe.oracle.faults.triggers import backend_of, has_tokens


def _leaves_fp16(case: Case) -> bool:
    """Experts of a bf16 layer, the precision of which fp16 has, at the ends of a range."""
    ends = case.magnitude in ("fp16_ends", "own_ends")
    return has_tokens(case) and ends and case.config.dtype is torch.bfloat16


def _through_fp16(values: Tensor) -> Tensor:
    return values.half().to(values.dtype)


@fault(
    "",
    "",
    "activations of a bf16 layer are stored in fp16 before the second matrix",
    stage="experts",
    when=lambda case: _leaves_fp16(case) and backend_of(case) == "grouped_mm",
)
def activations_in_fp16(seams: Seams) -> None:
    """Between the grouped GEMMs of either path."""
    seams.around(grouped_mm, "activate", lambda act, *args: _through_fp16(act(*args)))


@fault(
    "",
    "",
    "what the experts of a bf16 layer answer is stored in fp16",
    stage="experts",
    when=_leaves_fp16,
)
def answers_in_fp16(seams: Seams) -> None:
    """Rows on the AlltoAll path, a rank's share of them on the graphed one."""

    def graphed(forward: Wrong, experts: object, x: Tensor, *args: Any) -> None:
        forward(experts, x, *args)
        out_MH: Tensor = args[-1]
        out_MH.copy_(_through_fp16(out_MH))

    seams.around(InferenceGroupedMLP, "forward", graphed)
    seams.around(InferenceGroupedMLP, "expert_rows", lambda rows, *args: _through_fp16(rows(*args)))


def _overflows(case: Case) -> bool:
    """Some experts answer more than the dtype holds."""
    own = case.magnitude == "own_ends"
    return has_tokens(case) and (own or (case.magnitude == "fp16_ends" and _is_fp16(case)))


def _is_fp16(case: Case) -> bool:
    return case.config.dtype is torch.float16


@fault("", "", "outputs beyond the largest number are held there", stage="output", when=_overflows)
def saturated_output(seams: Seams) -> None:
    """No infinity leaves the layer."""

    def held(forward: Wrong, *args: Any) -> Tensor:
        out_TH: Tensor = forward(*args)
        largest = torch.finfo(out_TH.dtype).max
        return out_TH.clamp(-largest, largest)

    seams.around(MoELayer, "forward", held)


@fault("", "", "a NaN leaves the layer as a zero", stage="output", when=_overflows)
def zero_for_nan(seams: Seams) -> None:
    """Infinities stay what they are."""

    def hushed(forward: Wrong, *args: Any) -> Tensor:
        out_TH: Tensor = forward(*args)
        return out_TH.masked_fill(out_TH.isnan(), 0.0)

    seams.around(MoELayer, "forward", hushed)
