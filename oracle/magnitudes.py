"""Magnitudes: stages of a layer put at the ends of number formats, by powers of two.

Ordinary layers answer O(1) at every stage, so that a stage kept in a format of another range (fp16
inside a bf16 layer) gives the same bits.  Here single matrices are scaled, and the next one brings
the numbers back, as far as the dtype holds such weights.

================= ==========================================================================
usual             as drawn
fp16_ends         every expert has a stage far beyond 65504, or below 2^-14; in an fp16 layer
                  as ``own_ends``
own_ends          the same at the largest and the smallest numbers of the layer's own dtype:
                  some overflow, some are subnormal; what an fp32 GEMM adds stays in its range,
                  since beyond it the order of summation decides
large_input       hidden states far beyond 65504; an fp16 layer's as large as it can hold
small_input       hidden states below 2^-14
large_logits      logits far beyond 65504
================= ==========================================================================

Logits below a format's range are left out: no score tells them from zero.

Legend: L experts present, F rows of w13 (2I gated, [gate | up]; I plain), T tokens, H hidden_size.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from twinmoe.oracle.rounding import FORMATS, FP16
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights

MAGNITUDES = ("usual", "fp16_ends", "own_ends", "large_input", "small_input", "large_logits")

#: The stage that an expert has at an end, by (its id + the seed) modulo their number.
STAGES = (
    *("large gate", "large activation", "large output"),
    *("small gate", "small activation", "small output"),
)


@dataclass(frozen=True)
class _Ends:
    """Exponents at which numbers of unit variance lie at a format's ends.

    ``small_gate`` and ``large_up`` are met together; ``back`` is the largest power that another
    matrix may be scaled by, either way.
    """

    large: int
    small: int
    small_gate: int
    large_up: int
    large_output: int
    back: int


def scaled_weights(magnitude: str, config: MoEConfig, seed: int, weights: MoEWeights) -> MoEWeights:
    """Weights of a layer whose stages are as ``magnitude`` says."""
    if magnitude == "usual":
        return weights
    if magnitude == "large_logits":
        exponent = 15 if config.dtype is torch.float16 else 17
        return replace(weights, router_EH=_times(weights.router_EH, exponent))
    if magnitude in ("large_input", "small_input"):
        return _brought_back(weights, -input_exponent(magnitude, config))
    ends = _ends(magnitude, config)
    w13_LFH, w2_LHI = weights.w13_LFH.clone(), weights.w2_LHI.clone()
    for local, expert in enumerate(weights.experts):
        stage = STAGES[(expert + seed) % len(STAGES)]
        gate, up, down = _exponents(stage, ends, config)
        half = config.moe_intermediate_size if config.gated else 0
        w13_LFH[local, :half] = _times(w13_LFH[local, :half], gate)
        w13_LFH[local, half:] = _times(w13_LFH[local, half:], up)
        w2_LHI[local] = _times(w2_LHI[local], down)
    return replace(weights, w13_LFH=w13_LFH, w2_LHI=w2_LHI)


def scaled_input(magnitude: str, config: MoEConfig, x_TH: Tensor) -> Tensor:
    """Hidden states as ``magnitude`` says, no larger than the dtype holds; still in their own."""
    exponent = input_exponent(magnitude, config)
    return x_TH if exponent == 0 else _times(x_TH, exponent, config.dtype).to(x_TH.dtype)


def input_exponent(magnitude: str, config: MoEConfig) -> int:
    """What power of two the hidden states are multiplied by."""
    narrow = config.dtype is torch.float16
    return {"large_input": 12 if narrow else 17, "small_input": -12 if narrow else -22}.get(
        magnitude, 0
    )


def _ends(magnitude: str, config: MoEConfig) -> _Ends:
    own = FORMATS[config.dtype]
    if magnitude == "fp16_ends" and own != FP16:
        return _Ends(large=17, small=-22, small_gate=-22, large_up=22, large_output=17, back=64)
    largest, spare = (16, 0) if own == FP16 else (128, 2)
    return _Ends(
        large=largest - 3,  # a few of the products of two normal numbers are 8 times as large
        small=own.min_exponent - 4,
        small_gate=own.min_exponent + 4,
        large_up=largest - 2 - spare,  # one in twenty of a normal number's doubles is 4 or more
        large_output=largest - 1 - spare // 2,
        back=-own.min_exponent - 8,
    )


def _exponents(stage: str, ends: _Ends, config: MoEConfig) -> tuple[int, int, int]:
    """What powers of two gate, up (or the only projection) and w2 of an expert are scaled by.

    Activations are about linear at both ends, but for relu2.
    """
    power = 2 if config.hidden_act == "relu2" else 1
    large, small, half = ends.large, ends.small, ends.small // 2

    def back(exponent: int) -> int:
        return max(-ends.back, min(ends.back, -exponent))

    if not config.gated and "output" not in stage:
        end = large if stage.startswith("large") else small
        return 0, end // power, back(end)
    return {
        "large gate": (large // power, back(large), 0),
        "large activation": (3 // power, large - 1, back(large)),
        "large output": (0, 0, ends.large_output),
        "small gate": (ends.small_gate // power, ends.large_up, 0),
        "small activation": (half // power, small - half // power * power, back(small)),
        "small output": (0, half if config.gated else half // power, small - half),
    }[stage]


def _brought_back(weights: MoEWeights, exponent: int) -> MoEWeights:
    """All that the hidden states meet, scaled."""

    def scaled(matrix: Tensor | None) -> Tensor | None:
        return None if matrix is None else _times(matrix, exponent)

    return replace(
        weights,
        router_EH=_times(weights.router_EH, exponent),
        w13_LFH=_times(weights.w13_LFH, exponent),
        shared_w13_FH=scaled(weights.shared_w13_FH),
        shared_gate_1H=scaled(weights.shared_gate_1H),
    )


def _times(values: Tensor, exponent: int, dtype: torch.dtype | None = None) -> Tensor:
    """``values`` times 2**exponent, finite, in ``dtype`` (None: their own)."""
    dtype = dtype or values.dtype
    largest = torch.finfo(dtype).max
    return (values.double() * 2.0**exponent).clamp(-largest, largest).to(dtype)
