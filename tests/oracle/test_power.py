"""The power certificate: which contributions would show if they were lost, or somebody else's.

Legend: T tokens, K experts per token, H hidden_size.
"""

from __future__ import annotations

import torch

from twinmoe.oracle.comparison import Comparison, compare
from twinmoe.oracle.envelope import Enclosure
from twinmoe.oracle.power import Power, certify
from twinmoe.oracle.rounding import BF16, FP64, Format
from twinmoe.oracle.truth import Stages


def power_of(
    terms: list[list[list[float]]],
    rival: list[list[float]] | None = None,
    stored: Format = FP64,
    radius: float = 1.0,
) -> Power:
    """Certify terms [T, K, H] whose sums are known to ``radius`` and stored in ``stored``."""
    terms_TKH = torch.tensor(terms).double()
    exact, sums_TH = Enclosure.exact, terms_TKH.sum(dim=1)
    weights, outputs = exact(torch.ones(terms_TKH.shape[:2])), exact(terms_TKH)
    stages = Stages(
        weights, outputs, outputs, exact(sums_TH[None]), exact(sums_TH), None, exact(sums_TH)
    )
    allowed = Enclosure(sums_TH, torch.full_like(sums_TH, radius))
    result: Comparison = compare(sums_TH, allowed, None if stored is FP64 else stored)
    return certify(stages, None if rival is None else torch.tensor(rival).double(), result, stored)


def test_a_contribution_below_four_half_widths_is_not_visible() -> None:
    """Its loss could hide in the interval; one of four half widths could not."""
    assert power_of([[[4.0, 0.0], [3.9, -3.9]]]) == Power(slots=2, visible=1, distinct=2)


def test_a_slot_whose_rival_answers_nearly_the_same_is_not_distinct() -> None:
    """Another expert in its place could hide there; the loss of it could not."""
    assert power_of([[[8.0, 0.0], [0.0, 8.0]]], rival=[[5.0, 0.0]]) == Power(2, 2, 1)


def test_a_rounding_hides_what_is_below_its_unit() -> None:
    """256 and 1, summed exactly: bf16 has no room for the 1."""
    assert power_of([[[256.0], [1.0]]], stored=BF16, radius=0.0).visible == 1
