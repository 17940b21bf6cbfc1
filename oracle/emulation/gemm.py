"""Orders in which a GEMM may accumulate, and some in which it must not.

A Gemm takes x [M, N] and W [F, N], both fp32 tensors, and returns x W^T [M, F] as an
fp32 accumulator would hold it.  Every addition is rounded where its author says so.

Legend: M rows, N terms of a dot product, F columns, B blocks, K terms of a block.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from twinmoe.oracle.emulation.casts import to_bf16
from twinmoe.oracle.rounding import FP32, TENSOR_CORE, ulp

Gemm = Callable[[Tensor, Tensor], Tensor]

#: Terms that one matrix instruction multiplies and adds for 16-bit operands.
BLOCK = TENSOR_CORE.block


def sequential(x_MN: Tensor, w_FN: Tensor) -> Tensor:
    """One product after another: the longest chain of roundings."""
    total_MF = x_MN.new_zeros(len(x_MN), len(w_FN))
    for x_M, w_F in zip(x_MN.T, w_FN.T, strict=True):
        total_MF = total_MF + x_M[:, None] * w_F
    return total_MF


def reverse(x_MN: Tensor, w_FN: Tensor) -> Tensor:
    """Sequential, from the last term to the first."""
    return sequential(x_MN.flip(1), w_FN.flip(1))


def permuted(seed: int) -> Gemm:
    """Sequential, in a seeded random order."""

    def gemm(x_MN: Tensor, w_FN: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        order_N = torch.randperm(x_MN.shape[1], generator=generator)
        return sequential(x_MN[:, order_N], w_FN[:, order_N])

    gemm.__name__ = f"permuted({seed})"
    return gemm


def blocked(x_MN: Tensor, w_FN: Tensor) -> Tensor:
    """A matrix instruction that adds 16 exact products to its accumulator and rounds once."""
    total_MF = x_MN.new_zeros(len(x_MN), len(w_FN))
    for block_MF in _block_sums(x_MN, w_FN):
        total_MF = (total_MF.double() + block_MF).float()
    return total_MF


def pairwise(x_MN: Tensor, w_FN: Tensor) -> Tensor:
    """A binary tree over the sums of 16 terms each: the shortest chains."""
    sums_BMF = _block_sums(x_MN, w_FN).float()
    while len(sums_BMF) > 1:
        if len(sums_BMF) % 2:
            sums_BMF = torch.cat([sums_BMF, torch.zeros_like(sums_BMF[:1])])
        sums_BMF = sums_BMF[0::2] + sums_BMF[1::2]
    return sums_BMF[0]


def split_k(parts: int) -> Gemm:
    """``parts`` workers take a stretch of the terms each; their fp32 sums are added last."""

    def gemm(x_MN: Tensor, w_FN: Tensor) -> Tensor:
        stretches = zip(x_MN.chunk(parts, dim=1), w_FN.chunk(parts, dim=1), strict=True)
        sums = [blocked(x_MK, w_FK) for x_MK, w_FK in stretches]
        total_MF = sums[0]
        for stretch_MF in sums[1:]:
            total_MF = total_MF + stretch_MF
        return total_MF

    gemm.__name__ = f"split_k({parts})"
    return gemm


def truncating(x_MN: Tensor, w_FN: Tensor) -> Tensor:
    """A tensor core that aligns and truncates, with one extra bit.

    The accumulator and the 16 exact products of a block are aligned to the largest
    exponent among them, cut off towards zero one bit below fp32's last place, summed
    exactly, and cut off to fp32: P. Blanchard, N. J. Higham, F. Lopez, T. Mary and
    S. Pranesh, SIAM J. Sci. Comput. 42 (2020); M. Fasi, N. J. Higham, M. Mikaitis and
    S. Pranesh, PeerJ Comput. Sci. 7 (2021) measured it.
    """
    x_BMK, w_BFK = (_blocks(tensor.double()) for tensor in (x_MN, w_FN))
    total_MF = torch.zeros(len(x_MN), len(w_FN), dtype=torch.float64)
    for x_MK, w_FK in zip(x_BMK, w_BFK, strict=True):
        terms_MFK = x_MK[:, None, :] * w_FK
        terms_MFK = torch.cat([terms_MFK, total_MF[..., None]], dim=-1)
        last_place = ulp(terms_MFK.abs().amax(dim=-1), FP32)
        grid_MF1 = (last_place / 2)[..., None]
        total_MF = (torch.trunc(terms_MFK / grid_MF1) * grid_MF1).sum(dim=-1)
        last_place = ulp(total_MF, FP32)
        total_MF = torch.trunc(total_MF / last_place) * last_place
    return total_MF.float()


def flushing(x_MN: Tensor, w_FN: Tensor) -> Tensor:
    """Sequential on hardware that flushes every product and sum below fp32's normal range."""
    total_MF = x_MN.new_zeros(len(x_MN), len(w_FN))
    for x_M, w_F in zip(x_MN.T, w_FN.T, strict=True):
        total_MF = _flushed(total_MF + _flushed(x_M[:, None] * w_F))
    return total_MF


def bf16_partial_sums(x_MN: Tensor, w_FN: Tensor) -> Tensor:
    """WRONG: split-K whose stretches of the terms are stored in bf16 before they are added."""
    stretches = zip(x_MN.chunk(4, dim=1), w_FN.chunk(4, dim=1), strict=True)
    total_MF = x_MN.new_zeros(len(x_MN), len(w_FN))
    for x_MK, w_FK in stretches:
        total_MF = total_MF + to_bf16(blocked(x_MK, w_FK))
    return total_MF


def without_tail(x_MN: Tensor, w_FN: Tensor) -> Tensor:
    """WRONG: the loop ends before the last block, as when a tail is masked away."""
    whole = (x_MN.shape[1] - 1) // BLOCK * BLOCK
    return blocked(x_MN[:, :whole], w_FN[:, :whole])


def _flushed(value: Tensor) -> Tensor:
    return torch.where(value.abs() < FP32.smallest_normal, 0.0, value)


def _blocks(tensor_MN: Tensor) -> Tensor:
    """[M, N] as [B, M, K], padded with zeros, which add exactly."""
    padded = F.pad(tensor_MN, (0, -tensor_MN.shape[1] % BLOCK))
    rows, terms = padded.shape
    return padded.reshape(rows, terms // BLOCK, BLOCK).transpose(0, 1)


def _block_sums(x_MN: Tensor, w_FN: Tensor) -> Tensor:
    """The dot product of each block, [B, M, F], in fp64: as good as exact."""
    return torch.bmm(_blocks(x_MN.double()), _blocks(w_FN.double()).transpose(1, 2))
