"""Something wrong at every point of the data flow: the stage that is named, and the words.

Legend: T tokens, H hidden_size, K experts per token.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.oracle.subjects import (
    Fault,
    graphed,
    on_rank,
    verdict_of,
)
from twinmoe.oracle import Taps, judge


def swap_rows(tensor: Tensor) -> Tensor:
    """Exchange the first two rows."""
    tensor[[0, 1]] = tensor[[1, 0]]
    return tensor


def weakest_expert_first(ids_TK: Tensor) -> Tensor:
    """Send the first token's last slot to some expert that it did not choose."""
    rest = sorted(set(range(8)) - set(ids_TK[0].tolist()))
    ids_TK[0, -1] = rest[0]
    return ids_TK


STAGE_FAULTS: dict[str, tuple[str, dict[str, Fault]]] = {
    "wrong expert": ("router", {"ids": on_rank(2, weakest_expert_first)}),
    "one expert twice": ("router", {"ids": on_rank(2, lambda ids: ids[:, [0, 1, 0]])}),
    "id out of range": (
        "router",
        {"ids": on_rank(0, lambda ids: ids.index_fill(0, torch.tensor(0), 8))},
    ),
    "weights exchanged": ("router", {"weights": on_rank(0, lambda w: w.flip(1))}),
    "weights in bf16": ("router", {"weights": lambda _, w: w.bfloat16().float()}),
    "scaling forgotten": ("router", {"weights": lambda _, w: w / 2.5}),
    "rows exchanged": ("dispatch", {"gathered_hidden": on_rank(3, swap_rows)}),
    "a stale row": (
        "dispatch",
        {"gathered_hidden": on_rank(1, lambda x: x.index_fill(0, torch.arange(8), 1.0))},
    ),
    "one bit": ("dispatch", {"gathered_hidden": on_rank(1, lambda x: x.nextafter(x + 1))}),
    "a slot dropped": (
        "experts",
        {"terms": on_rank(2, lambda t: t.index_fill(1, torch.tensor(2), 0.0))},
    ),
    "a share in bf16": ("experts", {"partial": lambda _, p: p.bfloat16().float()}),
    "shares exchanged": ("experts", {"partial": on_rank(0, swap_rows)}),
    "a sum in bf16": ("combine", {"routed": lambda _, r: r.bfloat16().float()}),
    "a share too many": ("combine", {"routed": on_rank(2, lambda r: r * 2)}),
    "truncated": ("output", {"output": lambda _, out: truncated(out)}),
    "rows of the output exchanged": ("output", {"output": on_rank(3, swap_rows)}),
    "zeros": ("output", {"output": lambda _, out: torch.zeros_like(out)}),
}


def truncated(out: Tensor) -> Tensor:
    """Take the next number toward zero for every second element, as truncation does."""
    bits = out.view(torch.int16)
    bits[:, ::2] -= (bits[:, ::2] & 0x7FFF != 0).to(torch.int16)
    return bits.view(out.dtype)


@pytest.mark.parametrize("name", STAGE_FAULTS)
def test_the_first_stage_outside_is_named(name):
    """Whatever follows from a fault, the finding names the stage where it began."""
    stage, faults = STAGE_FAULTS[name]
    verdict = verdict_of(faults)
    assert not verdict.equivalent
    assert verdict.culprit.stage == stage, [f.stage for f in verdict.findings]
    assert f"stage: {stage}" in str(verdict)
    assert "path: emulated p2p" in str(verdict)


@pytest.mark.parametrize("name", STAGE_FAULTS)
def test_the_output_alone_betrays_gross_faults(name):
    """Without any tap the same layers are refused, for their outputs."""
    verdict = verdict_of(STAGE_FAULTS[name][1], tapped=False)
    assert not verdict.equivalent
    assert {finding.stage for finding in verdict.findings} <= {"output"}


@pytest.mark.parametrize(
    ("name", "rank", "token"),
    [("wrong expert", 2, 0), ("shares exchanged", 0, 0), ("rows of the output exchanged", 3, 0)],
)
def test_a_finding_names_rank_and_token(name, rank, token):
    """Both in the finding's fields, and in words that need no look at the code."""
    culprit = verdict_of(STAGE_FAULTS[name][1]).culprit
    assert culprit.rank == rank
    assert culprit.token in (token, 1)
    assert f"token {culprit.token} on rank {rank}" in culprit.message


