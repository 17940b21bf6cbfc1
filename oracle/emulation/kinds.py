"""Input kinds: layers and batches whose numbers strain a judge in different ways.

Each kind has a grade, by this table and never case by case:

============ ====== =====================================================================
kind         grade  why
============ ====== =====================================================================
normal       SHARP  random signs: partial sums stay near the 2-norm, as the model says
positive     SHARP  one sign: partial sums grow to the result, which the |v| term covers
constant     SHARP  equal inputs, random weights: partial sums are a random walk
sorted_sign  MED    all positive products first: partial sums pass the 1-norm's half, far
                    above both |v| and the 2-norm; only the 1-norm bounds them
heavy_tailed SHARP  2**+-12: few terms decide the 2-norm and every partial sum alike
subnormal    SHARP  results below the smallest normal number: absolute, not relative, errors
sparse       SHARP  19 of 20 are zero: adding zero is exact
cancelling   SHARP  large +- pairs: |v| is small, yet the pairs are in the 2-norm
recorded     SHARP  outlier channels of a trained transformer decide the 2-norm
fp16_ends    SHARP  every expert has a stage beyond fp16, or below its normal range
own_ends     SHARP  the same at the ends of the layer's own dtype: some overflow
large_logits SHARP  logits beyond fp16: softmax leaves one expert
============ ====== =====================================================================

Legend: T tokens of one rank, H hidden_size, E experts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from twinmoe.oracle.emulation.remember import RememberingTruth
from twinmoe.oracle.envelope import Grade
from twinmoe.oracle.magnitudes import scaled_weights
from twinmoe.oracle.recording import recorded_hidden_states
from twinmoe.oracle.rounding import FORMATS, power_of_two
from twinmoe.reference import draws
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights


@dataclass(frozen=True, eq=False)
class Inputs:
    """A layer with all its experts, and the rows of every rank."""

    config: MoEConfig
    weights: MoEWeights
    hidden_by_rank: list[Tensor]

    def truth(self) -> RememberingTruth:
        """What any correct layer must answer to them."""
        return RememberingTruth(self.config, self.weights, self.hidden_by_rank)


Shape = Callable[[MoEConfig, MoEWeights, Tensor, torch.Generator], tuple[MoEWeights, Tensor]]


@dataclass(frozen=True)
class Kind:
    """How a kind turns random weights and normal rows [T, H] into its own, and its grade."""

    grade: Grade
    shape: Shape


def draw_inputs(kind: str, config: MoEConfig, tokens: Sequence[int], seed: int) -> Inputs:
    """Seeded inputs of ``kind``, ``tokens`` rows on each rank.

    The same in every process and on every machine.
    """
    generator = torch.Generator().manual_seed(seed)
    x_TH = draws.normal((sum(tokens), config.hidden_size), torch.float32, seed, "hidden")
    weights, x_TH = KINDS[kind].shape(config, MoEWeights.random(config, seed), x_TH, generator)
    return Inputs(config, weights, list(x_TH.to(config.dtype).split(list(tokens))))


def _normal(
    config: MoEConfig, weights: MoEWeights, x_TH: Tensor, generator: torch.Generator
) -> tuple[MoEWeights, Tensor]:
    return weights, x_TH


def _positive(
    config: MoEConfig, weights: MoEWeights, x_TH: Tensor, generator: torch.Generator
) -> tuple[MoEWeights, Tensor]:
    """Rows and expert matrices without a sign, scaled so that outputs stay O(1)."""
    w13 = weights.w13_LFH.abs() * (2 / math.sqrt(config.hidden_size))
    w2 = weights.w2_LHI.abs() * (2 / math.sqrt(config.moe_intermediate_size))
    return replace(weights, w13_LFH=w13, w2_LHI=w2), x_TH.abs()


def _constant(
    config: MoEConfig, weights: MoEWeights, x_TH: Tensor, generator: torch.Generator
) -> tuple[MoEWeights, Tensor]:
    """Every row repeats one number, another one for each row."""
    return weights, x_TH[:, :1].expand_as(x_TH)


def _sorted_sign(
    config: MoEConfig, weights: MoEWeights, x_TH: Tensor, generator: torch.Generator
) -> tuple[MoEWeights, Tensor]:
    """Positive rows, matrices with their positive columns first: both GEMMs rise, then fall."""
    weights, x_TH = _positive(config, weights, x_TH, generator)
    return replace(
        weights, w13_LFH=_then_negative(weights.w13_LFH), w2_LHI=_then_negative(weights.w2_LHI)
    ), x_TH


def _then_negative(matrix: Tensor) -> Tensor:
    """The second half of the columns negative, at half the size, so that results stay positive."""
    falling = torch.arange(matrix.shape[-1]) >= matrix.shape[-1] // 2
    return torch.where(falling, matrix * -0.5, matrix)


def _heavy_tailed(
    config: MoEConfig, weights: MoEWeights, x_TH: Tensor, generator: torch.Generator
) -> tuple[MoEWeights, Tensor]:
    """Elements of rows and matrices times 2**n, n from -12 to 12; row norms as before."""

    def tail(values: Tensor) -> Tensor:
        wide = values.double()
        exponent = torch.randint(-12, 13, values.shape, generator=generator)
        stretched = wide * power_of_two(exponent)
        ratio = _row_norm(wide) / _row_norm(stretched)
        return (stretched * ratio).float().to(values.dtype)

    heavy = replace(weights, w13_LFH=tail(weights.w13_LFH), w2_LHI=tail(weights.w2_LHI))
    return heavy, tail(x_TH)


def _row_norm(values: Tensor) -> Tensor:
    """The 2-norm of each row, [..., 1]: added up in an order of ours, the library's varies."""
    squares = values.square()
    while (length := squares.shape[-1]) > 1:
        half = length // 2
        pairs = squares[..., :half] + squares[..., half : 2 * half]
        squares = torch.cat([pairs, squares[..., 2 * half :]], dim=-1)
    return squares.sqrt()


