"""Infinities and NaN in enclosures: certain where every order gives them, anything where not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from twinmoe.oracle.activation import activate
from twinmoe.oracle.emulation.correct import ACTIVATES
from twinmoe.oracle.envelope import Enclosure, Grade, matmul, product, rounded, total
from twinmoe.oracle.products import summand
from twinmoe.oracle.rounding import FP16, FP32, Format
from twinmoe.reference.config import MoEConfig

INF, NAN = torch.inf, torch.nan

#: An infinite radius around 0: anything.
ANYTHING = (0.0, INF)


def exact(*numbers: float) -> Enclosure:
    """Return these numbers, known exactly."""
    return Enclosure.exact(torch.tensor(numbers))


def pairs(x: Enclosure) -> list[tuple[float | None, float]]:
    """Return (value, radius), with None for NaN, which equals nothing."""
    values = [None if math.isnan(value) else value for value in x.value.flatten().tolist()]
    return list(zip(values, x.radius.flatten().tolist(), strict=True))


def sums_of(row: list[float], weight: list[float]) -> tuple[float | None, float]:
    """Return the enclosure of one row times one column, in fp32."""
    x, w = torch.tensor([row]).double(), torch.tensor([weight]).double()
    return pairs(matmul(Enclosure.exact(x), w, FP32, Grade.SHARP))[0]


@pytest.mark.parametrize(
    ("row", "weight", "expected"),
    [
        ([INF, 1.0], [2.0, 1.0], (INF, 0.0)),
        ([INF, 1.0], [-2.0, 1.0], (-INF, 0.0)),
        ([INF, 1.0], [0.0, 1.0], (None, 0.0)),
        ([INF, INF], [1.0, -1.0], (None, 0.0)),
        ([NAN, 1.0], [0.0, 1.0], (None, 0.0)),
        ([2.0**100, 2.0**100], [2.0**100, 2.0**100], (INF, 0.0)),
        ([2.0**100, 2.0**100], [2.0**100, -(2.0**100)], ANYTHING),
        ([INF, 2.0**100], [1.0, -(2.0**100)], ANYTHING),
    ],
)
def test_a_product_of_matrices_has_the_infinities_of_every_order(
    row: list[float], weight: list[float], expected: tuple[float, float]
) -> None:
    """Of terms that are infinite, and of sums that overflow one way; else nothing is known."""
    assert sums_of(row, weight) == expected


def test_other_rows_stay_as_sharp_as_they_were() -> None:
    """An infinity, a NaN and what is not known end with their own rows."""
    w_MN = torch.randn(5, 7, dtype=torch.float64)
    clean = Enclosure.exact(torch.randn(4, 7))
    spoilt = Enclosure(clean.value.clone(), clean.radius.clone())
    spoilt.value[0, 1], spoilt.value[1, 2], spoilt.radius[2, 3] = INF, NAN, INF
    before, after = (matmul(x, w_MN, FP32, Grade.SHARP) for x in (clean, spoilt))
    assert torch.equal(before.value[3], after.value[3])
    assert torch.equal(before.radius[3], after.radius[3])
    assert after.value[0].isinf().all()
    assert after.value[1].isnan().all()
    assert not after.radius[:2].any()
    assert after.radius[2].isinf().all()


def test_what_may_be_infinite_is_never_a_certain_nan() -> None:
    """A number on the edge of fp16 may overflow or not: nothing that follows demands NaN."""
    edge = Enclosure(torch.tensor([[65520.0, 1.0]]).double(), torch.tensor([[1.0, 0.0]]).double())
    h = rounded(edge, FP16)
    y = matmul(h, torch.tensor([[0.0, 1.0], [1.0, 1.0]]).double(), FP32, Grade.SHARP)
    assert pairs(y) == [ANYTHING, ANYTHING]


def test_products_and_sums_of_infinities() -> None:
    """Infinity times zero and infinity less infinity are NaN; the sign has to be certain."""
    near_zero = Enclosure(torch.tensor([0.5]).double(), torch.tensor([1.0]).double())
    assert pairs(product(exact(INF, INF, NAN), exact(-2.0, 0.0, 0.0), FP32)) == [
        (-INF, 0.0), (None, 0.0), (None, 0.0),
    ]  # fmt: skip
    assert pairs(product(exact(INF), near_zero, FP32)) == [ANYTHING]
    assert pairs(product(exact(2.0**100), exact(-(2.0**100)), FP32)) == [(-INF, 0.0)]
    assert pairs(total(exact(INF, 1.0), 0, FP32)) == [(INF, 0.0)]
    assert pairs(total(exact(INF, -INF), 0, FP32)) == [(None, 0.0)]
    largest = FP32.max_value
    assert pairs(total(exact(largest, largest, 1.0), 0, FP32)) == [(INF, 0.0)]
    assert pairs(total(exact(largest, largest, -largest), 0, FP32)) == [ANYTHING]


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2"])
def test_activations_of_infinities(name: str) -> None:
    """The positive one stays; the negative one is 0 where that is exact, else open (-inf * 0)."""
    plus, minus, nan = pairs(activate(name, exact(INF, -INF, NAN), FP32).held())
    assert plus == (INF, 0.0)
    assert minus == (ANYTHING if "lu" in name and not name.startswith("relu") else (0.0, 0.0))
    assert nan == (None, 0.0)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_a_large_gate_is_no_less_certain_than_its_slope_says(name: str) -> None:
    """Far out these are linear: a radius does not grow by its square."""
    wide = Enclosure(torch.tensor([2.0**60]).double(), torch.tensor([2.0**40]).double())
    radius: Tensor = activate(name, wide, FP32).held().radius
    assert 2.0**40 < float(radius) < 2.0**42


#: (gate up) sigmoid(gate) overflows on the way, gate sigmoid(gate), times up, does not.
FARTHER_ON_THE_WAY = (-12.0, 2.0**126)


def gated(name: str, gate: float, up: float, stored_gate: Format | None = None) -> Enclosure:
    """Return act(gate) * up in fp32, the activated gate stored or not."""
    return activate(name, exact(gate), FP32).stored(stored_gate).times(exact(up)).held()


def test_three_factors_are_multiplied_in_any_order() -> None:
    """Where one order overflows and another does not, anything; where all do, that infinity."""
    config = MoEConfig(
        hidden_size=16, moe_intermediate_size=16, num_experts=2, num_experts_per_tok=1
    )
    answers = [act(config, torch.tensor(FARTHER_ON_THE_WAY)) for act in ACTIVATES.values()]
    assert [answer.isinf().item() for answer in answers] == [False, False, True]
    assert pairs(gated("silu", *FARTHER_ON_THE_WAY)) == [ANYTHING]
    assert pairs(gated("silu", 12.0, 2.0**126)) == [(INF, 0.0)]
    assert pairs(gated("silu", 12.0, -(2.0**126))) == [(-INF, 0.0)]
    assert pairs(gated("relu2", 2.0**65, 2.0**-65)) == [ANYTHING]
    assert pairs(gated("relu2", 2.0**65, 0.0)) == [ANYTHING]  # infinity times zero, or zero
    assert pairs(gated("relu2", -(2.0**65), 2.0)) == [(0.0, 0.0)]


def test_a_stored_factor_ends_the_choice_of_order() -> None:
    """A contract that stores the activated gate leaves two factors, which no order tells apart."""
    (bounded,) = pairs(gated("silu", *FARTHER_ON_THE_WAY, stored_gate=FP32))
    assert bounded[0] is not None
    assert bounded[1] < abs(bounded[0]) < FP32.max_value
    assert pairs(gated("relu2", 2.0**65, 2.0**-65, stored_gate=FP32)) == [(INF, 0.0)]


def test_a_router_weight_on_the_activation_is_one_more_factor() -> None:
    """It may meet up first, unless the activation was stored before."""
    h = activate("silu", exact(-30.0), FP32).times(exact(2.0**122))
    assert pairs(h.times(exact(4.0)).held()) == [ANYTHING]
    assert h.stored(FP32).times(exact(4.0)).held().radius.isfinite().all()


def test_a_product_that_is_added_next_may_never_be_held() -> None:
    """A fused multiply-add only holds the sum, which other terms may bring back."""
    weight, rows = exact(3.0, 1.0), exact(-(2.0**127), 2.0**127)
    kept = summand(weight, rows, None, FP32)
    assert pairs(total(kept, 0, FP32)) == [ANYTHING]
    assert pairs(total(summand(weight, rows, FP32, FP32), 0, FP32)) == [(-INF, 0.0)]
    assert pairs(total(kept[:1], 0, FP32)) == [(-INF, 0.0)]


def test_an_infinity_elsewhere_frees_no_product() -> None:
    """What overflows by itself does so beside any infinity or NaN."""
    beside = product(exact(INF, 2.0**100, NAN), exact(1.0, 2.0**100, 1.0), FP32)
    assert pairs(beside) == [(INF, 0.0), (INF, 0.0), (None, 0.0)]
