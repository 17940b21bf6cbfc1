"""The power certificate: would this case have shown a missing contribution?

A case in which a slot's contribution drowns in the allowed error proves nothing about
that slot.  No mutant is run: the truth's own terms tell.
"""

import torch
from torch import Tensor

from twinmoe.oracle.comparison import Comparison
from twinmoe.oracle.envelope import Enclosure
from twinmoe.oracle.rounding import Format, ulp
from twinmoe.oracle.truth import Stages

#: A contribution is visible when it is at least this many half-widths in some dimension.
VISIBLE_RATIO = 4.0


def visible_slots(stages: Stages[Enclosure], result: Comparison, output: Format) -> tuple[int, int]:
    """(slots, those whose loss would show): max over d of |term_d| / half-width_d >= 4."""
    terms_TKH: Tensor = stages.terms_TKH.value.abs()
    spacing = ulp(result.centre.nan_to_num(), output)
    half_width = torch.maximum((result.high - result.low) / 2, spacing / 2)
    visible = (terms_TKH / half_width[:, None, :]).amax(dim=-1) >= VISIBLE_RATIO
    return visible.numel(), int(visible.sum())
