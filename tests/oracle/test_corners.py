"""Each corner is there for a reason: a layer that goes wrong in it alone is found by it."""

from __future__ import annotations

import pytest
import torch

from tests.oracle import cornered_layers
from twinmoe.oracle.corners import CORNERS
from twinmoe.oracle.strategies import Cell
from twinmoe.oracle.subject_spec import PlainName
from twinmoe.oracle.trial import Trial

FOUND_BY = {
    "sixty_four_rows": "counts spread over the experts",
    "a_hundred_rows": "counts, to one rank",
    "wrong_from_18_to_129": "counts spread over the experts",
    "wrong_from_256": "counts, to one rank",
    "wrong_at_63": "counts beside tiles, to one expert",
    "capacity_64": "counts beside tiles, to one expert",
    "capacity_of_factor_2": "counts beside tiles, to one expert",
    "one_row_wrong": "one token",
    "wrong_at_128_and_8": "128 experts, 8 of them chosen",
    "w2_guessed_by_shape": "all widths the same",
    "w13_guessed_by_shape": "twice the intermediate width is the hidden one",
    "router_guessed_by_shape": "all widths the same",
    "leaky": "a poisoned token",
    "tired": "history: many calls",
    "coarse_bias": "finely graded biases",
    "byte_ids": "more experts than a byte can name",
    "scan_of_512": "more experts than a byte can name",
    "one_warp_of_experts": "large counts, to one expert",
    "eight_experts": "k = E",
    "bare_softmax": "vanishing exponentials",
    "large_epsilon": "vanishing sigmoids",
    "uncleared_tiles": "busy, then idle experts",
}


@pytest.mark.parametrize("layer", FOUND_BY)
def test_a_layer_that_is_wrong_there_is_found_there(layer: str) -> None:
    """One rank, bf16; where nothing is in the corner's way, the layer passes."""
    name = f"{cornered_layers.__file__}:{layer}"
    subject, cell = PlainName(name), Cell(1, "alltoall", "eager", torch.bfloat16)
    with Trial("cpu", 60.0, (name,)) as trial:
        corner = subject.fit(CORNERS[FOUND_BY[layer]](cell))
        assert trial.run(corner).findings
        elsewhere = "vanishing sigmoids" if layer != "large_epsilon" else "sizes beside every tile"
        if layer not in ("leaky", "bare_softmax"):
            assert not trial.run(subject.fit(CORNERS[elsewhere](cell))).findings


def test_a_leak_is_called_a_leak() -> None:
    """By the relation's sentence: no other token's answer may change."""
    name = f"{cornered_layers.__file__}:leaky"
    cell = Cell(1, "alltoall", "eager", torch.bfloat16)
    with Trial("cpu", 60.0, (name,)) as trial:
        outcome = trial.run(PlainName(name).fit(CORNERS["a poisoned token"](cell)))
    assert {finding.relation for finding in outcome.findings} == {"", "poisoned_token"}
    assert any("a token that is NaN is its own affair" in f.message for f in outcome.findings)
