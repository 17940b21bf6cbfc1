"""The power certificate: would this case have shown a missing contribution?

A case in which a slot's contribution drowns in the allowed error proves nothing about
that slot.  No mutant is run: the truth's own terms tell.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from twinmoe.oracle.comparison import Comparison
from twinmoe.oracle.envelope import Enclosure
from twinmoe.oracle.rounding import Format, ulp
from twinmoe.oracle.truth import Stages

#: A contribution is visible when it is at least this many half-widths in some dimension.
VISIBLE_RATIO = 4.0


@dataclass(frozen=True)
class Power:
    """Of ``slots`` contributions: how many would be missed, or told from the best rival's.

    ``visible``: max over d of |term_d| / half-width_d is at least 4.  ``distinct``: the same
    for |term_d - weight rival_d|, the expert that was nearest to being chosen instead.
    """

    slots: int
    visible: int
    distinct: int


def certify(
    stages: Stages[Enclosure], rival_TH: Tensor | None, result: Comparison, output: Format
) -> Power:
    """Hold each slot's contribution against the allowed error of its token's output.

    ``rival_TH``: output of each token's best rival expert; None where every expert is
    chosen, and nothing can be mistaken.
    """
    terms_TKH = stages.terms_TKH.value
    centre = result.centre.where(result.bounded, 0.0)
    spacing = ulp(centre, output)
    half_width_T1H = torch.maximum((result.high - result.low) / 2, spacing / 2)[:, None, :]

    def seen(difference_TKH: Tensor) -> int:
        ratio_TKH = (difference_TKH.abs() / half_width_T1H).where(result.bounded[:, None, :], 0.0)
        ratio_TK = ratio_TKH.nan_to_num(0.0).amax(dim=-1)
        return int((ratio_TK >= VISIBLE_RATIO).sum())

    slots = terms_TKH.shape[0] * terms_TKH.shape[1]
    if rival_TH is None:
        return Power(slots, seen(terms_TKH), slots)
    swapped_TKH = terms_TKH - stages.weights_TK.value[..., None] * rival_TH[:, None, :]
    return Power(slots, seen(terms_TKH), seen(swapped_TKH))
