"""Stages at the ends of formats: where they really lie, by the truths of the pinned cases.

Legend: T tokens, H hidden_size, E experts, F rows of w13, I moe_intermediate_size.
"""

from __future__ import annotations

import os
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.oracle import ranged_layers
from twinmoe.oracle import RankObservation, judge
from twinmoe.oracle.activation import ACTIVATIONS
from twinmoe.oracle.bits import same_bits
from twinmoe.oracle.case import Case
from twinmoe.oracle.corners import CORNERS
from twinmoe.oracle.emulation.remember import RememberingTruth
from twinmoe.oracle.inputs import hidden_for, weights_for
from twinmoe.oracle.magnitudes import MAGNITUDES, scaled_input, scaled_weights
from twinmoe.oracle.rounding import FORMATS, FP16, Format
from twinmoe.oracle.strategies import DTYPES, Cell
from twinmoe.oracle.subject_spec import PlainName
from twinmoe.oracle.worker import RankContext

#: What is stored on the way; the sum is that of one expert a token.
STAGES = ("input", "logits", "gate and up", "activation", "expert output", "sum")


@cache
def stages_of(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Magnitudes of all that a corner's experts may store, before any rounding, zeros left out."""
    case = CORNERS[name](Cell(1, "alltoall", "eager", dtype))
    config, weights = case.config, weights_for(case)
    x_TH = hidden_for(case, 0).double()
    logits_TE = x_TH @ weights.router_EH.double().T
    gate_up_ETF = torch.einsum("th,efh->etf", x_TH, weights.w13_LFH.double())
    gate, up = gate_up_ETF.chunk(2, dim=-1) if config.gated else (gate_up_ETF, 1.0)
    h_ETI = ACTIVATIONS[config.hidden_act].value(gate) * up
    y_ETH = torch.einsum("eti,ehi->eth", h_ETI, weights.w2_LHI.double())
    sum_TH = config.routed_scaling_factor * y_ETH[logits_TE.argmax(dim=1), torch.arange(len(x_TH))]
    values = (x_TH, logits_TE, gate_up_ETF, h_ETI, y_ETH, sum_TH)
    sizes = (value.abs().flatten() for value in values)
    return {stage: size[size > 0] for stage, size in zip(STAGES, sizes, strict=True)}


def reaches_both_ends(size: Tensor, target: Format) -> bool:
    """Some number overflows there, and some is below the normal range."""
    return bool((size > target.max_value).any() and (size < target.smallest_normal).any())


@pytest.mark.parametrize("stage", ["gate and up", "activation", "expert output", "sum"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stages_reach_the_ends_of_fp16_and_of_their_own_dtype(
    dtype: torch.dtype, stage: str
) -> None:
    """Beyond the largest number and below the smallest normal one, of either format.

    What GEMMs answer in fp32 stays just below its largest number.
    """
    own = FORMATS[dtype]
    assert reaches_both_ends(stages_of("fp16 ends: one a token", dtype)[stage], FP16)
    size = stages_of("own ends: one a token", dtype)[stage]
    if own != FP16 and stage in ("gate and up", "expert output"):
        size = 4 * size
    assert reaches_both_ends(size, own)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_inputs_and_logits_reach_the_ends_of_fp16(dtype: torch.dtype) -> None:
    """Large ones beyond its largest number, small ones below its smallest."""
    assert stages_of("large input", dtype)["input"].median() > FP16.max_value
    assert stages_of("small input", dtype)["input"].median() < FP16.smallest_normal / 4
    assert stages_of("large logits", dtype)["logits"].median() > FP16.max_value


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_at_an_end_is_brought_back(dtype: torch.dtype) -> None:
    """Hidden states at an end leave logits and activations where they were."""
    for name in ("large input", "small input"):
        for stage in ("logits", "gate and up", "activation"):
            assert 2.0**-4 < stages_of(name, dtype)[stage].median() < 2.0**4


def test_the_usual_magnitude_changes_nothing() -> None:
    """A line that names none, as all did once, means the tensors that were drawn."""
    case = Case.parse("T=3,H=32,I=16,E=6,k=2,dtype=bf16")
    weights, x_TH = weights_for(case), hidden_for(case, 0)
    assert case.magnitude == MAGNITUDES[0] == "usual"
    assert "magnitude" not in str(case)
    assert scaled_weights("usual", case.config, 0, weights) is weights
    assert same_bits(scaled_input("usual", case.config, x_TH), x_TH)


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_an_fp16_layer_keeps_finite_weights(magnitude: str) -> None:
    """Few channels have large weights; scaled, they still fit, and so do loud hidden states."""
    line = f"T=3/3,H=16,I=16,E=24,k=24,dtype=fp16,values=outlier,magnitude={magnitude}"
    case = Case.parse(line)
    for tensor in (*weights_for(case).tensors().values(), hidden_for(case, 1)):
        assert tensor.isfinite().all()


#: A layer of ``ranged_layers`` by what finds it, and in which dtype.
FOUND_BY = {
    "fp16_input": ("large input", "small input"),
    "fp16_logits": ("large logits",),
    "fp16_gate_and_up": ("fp16 ends: one a token",),
    "fp16_activation": ("fp16 ends: one a token",),
    "fp16_expert_output": ("fp16 ends: one a token",),
    "fp16_sum": ("fp16 ends: one a token",),
    "saturating": ("own ends: one a token",),
    "nan_is_zero": ("own ends: one a token",),
}


ALONE = RankContext(0, 1, None, torch.device("cpu"))


def expected_at(corner: str, dtype: torch.dtype) -> set[str]:
    """Those of ``ranged_layers`` that this corner has to show."""
    found = {layer for layer, corners in FOUND_BY.items() if corner in corners}
    if dtype is torch.bfloat16:
        return found
    return {layer for layer in found if not layer.startswith("fp16")}


#: Where layers are expected to be found; nightly also where only the right one is judged.
PLACES = [
    (corner, dtype)
    for corner in sorted({corner for corners in FOUND_BY.values() for corner in corners})
    for dtype in DTYPES
    if expected_at(corner, dtype) or os.environ.get("TWINMOE_PROFILE") == "nightly"
]


@pytest.mark.parametrize(("corner", "dtype"), PLACES)
def test_a_format_of_another_range_is_seen_at_its_ends(corner: str, dtype: torch.dtype) -> None:
    """In bf16, and overflow in every dtype; the layer without a mistake passes all of it."""
    case = CORNERS[corner](Cell(1, "alltoall", "eager", dtype))
    case = PlainName(f"{ranged_layers.__file__}:unspoilt").fit(case)
    weights, x_TH = weights_for(case), hidden_for(case, 0)
    truth = RememberingTruth(case.config, weights, [x_TH])
    expected = expected_at(corner, dtype)
    seen = set()
    for name in ("unspoilt", *expected):
        layer = getattr(ranged_layers, name)(case.config, weights, ALONE)
        answer = RankObservation(layer.forward(x_TH))
        if judge([answer], truth, layer.contract).findings:
            seen.add(name)
    assert seen == expected
