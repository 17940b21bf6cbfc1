"""What no single element shows: too many flipped roundings, and flips of one sign.

Elements of one token share their upstream errors, so only tokens count as independent
draws.  Both tests bound the mean of independent, bounded, per-token statistics, by
G. Bennett, J. Amer. Statist. Assoc. 57 (1962) and W. Hoeffding, J. Amer. Statist. Assoc. 58
(1963), theorem 2, and alarm when chance explains what was seen with probability below
ALPHA.  A binomial test over elements would claim more evidence than there is.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

#: Probability of a false alarm of one test.
ALPHA = 1e-6

#: Flips likelier than this say nothing by their sign: an error common to all tokens, such as
#: that of a weight 1/3, decides them all alike.
UNLIKELY = 0.25

#: Formats this narrow flip rarely under correct arithmetic; wider ones flip by nature.
NARROW_PRECISION = 11


@dataclass(frozen=True)
class Flips:
    """Per token: share of flipped elements, bounds on its mean and variance, flips' mean sign.

    ``rate_T`` and ``expected_T`` in [0, 1]; ``sign_T`` in [-1, 1], the mean over a token's
    unlikely flips of sign((seen - rounded) * rounded): +1 is away from zero, NaN is none.
    """

    rate_T: Tensor
    expected_T: Tensor
    variance_T: Tensor
    sign_T: Tensor

    def subset(self, mask_T: Tensor) -> "Flips":
        """The tokens of a rank, or of an expert."""
        return Flips(*(getattr(self, field.name)[mask_T] for field in fields(self)))

    def __len__(self) -> int:
        return len(self.rate_T)


def flips_of(seen_TH: Tensor, rounded_TH: Tensor, chance_TH: Tensor, variance_T: Tensor) -> Flips:
    """Compare outputs with the rounded truth; ``chance_TH`` bounds each flip's probability.

    Where the truth is NaN nothing flips, and nothing may: 0 in ``chance_TH``.
    """
    flipped = (seen_TH != rounded_TH) & ~rounded_TH.isnan()
    direction = torch.sign((seen_TH - rounded_TH) * torch.sign(rounded_TH)).nan_to_num()
    unlikely = flipped & (chance_TH < UNLIKELY)
    count = unlikely.sum(dim=1)
    sign_T = (direction * unlikely).sum(dim=1) / count  # 0 / 0: NaN
    variance_T = variance_T.masked_fill(rounded_TH.isnan().all(dim=1), 0)
    return Flips(flipped.double().mean(dim=1), chance_TH.mean(dim=1), variance_T, sign_T)


def too_many(flips: Flips) -> bool:
    """P(mean rate >= m + t) <= exp(-n s h(t / s)), h(u) = (1 + u) ln(1 + u) - u.

    For n tokens of mean expectation m and mean variance s.
    """
    n = len(flips)
    if n == 0:
        return False
    excess = float(flips.rate_T.mean() - flips.expected_T.mean())
    variance = float(flips.variance_T.mean())
    if excess <= 0 or variance == 0:
        return excess > 0
    u = excess / variance
    return n * variance * ((1 + u) * math.log1p(u) - u) > -math.log(ALPHA)


def one_sided(flips: Flips) -> bool:
    """P(|mean sign| >= t) <= 2 exp(-n t^2 / 2) for n tokens with flips of no preferred sign."""
    signs = flips.sign_T[~flips.sign_T.isnan()]
    n = len(signs)
    return n > 0 and float(signs.mean()) ** 2 > 2 * math.log(2 / ALPHA) / n


def groupings(rank_T: Tensor, ids_TK: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(name, mask [T]) of the whole batch, of each rank's and of each expert's tokens."""
    yield "the batch", torch.ones_like(rank_T, dtype=torch.bool)
    for rank in rank_T.unique().tolist():
        yield f"rank {rank}", rank_T == rank
    for expert in ids_TK.unique().tolist():
        yield f"tokens of expert {expert}", (ids_TK == expert).any(dim=1)


@dataclass(frozen=True)
class Alarm:
    """What an aggregate shows, and the first token of the group that shows it."""

    token: int
    message: str


def first_alarm(
    flips: Flips, rank_T: Tensor, ids_TK: Tensor, judged_T: Tensor, signed: bool = True
) -> Alarm | None:
    """Test the flips of the batch, then of each rank's and each expert's judged tokens.

    ``signed``: whether declared arithmetic errs to both sides alike.
    """
    for name, mask in groupings(rank_T, ids_TK):
        some = flips.subset(mask & judged_T)
        if too_many(some):
            return Alarm(
                int(mask.nonzero()[0]),
                f"{float(some.rate_T.mean()):.1%} of the elements of {name} differ from the "
                f"rounded truth, at most {float(some.expected_T.mean()):.1%} expected: each is "
                "inside its interval, but the rounding is not the declared one",
            )
        if signed and one_sided(some):
            mean = float(some.sign_T.nanmean())
            return Alarm(
                int(mask.nonzero()[0]),
                f"the elements of {name} that differ from the rounded truth lie "
                f"{'away from' if mean > 0 else 'toward'} zero of it (mean sign {mean:+.2f}): "
                "a cast truncates",
            )
    return None