def test_a_misrouted_token_is_told_both_sets():
    """The experts it went to, those it should have gone to, and how many tokens went astray."""
    culprit = verdict_of(STAGE_FAULTS["wrong expert"][1]).culprit
    went, should = re.search(
        r"experts (\[.*?\]), but should go to (\[.*?\])", culprit.message
    ).groups()
    assert went != should
    assert "1 of 97 tokens misrouted" in culprit.message


def test_an_element_outside_is_shown_with_its_interval():
    """Value, dimension, allowed interval and excess, so that a person can check by hand."""

    def add_one(out_TH: Tensor) -> Tensor:
        out_TH[4, 17] += 1
        return out_TH

    subject, truth, contract = graphed({"output": on_rank(2, add_one)})
    observed = subject.observe()
    culprit = judge(observed, truth, contract).culprit
    assert (culprit.stage, culprit.rank, culprit.token, culprit.dim) == ("output", 2, 4, 17)
    pattern = r"out\[token 4 on rank 2, dim 17\] = (\S+), allowed (\S+) \.\. (\S+) \("
    seen, low, high = map(float, re.match(pattern, culprit.message).groups())
    assert seen == pytest.approx(float(observed[2].output_TH[4, 17]), rel=1e-4)
    assert low <= seen - 1 <= high or seen - 1 == pytest.approx(low, abs=0.05)
    assert high < seen
    assert culprit.ratio > 1
    assert "1 of 6208 elements outside" in culprit.message
    alone = judge([replace(seen, taps=Taps()) for seen in observed], truth, contract).culprit
    assert alone.proof
    assert "outside HARD" in alone.message


# --- what only many elements show ------------------------------------------------------------


def test_weights_cast_to_bf16_show_without_taps():
    """Every element may stay inside its interval: the share that differs gives it away."""
    assert not verdict_of(STAGE_FAULTS["weights in bf16"][1], tapped=False).equivalent


def test_a_combine_in_bf16_shows_without_taps():
    """A second rounding to bf16 before the shared expert is added."""
    assert not verdict_of(STAGE_FAULTS["a sum in bf16"][1], tapped=False).equivalent


def test_the_weakest_slot_of_one_token_shows_without_taps():
    """One lost contribution of the smallest weight among all tokens is seen."""
    subject, truth, _ = graphed()
    weights_TK = torch.cat([seen.taps.weights_TK for seen in subject.observe()])
    weakest = int(weights_TK.min(dim=1).values.argmin())
    rank, row = int(truth.rank_T[weakest]), int(truth.row_T[weakest])

    def lose(weights_TK: Tensor) -> Tensor:
        weights_TK[row, weights_TK[row].argmin()] = 0
        return weights_TK

    verdict = verdict_of({"weights": on_rank(rank, lose)}, tapped=False)
    assert (verdict.culprit.rank, verdict.culprit.token) == (rank, row)


# --- what is held to the last bit -------------------------------------------------------------


def test_a_sum_in_rank_order_is_held_to_the_last_bit():
    """Its order is declared, so that no error at all is allowed."""
    verdict = verdict_of({"routed": on_rank(2, lambda sums: sums.nextafter(sums + 1))})
    assert verdict.culprit.stage == "combine"
    assert "no error is allowed" in verdict.culprit.message


@pytest.mark.parametrize(
    ("tap", "what"), [("gathered_ids", "ids"), ("gathered_weights", "weights")]
)
def test_routing_that_arrives_otherwise_than_sent_is_dispatchs(tap, what):
    """Two tokens' ids, or weights, exchanged on the way to one rank."""
    subject, truth, contract = graphed()
    seen = subject.observe()
    rows = getattr(seen[3].taps, tap).clone()
    rows[[0, 1]] = rows[[1, 0]]
    seen[3] = replace(seen[3], taps=replace(seen[3].taps, **{tap: rows}))
    culprit = judge(seen, truth, contract).culprit
    assert culprit.stage == "dispatch"
    assert f"gathered {what} of token 0 on rank 0" in culprit.message
    assert "as received by rank 3" in culprit.message


def test_no_expert_is_no_answer():
    """Id -1 is for padding."""
    verdict = verdict_of({"ids": on_rank(0, lambda ids: torch.where(ids == 0, -1, ids))})
    assert verdict.culprit.stage == "router"
