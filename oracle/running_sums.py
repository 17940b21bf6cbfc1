"""Running sums that are stored after every addition, in an order that nobody declares.

Legend: T tokens, H hidden_size.
"""

import torch

from twinmoe.oracle.envelope import E
from twinmoe.oracle.rounding import Format


def running_sums(result: E, shares: E, dim: int, stored: Format, exact: int) -> E:
    """The sum ``result`` [T, H] with what storing every running sum but the last may add.

    In any order of the shares along ``dim``.  The largest |sum| of j shares is that of the j
    largest of one sign.  Sums of ``exact`` shares and fewer change nothing by being stored.  A
    share that is infinite meets what the others may have come to by then: an overflow of the other
    sign makes NaN of both.
    """
    value, error = shares.value.movedim(dim, 0), shares.error().movedim(dim, 0)
    finite = value.isfinite() & error.isfinite()
    value, error = value.where(finite, 0.0), error.where(finite, 0.0)
    ends = (value + error, error - value)
    sizes = [end.clamp(min=0).sort(dim=0, descending=True).values.cumsum(dim=0) for end in ends]
    met = torch.arange(1, len(value) + 1)[:, None, None]
    rounds = (met > exact) & (met < (shares.magnitude() > 0).sum(dim=dim))
    added = torch.where(rounds, stored.unit * torch.maximum(*sizes) + stored.underflow, 0.0)
    error_TH = added.sum(dim=0) / (1 - len(value) * stored.unit)
    specials = result.specials()
    above, below = (size[-1] for size in sizes)
    if specials is not None:
        error_TH = error_TH.masked_fill(specials.anywhere, 0.0)
    result = type(result)(result.value, result.join(result.radius, error_TH))
    return result.in_range(above, below, stored)
