"""What only many elements show: too many flipped roundings, and flips of one sign.

Legend: T tokens.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from twinmoe.oracle import aggregates
from twinmoe.oracle.rounding import BF16, FP16, Format, round_to, ulp

NAN = math.nan
seeds = st.integers(0, 2**32)


def flips(
    rate_T: Tensor, expected: float, sign_T: Tensor | None = None, variance: float | None = None
) -> aggregates.Flips:
    """Return flips of given rates, all tokens expecting the same, each a single draw."""
    sign_T = torch.zeros_like(rate_T) if sign_T is None else sign_T
    variance = expected * (1 - expected) if variance is None else variance
    expected_T, variance_T = (torch.full_like(rate_T, part) for part in (expected, variance))
    return aggregates.Flips(rate_T, expected_T, variance_T, sign_T)


@pytest.mark.parametrize("target", [BF16, FP16], ids=lambda f: f.name)
@given(seed=seeds, width=st.sampled_from([0.01, 0.05, 0.2]))
def test_flips_are_counted_per_token_and_stay_below_their_expectation(target, seed, width):
    """Errors of at most ``width`` units flip at most that share, on average."""
    g = torch.Generator().manual_seed(seed)
    value = 1 + torch.rand(64, 64, generator=g, dtype=torch.float64)
    error = (torch.rand(64, 64, generator=g, dtype=torch.float64) * 2 - 1) * width
    spacing = ulp(value, target)
    seen, centre = round_to(value + error * spacing, target), round_to(value, target)
    chance = torch.full_like(value, width)
    counted = aggregates.flips_of(seen, centre, chance, chance[:, 0] / 64)
    assert torch.equal(counted.rate_T, (seen != centre).double().mean(dim=1))
    assert not aggregates.too_many(counted)
    assert not aggregates.one_sided(counted)


def test_the_sign_of_a_flip_is_its_direction_from_zero():
    """Flips away from zero count +1, toward zero -1, whatever the sign of the element."""
    centre = torch.tensor([[1.0, -1.0], [1.0, -1.0], [1.0, -1.0], [1.0, NAN]]).double()
    seen = torch.tensor([[1.5, -1.5], [0.5, -0.5], [1.5, -0.5], [1.0, 3.0]]).double()
    counted = aggregates.flips_of(seen, centre, torch.zeros(4, 2).double(), torch.zeros(4))
    assert counted.sign_T[:3].tolist() == [1.0, -1.0, 0.0]
    assert counted.sign_T[3].isnan(), "no flip has no sign"
    assert counted.rate_T.tolist() == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize(("tokens", "width"), [(1, 4096), (8, 512), (64, 64), (4096, 1)])
@pytest.mark.parametrize("expected", [0.001, 0.03, 0.3])
def test_chance_does_not_raise_the_flip_alarm(tokens, width, expected):
    """No alarm in 500 binomial draws at the expected rate, however tokens and elements divide."""
    g = torch.Generator().manual_seed(tokens)
    drawn = torch.rand(500, tokens, width, generator=g) < expected
    rates = drawn.double().mean(dim=2)
    assert not any(aggregates.too_many(flips(rate_T, expected)) for rate_T in rates)


def test_tokens_that_vary_less_give_an_alarm_sooner():
    """Twice what is expected, in 64 tokens: chance if each flips as one, else none."""
    rate_T = torch.full((64,), 0.2).double()
    assert not aggregates.too_many(flips(rate_T, 0.1))
    assert aggregates.too_many(flips(rate_T, 0.1, variance=0.1 / 64))


def test_the_flip_alarm_is_no_more_frequent_than_its_bound(monkeypatch):
    """At a level of 5 % instead of one in a million, at most 5 % of true binomials alarm."""
    monkeypatch.setattr(aggregates, "ALPHA", 0.05)
    g = torch.Generator().manual_seed(5)
    alarms = 0
    for _ in range(1000):
        # whole tokens flip or do not: the widest distribution that the bound must hold
        rate_T = (torch.rand(200, generator=g) < 0.1).double()
        alarms += aggregates.too_many(flips(rate_T, 0.1))
    assert 0 < alarms <= 50


def test_the_sign_alarm_is_no_more_frequent_than_its_bound(monkeypatch):
    """At a level of 5 %, at most 5 % of fair coins alarm."""
    monkeypatch.setattr(aggregates, "ALPHA", 0.05)
    g = torch.Generator().manual_seed(6)
    alarms = 0
    for _ in range(1000):
        sign_T = (torch.randint(2, (200,), generator=g) * 2 - 1).double()
        alarms += aggregates.one_sided(flips(torch.ones(200).double(), 1.0, sign_T))
    assert 0 < alarms <= 50


@pytest.mark.parametrize("target", [BF16, FP16], ids=lambda f: f.name)
def test_a_truncating_cast_raises_both_alarms(target: Format):
    """Half of its elements differ from the rounded truth, and all of them lie toward zero."""
    g = torch.Generator().manual_seed(7)
    value = torch.randn(64, 64, generator=g, dtype=torch.float64)
    spacing = ulp(value, target)
    seen = torch.trunc(value / spacing) * spacing
    chance = torch.full_like(value, 0.1)
    counted = aggregates.flips_of(seen, round_to(value, target), chance, chance[:, 0] / 64)
    assert 0.45 < float(counted.rate_T.mean()) < 0.55
    assert aggregates.too_many(counted)
    assert aggregates.one_sided(counted)


def test_no_tokens_raise_no_alarm():
    """An empty rank says nothing."""
    empty = flips(torch.empty(0, dtype=torch.float64), 0.0)
    assert not aggregates.too_many(empty)
    assert not aggregates.one_sided(empty)


def test_flips_where_none_is_possible_raise_the_alarm():
    """An expectation of zero is a promise."""
    assert aggregates.too_many(flips(torch.tensor([0.0, 0.01]).double(), 0.0))
    assert not aggregates.too_many(flips(torch.tensor([0.0, 0.0]).double(), 0.0))


def test_the_groupings_are_the_batch_its_ranks_and_its_experts():
    """Each rank's tokens, and each expert's, are judged by themselves as well."""
    rank_T = torch.tensor([0, 0, 2])
    ids_TK = torch.tensor([[1, 3], [3, 4], [1, 4]])
    found = {name: mask.tolist() for name, mask in aggregates.groupings(rank_T, ids_TK)}
    assert found.pop("the batch") == [True, True, True]
    assert sorted(found.values()) == sorted(
        [
            [True, True, False],
            [False, False, True],
            [True, False, True],
            [True, True, False],
            [False, True, True],
        ]
    )


# --- groups of tokens -------------------------------------------------------------------------

RANK_T = torch.tensor([0] * 200 + [1] * 40)
IDS_TK = torch.tensor([[0, 1]] * 200 + [[2, 3]] * 40)
EVERYONE_T = torch.ones(240, dtype=torch.bool)


@pytest.mark.parametrize("by", ["rank", "expert"])
def test_flips_of_one_sign_in_one_group_raise_the_alarm(by):
    """One rank, or one expert, among others that are right; not where signs say nothing."""
    sign_T = torch.cat([torch.tensor([1.0, -1.0]).repeat(100), torch.ones(40)]).double()
    some = flips(torch.full((240,), 0.1).double(), 0.2, sign_T)
    rank_T = RANK_T if by == "rank" else torch.zeros_like(RANK_T)
    alarm = aggregates.first_alarm(some, rank_T, IDS_TK, EVERYONE_T)
    assert alarm is not None
    assert alarm.token == 200
    who = "rank 1" if by == "rank" else "tokens of expert 2"
    assert f"the elements of {who}" in alarm.message
    assert "away from zero" in alarm.message
    assert aggregates.first_alarm(some, rank_T, IDS_TK, EVERYONE_T, signed=False) is None
    assert aggregates.first_alarm(some, rank_T, IDS_TK, RANK_T == 0) is None


def test_likely_flips_say_nothing_by_their_sign():
    """Where an element may flip as well as not, its direction is no evidence."""
    centre, seen = torch.ones(1, 2).double(), torch.tensor([[1.5, 1.5]]).double()
    for chance, silent in ((0.3, True), (0.2, False)):
        chance_TH = torch.full((1, 2), chance).double()
        counted = aggregates.flips_of(seen, centre, chance_TH, chance_TH[:, 0])
        assert bool(counted.sign_T.isnan()) is silent
