"""Numbers that strain sums, fp32 sums in many orders, and points inside intervals.

Legend: T rows, M columns, N terms of a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from twinmoe.oracle.envelope import Enclosure

Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]


def _normal(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g)


def _positive(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g).abs()


def _outlier(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=g)
    values[..., 0] *= 30
    return values


def _heavy(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g) * 2.0 ** torch.randint(-12, 13, shape, generator=g)


def _cancelling(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=g) * 2.0 ** torch.randint(-6, 7, shape, generator=g)
    half = shape[-1] // 2
    values[..., half : 2 * half] = -values[..., :half]
    return values.sort(dim=-1).values


def stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return fp32 values that ``dtype`` can hold, none of them infinite."""
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype).float()


def _near_2_24(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    large = torch.randint(2**22, 2**24 + 3, shape, generator=g)
    small = torch.randint(-3, 4, shape, generator=g)
    sign = torch.randint(2, shape, generator=g) * 2 - 1
    return (torch.where(torch.rand(shape, generator=g) < 0.2, large * sign, small)).float()


def _tiny(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g) * 2.0 ** torch.randint(-80, -60, shape, generator=g)


RANDOM: dict[str, Draw] = {
    "normal": _normal,
    "positive": _positive,
    "outlier": _outlier,
    "heavy": _heavy,
}
ADVERSARIAL: dict[str, Draw] = {
    "cancelling": _cancelling,
    "near 2^24": _near_2_24,
    "tiny": _tiny,
}


def generator(seed: int) -> torch.Generator:
    """Return a generator of its own for each seed."""
    return torch.Generator().manual_seed(seed)


def fp32_sums(terms_TMN: Tensor, g: torch.Generator) -> Iterator[Tensor]:
    """Sum fp32 terms over the last dimension in many orders, each addition rounded to fp32."""
    count = terms_TMN.shape[-1]
    yield _one_by_one(terms_TMN)
    yield _one_by_one(terms_TMN.flip(-1))
    yield _pairwise(terms_TMN)
    for _ in range(3):
        yield _one_by_one(terms_TMN[..., torch.randperm(count, generator=g)])
    yield _pairwise(terms_TMN[..., torch.randperm(count, generator=g)])
    yield _one_by_one(terms_TMN.sort(dim=-1).values)
    split = int(torch.randint(1, count + 1, (), generator=g))
    chunks = [_one_by_one(chunk) for chunk in terms_TMN.split(split, dim=-1)]
    yield _one_by_one(torch.stack(chunks, dim=-1))


def _one_by_one(terms_TMN: Tensor) -> Tensor:
    result = terms_TMN[..., 0]
    for n in range(1, terms_TMN.shape[-1]):
        result = result + terms_TMN[..., n]
    return result


def _pairwise(terms_TMN: Tensor) -> Tensor:
    while terms_TMN.shape[-1] > 1:
        if terms_TMN.shape[-1] % 2:
            terms_TMN = torch.nn.functional.pad(terms_TMN, (0, 1))
        terms_TMN = terms_TMN[..., ::2] + terms_TMN[..., 1::2]
    return terms_TMN[..., 0]


def fp32_matmuls(x_TN: Tensor, w_MN: Tensor, g: torch.Generator) -> Iterator[Tensor]:
    """Multiply in fp32 as different correct kernels would."""
    yield from fp32_sums(x_TN[:, None, :] * w_MN, g)
    yield x_TN @ w_MN.T
    yield torch.stack([w_MN @ row for row in x_TN])


def assert_holds(enclosure: Enclosure, actual: Tensor) -> None:
    """Every element of ``actual`` lies in its interval."""
    same = actual.double() == enclosure.value
    error = torch.where(same, 0.0, (actual.double() - enclosure.value).abs())
    excess = torch.where(error <= enclosure.radius, 0.0, error)
    worst = int(excess.nan_to_num(nan=torch.inf).argmax())
    assert (excess == 0).all(), (
        f"{float(actual.flatten()[worst])} is {float(error.flatten()[worst])} from "
        f"{float(enclosure.value.flatten()[worst])}, radius "
        f"{float(enclosure.radius.flatten()[worst])}"
    )


def interval(shape: tuple[int, ...], scale: Tensor | float, g: torch.Generator) -> Enclosure:
    """Return intervals of which about one in four is a point."""
    value = torch.randn(shape, generator=g, dtype=torch.float64) * scale
    width = 2.0 ** torch.randint(-30, 0, shape, generator=g)
    radius = torch.where(torch.rand(shape, generator=g) < 0.25, 0.0, width * value.abs())
    return Enclosure(value, radius)


def points_of(x: Enclosure, g: torch.Generator) -> Iterator[Tensor]:
    """Both ends of every interval, the ends in random combination, and points between."""
    yield x.value + x.radius
    yield x.value - x.radius
    for _ in range(2):
        share = torch.rand(x.value.shape, generator=g, dtype=torch.float64) * 2 - 1
        yield x.value + torch.sign(share) * x.radius
        yield x.value + share * x.radius
