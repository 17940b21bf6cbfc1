"""Every damaged input ends in success or in the documented error, soon and in little memory."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.bounds import bounded
from tests.fuzz.kinds import KINDS, read_damaged


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=settings().max_examples // 5)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_damaged_input_is_read_or_refused_by_name(kind: str, seed: int) -> None:
    """Whatever is wrong with it; the seed makes the input again."""
    with bounded():
        read_damaged(kind, seed)
