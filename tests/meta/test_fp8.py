"""Experts on block-scaled fp8, e4m3 with one scale for 128 activations and 128 x 128 weights.

Legend: H hidden_size, I moe_intermediate_size, F rows of w13, L experts.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from twinmoe.oracle import judge
from twinmoe.oracle.emulation import KINDS, MISTAKES, PATHS, Emulation, Inputs, casts, draw_inputs
from twinmoe.oracle.rounding import E4M3, round_to
from twinmoe.reference.config import MoEConfig

PATH = PATHS["alltoall grouped_mm, fp8"]
FP8_KINDS = ("normal", "positive", "recorded", "cancelling", "sparse")


def fp8_weights(matrices_LFH: Tensor) -> Tensor:
    """Codes times power-of-two scales of 128 x 128 blocks: what bf16 stores without rounding."""
    stored = matrices_LFH.double()
    for block in [part for rows in stored.split(128, dim=1) for part in rows.split(128, dim=2)]:
        scale = torch.exp2((block.abs().amax(dim=(1, 2), keepdim=True) / 448).log2().ceil())
        block.copy_(round_to(block / scale, E4M3) * scale)
    return stored.to(matrices_LFH.dtype)


def layer(kind: str, seed: int = 0) -> Inputs:
    """Draw a layer of 256 x 160, so that the second GEMM's last block is short."""
    config = MoEConfig(
        hidden_size=256, moe_intermediate_size=160, num_experts=8, num_experts_per_tok=2
    )
    inputs = draw_inputs(kind, config, (16, 16), seed)
    weights = replace(
        inputs.weights,
        w13_LFH=fp8_weights(inputs.weights.w13_LFH),
        w2_LHI=fp8_weights(inputs.weights.w2_LHI),
    )
    return replace(inputs, weights=weights)


@pytest.mark.parametrize("kind", FP8_KINDS)
def test_correct_fp8_raises_no_alarm(kind: str) -> None:
    """Scales by division or by reciprocals, sums in any order, with taps and without."""
    generator = torch.Generator().manual_seed(1)
    inputs = layer(kind)
    truth, contract = inputs.truth(), PATH.contract(inputs.config)
    for tapped in (True, False, True, False):
        implementation = PATH.draw(generator)
        seen = implementation.observe(contract, inputs, tapped)
        verdict = judge(seen, truth, contract, grade=KINDS[kind].grade)
        assert verdict.equivalent, f"{implementation}\n{verdict}"


def not_quantised(value: Tensor, quantiser: object) -> Tensor:
    """Leave activations as they are: better than promised, and not what was promised."""
    return value


WRONG = {
    "neighbour's scale": PATH.plain().but(quantise=casts.neighbours_scale),
    "not quantised": PATH.plain().but(quantise=not_quantised),
} | {
    name: MISTAKES[name].into(PATH.plain())
    for name in ("SiLU rounded twice", "bf16 combine accumulator", "weakest slot dropped")
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_fp8_is_seen(name: str) -> None:
    """Another block's scale, and mistakes of one rounding, stand out from the coarse codes."""
    inputs = layer("normal")
    truth, contract = inputs.truth(), PATH.contract(inputs.config)
    subject: Emulation = WRONG[name]
    tapped, bare = (
        judge(subject.observe(contract, inputs, shown), truth, contract) for shown in (True, False)
    )
    assert tapped.culprit is not None, str(tapped)
    assert tapped.culprit.stage == (MISTAKES[name].eager if name in MISTAKES else "experts")
    assert bare.culprit is not None, str(bare)
