"""Ways to decide that two MoE outputs agree: those in common use, and ours.

A tolerance compares a subject with another low-precision result, its ``partner``, which
is correct here; a bound compares it with the fp64 truth.  ``twinmoe calibrate
--compare-criteria`` measures them all on the same subjects.

Legend: T tokens, H hidden_size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twinmoe.oracle.comparison import compare
from twinmoe.oracle.contract import RoundingContract
from twinmoe.oracle.envelope import Enclosure, Grade, rounded
from twinmoe.oracle.judgement import judge
from twinmoe.oracle.observation import RankObservation
from twinmoe.oracle.rounding import Format
from twinmoe.oracle.truth import Truth


@dataclass(frozen=True, eq=False)
class Exhibit:
    """What a criterion may look at: outputs alone, no intermediate tensor.

    ``partner_TH`` is the output of a correct implementation of the same contract;
    ``loosen`` multiplies the radius of our own criterion.
    """

    observations: Sequence[RankObservation]
    partner_TH: Tensor
    truth: Truth
    contract: RoundingContract
    loosen: float = 1.0

    @property
    def seen_TH(self) -> Tensor:
        """The subject's output on all ranks."""
        return torch.cat([observation.output_TH for observation in self.observations])


#: Whether the subject is found to be wrong.
Criterion = Callable[[Exhibit], bool]


def assert_close_defaults(exhibit: Exhibit) -> bool:
    """``torch.testing.assert_close`` with the tolerances that it picks by dtype."""
    try:
        torch.testing.assert_close(exhibit.seen_TH, exhibit.partner_TH)
    except AssertionError:
        return True
    return False


def absolute(exhibit: Exhibit) -> bool:
    """``|a - b| <= 2e-2`` everywhere, without a relative part."""
    return not torch.allclose(exhibit.seen_TH, exhibit.partner_TH, rtol=0, atol=2e-2)


def absolute_and_relative(exhibit: Exhibit) -> bool:
    """``|a - b| <= 5e-2 + 5e-2 |b|`` everywhere."""
    return not torch.allclose(exhibit.seen_TH, exhibit.partner_TH, rtol=5e-2, atol=5e-2)


def most_elements(exhibit: Exhibit) -> bool:
    """``|a - b| <= 0.1 + 0.85 |b|`` for at least 92.5 % of the elements."""
    close = torch.isclose(exhibit.seen_TH, exhibit.partner_TH, rtol=0.85, atol=0.1)
    return bool(close.double().mean() < 0.925)


def cosine_like(exhibit: Exhibit) -> bool:
    """``1 - 2 <a, b> / (<a, a> + <b, b>) <= 1e-3``, over all elements together."""
    a, b = exhibit.seen_TH.double(), exhibit.partner_TH.double()
    return bool(1 - 2 * (a * b).sum() / (a.square() + b.square()).sum() > 1e-3)


@dataclass(frozen=True)
class Classical(Enclosure):
    """An enclosure whose roundings are bounded by the triangle inequality alone.

    |rd(y) - rd(v)| <= |y - v| + u (|v| + e) + u |v|, plus what underflow may add: two
    results may always be rounded apart, even where their common value is certain.
    """

    def stored(self, value: Tensor, target: Format) -> "Classical":
        """See the class."""
        apart = target.unit * (self.magnitude() + self.value.abs()) + 2 * target.underflow
        return Classical(value, self.radius + apart)


def classical_bound(exhibit: Exhibit) -> bool:
    """Higham's gamma_n for every sum, u for every rounding, around the rounded truth.

    N. J. Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., chapter 3.
    """
    truth, contract = exhibit.truth, exhibit.contract
    routing = truth.routing(contract, Grade.HARD)
    exact = routing.weights(routing.ids_TK)
    weights_TK = Classical(exact.value, exact.radius)
    stages = truth.stages(contract, routing.ids_TK, weights_TK, Grade.HARD)
    return bool(compare(exhibit.seen_TH, rounded(stages.sum_TH, contract.output)).outside.any())


def declared_roundings(exhibit: Exhibit) -> bool:
    """Ours: :func:`twinmoe.oracle.judge`."""
    verdict = judge(exhibit.observations, exhibit.truth, exhibit.contract, loosen=exhibit.loosen)
    return bool(verdict.findings)


#: The name of our own.
OURS = "declared-rounding envelope"

CRITERIA: dict[str, Criterion] = {
    "torch assert_close defaults": assert_close_defaults,
    "atol 2e-2": absolute,
    "atol = rtol = 5e-2": absolute_and_relative,
    "92.5 % within (0.1, 0.85)": most_elements,
    "cosine-like 1e-3": cosine_like,
    "classical gamma_n bound": classical_bound,
    OURS: declared_roundings,
}
