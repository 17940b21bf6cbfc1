"""Radii are what their formulas say, term by term: a factor too much would blind the judge."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from twinmoe.oracle.contract import Wire
from twinmoe.oracle.contracts import graphed_contract
from twinmoe.oracle.envelope import Enclosure, Grade, matmul, product, total
from twinmoe.oracle.rounding import BF16, FP32, TENSOR_CORE
from twinmoe.oracle.truth import across_ranks
from twinmoe.reference.config import MoEConfig

TERMS, UNIT = 40, FP32.unit


def operands() -> tuple[Tensor, Tensor]:
    """Exact factors of a product of 40 terms."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(3, TERMS, generator=g).double(), torch.randn(5, TERMS, generator=g).double()


def close(radius: Tensor, expected: Tensor) -> None:
    """Equal but for the rounding of what makes the radius, of which none needs a sixth digit."""
    torch.testing.assert_close(radius, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("grade", list(Grade))
def test_a_product_of_matrices(grade: Grade) -> None:
    """Higham's worst case; its probabilistic square root; partial sums near the 2-norm."""
    x, w = operands()
    value, one_norm = x @ w.T, x.abs() @ w.abs().T
    worst = TERMS * UNIT / (1 - TERMS * UNIT) * one_norm
    size = one_norm
    if grade is Grade.SHARP:
        two_norm = (x.square() @ w.square().T).sqrt()
        size = torch.minimum(value.abs() + 2 * two_norm, one_norm)
    likely = torch.minimum(8 * TERMS**0.5 * UNIT * size, worst)
    error = (worst if grade is Grade.HARD else likely) + TERMS * FP32.underflow
    close(matmul(Enclosure.exact(x), w, FP32, grade).radius, error)
    cut = -(-TERMS // TENSOR_CORE.block) * TENSOR_CORE.block_unit * (size + value.abs())
    close(matmul(Enclosure.exact(x), w, TENSOR_CORE, grade).radius, error + cut)


def test_a_product_and_a_sum() -> None:
    """One rounding; and n - 1 of them, in any order."""
    x, _ = operands()
    a, b = Enclosure.exact(x), Enclosure.exact(x.flip(0))
    close(product(a, b, FP32).radius, UNIT * (a.value * b.value).abs() + FP32.underflow)
    additions = TERMS - 1
    gamma = additions * UNIT / (1 - additions * UNIT)
    close(total(a, 1, FP32).radius, gamma * x.abs().sum(dim=1))


def test_what_errors_do_to_a_product() -> None:
    """|a| e_b + |b| e_a + e_a e_b, and the rounding of what may come out."""
    a = Enclosure(torch.tensor([3.0]).double(), torch.tensor([0.5]).double())
    b = Enclosure(torch.tensor([-2.0]).double(), torch.tensor([0.25]).double())
    spread = 3 * 0.25 + 2 * 0.5 + 0.5 * 0.25
    expected = spread + UNIT * (6 + spread) + FP32.underflow
    close(product(a, b, FP32).radius, torch.tensor([expected], dtype=torch.float64))


def test_two_shares_meet_once_and_a_third_costs_a_rounding_of_their_sum() -> None:
    """The last rounding of a sum over ranks is that of its result, and is made there."""
    config = MoEConfig(hidden_size=8, moe_intermediate_size=8, num_experts=2, num_experts_per_tok=1)
    contract = replace(graphed_contract(config, "triton", "gloo", torch.bfloat16), reduced=None)
    assert contract.wire is Wire.PER_HOP
    shares = torch.ones(3, 1, 1).double()
    plain = [total(Enclosure.exact(shares[:n]), 0, contract.accumulator).radius for n in (2, 3)]
    two, three = (across_ranks(contract, Enclosure.exact(shares[:n])).radius for n in (2, 3))
    assert torch.equal(two, plain[0])
    close(three, plain[1] + (2 * BF16.unit + BF16.underflow) / (1 - 3 * BF16.unit))