def _subnormal(
    config: MoEConfig, weights: MoEWeights, x_TH: Tensor, generator: torch.Generator
) -> tuple[MoEWeights, Tensor]:
    """Matrices scaled down until outputs lie some bits below the smallest normal number.

    gate and up shrink alike, so h shrinks by the square; w2 does the rest.
    """
    below = FORMATS[config.dtype].min_exponent - 3
    down = below // 4
    return replace(
        weights,
        w13_LFH=weights.w13_LFH * 2.0**down,
        w2_LHI=weights.w2_LHI * 2.0 ** (below - 2 * down),
    ), x_TH


def _sparse(
    config: MoEConfig, weights: MoEWeights, x_TH: Tensor, generator: torch.Generator
) -> tuple[MoEWeights, Tensor]:
    """19 of 20 elements of rows and of w2 are zero."""

    def thin(values: Tensor) -> Tensor:
        kept = torch.rand(values.shape, generator=generator) < 0.05
        return torch.where(kept, values * math.sqrt(20), 0.0)

    return replace(weights, w2_LHI=thin(weights.w2_LHI)), thin(x_TH)


def _cancelling(
    config: MoEConfig, weights: MoEWeights, x_TH: Tensor, generator: torch.Generator
) -> tuple[MoEWeights, Tensor]:
    """Pairs of columns, and pairs of experts, whose large contributions nearly cancel."""
    large_TH = 32 * x_TH
    large_TH[:, 1::2] = x_TH[:, 1::2] - large_TH[:, 0::2][:, : x_TH.shape[1] // 2]
    w2_LHI = weights.w2_LHI.clone()
    w2_LHI[1::2] = w2_LHI[1::2] / 16 - w2_LHI[0::2][: len(w2_LHI) // 2]
    w13_LFH = _paired(weights.w13_LFH)
    w13_LFH[1::2] = w13_LFH[0::2][: len(w13_LFH) // 2]
    router_EH = _paired(weights.router_EH)
    router_EH[1::2] = router_EH[0::2][: len(router_EH) // 2] + router_EH[1::2] / 16
    return replace(weights, w13_LFH=w13_LFH, w2_LHI=w2_LHI, router_EH=router_EH), large_TH


def _paired(matrix: Tensor) -> Tensor:
    """Every second column a copy of the one before it."""
    paired = matrix.clone()
    paired[..., 1::2] = paired[..., 0::2][..., : matrix.shape[-1] // 2]
    return paired


def _recorded(
    config: MoEConfig, weights: MoEWeights, x_TH: Tensor, generator: torch.Generator
) -> tuple[MoEWeights, Tensor]:
    """Recorded hidden states, starting where the generator says."""
    seed = int(torch.randint(2**31, (), generator=generator))
    tokens, hidden = x_TH.shape
    return weights, recorded_hidden_states(tokens, hidden, seed).float()


def _at_ends(magnitude: str) -> Shape:
    """Weights as cases of this magnitude have them; another stage for each expert."""

    def shape(
        config: MoEConfig, weights: MoEWeights, x_TH: Tensor, generator: torch.Generator
    ) -> tuple[MoEWeights, Tensor]:
        seed = int(torch.randint(2**31, (), generator=generator))
        return scaled_weights(magnitude, config, seed, weights), x_TH

    return shape


KINDS: dict[str, Kind] = {
    "normal": Kind(Grade.SHARP, _normal),
    "positive": Kind(Grade.SHARP, _positive),
    "constant": Kind(Grade.SHARP, _constant),
    "sorted_sign": Kind(Grade.MED, _sorted_sign),
    "heavy_tailed": Kind(Grade.SHARP, _heavy_tailed),
    "subnormal": Kind(Grade.SHARP, _subnormal),
    "sparse": Kind(Grade.SHARP, _sparse),
    "cancelling": Kind(Grade.SHARP, _cancelling),
    "recorded": Kind(Grade.SHARP, _recorded),
    "fp16_ends": Kind(Grade.SHARP, _at_ends("fp16_ends")),
    "own_ends": Kind(Grade.SHARP, _at_ends("own_ends")),
    "large_logits": Kind(Grade.SHARP, _at_ends("large_logits")),
}
