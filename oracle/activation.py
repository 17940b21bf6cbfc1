"""Enclosures of the expert activations.

Each activation phi brings its derivative and bounds L on |phi'| and M on |phi''|, which give
|phi(a + d) - phi(a)| <= min(|phi'(a)| e + M e**2 / 2, L e) for |d| <= e by Taylor's theorem.
The error of evaluating phi itself in fp32 is stated per function.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from twinmoe.oracle.envelope import E
from twinmoe.oracle.infinities import of_function
from twinmoe.oracle.products import Unstored
from twinmoe.oracle.rounding import Format


@dataclass(frozen=True)
class Activation:
    """phi, phi', bounds on |phi'| and |phi''|, and the evaluation error in units of roundoff.

    ``evaluation`` maps (a, phi(a)) to the magnitude that the unit roundoff multiplies.
    ``factors`` maps a to the largest product of some of the factors that make phi(a), if any is
    above 1; convex.
    """

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    steepest: float
    curvature: float
    evaluation: Callable[[Tensor, Tensor], Tensor]
    factors: Callable[[Tensor], Tensor]


def _silu_slope(a: Tensor) -> Tensor:
    gate = torch.sigmoid(a)
    return gate * (1 + a * (1 - gate))


def _gelu_slope(a: Tensor) -> Tensor:
    density = torch.exp(-a.square() / 2) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(a / math.sqrt(2))) + a * density


def _gelu_tanh_slope(a: Tensor) -> Tensor:
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    hyperbolic = torch.tanh(scale * (a + cubic * a**3))
    inner_slope = scale * (1 + 3 * cubic * a.square())
    return 0.5 * (1 + hyperbolic) + 0.5 * a * (1 - hyperbolic.square()) * inner_slope


def _doubled(a: Tensor) -> Tensor:
    """The factors of x (1 + erf(x)) / 2, halved last."""
    return a.abs() + F.relu(a)


def _relu_slope(a: Tensor) -> Tensor:
    # the kink: an interval around 0 may reach slope 1 on either side
    return torch.ones_like(a)


ACTIVATIONS: dict[str, Activation] = {
    # an exponential, an addition, a division and a product: 6 roundings with margin
    "silu": Activation(F.silu, _silu_slope, 1.1, 0.5, lambda a, phi: 6 * phi.abs(), torch.abs),
    # x (1 + erf) is halved before or after; 1 + erf cancels for a < 0, so the error is relative to
    # a, not to the result
    "gelu": Activation(F.gelu, _gelu_slope, 1.13, 0.8, lambda a, phi: 8 * a.abs(), _doubled),
    # the tanh argument carries a few roundings, magnified by its slope a phi'(a) <= 1.2 |a|
    "gelu_pytorch_tanh": Activation(
        lambda a: F.gelu(a, approximate="tanh"),
        _gelu_tanh_slope,
        1.13,
        1.0,
        lambda a, phi: 12 * a.abs(),
        _doubled,
    ),
    "relu": Activation(F.relu, _relu_slope, 1.0, 0.0, lambda a, phi: torch.zeros_like(a), F.relu),
    "relu2": Activation(
        lambda a: F.relu(a).square(),
        lambda a: 2 * F.relu(a),
        math.inf,
        2.0,
        lambda a, phi: phi.abs(),
        lambda a: F.relu(a).square(),
    ),
}


def activate(name: str, a: E, accumulator: Format) -> Unstored[E]:
    """phi(a), evaluated in the accumulator's format, and not yet stored."""
    activation = ACTIVATIONS[name]
    value = activation.value(a.value)
    spread = activation.derivative(a.value).abs() * a.radius
    spread = spread + activation.curvature / 2 * a.radius.square()
    if math.isfinite(activation.steepest):
        spread = torch.minimum(spread, activation.steepest * a.radius)
    size = type(a)(value, spread).magnitude()
    evaluation = accumulator.unit * activation.evaluation(a.magnitude(), size)
    # exp overflows below about -88 in fp32, squares underflow: the result may become 0
    underflow = accumulator.smallest_normal * (1 + a.value.abs()) * (value != 0)
    radius = a.join(spread, evaluation + underflow)
    specials = a.specials()
    if specials is not None:
        value, radius = of_function(specials, value, radius)
    ends = (activation.factors(a.value + side * a.error()) for side in (-1, 1))
    reach = torch.maximum(*ends).clamp(min=1)
    return Unstored(type(a)(value, radius), reach, accumulator)


def clamp(x: E, low: float, high: float) -> E:
    """Clamping is exact, monotone and 1-Lipschitz: both ends clamp."""
    value = x.value.clamp(low, high)
    above = (x.value + x.radius).clamp(low, high) - value
    below = value - (x.value - x.radius).clamp(low, high)
    radius = torch.maximum(above, below)
    specials = x.specials()
    return type(x)(value, radius if specials is None else specials.kept(radius))
