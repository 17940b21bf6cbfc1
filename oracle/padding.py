"""Padding rows are nobody's: no expert may be named, and no value written, in them.

Legend: N padded rows of one rank, R ranks, K experts per token, H hidden_size.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from twinmoe.oracle.observation import Taps
from twinmoe.oracle.verdict import Finding

RELATION = "padding is contained"


def leaks(rank: int, taps: Taps, tokens_by_rank: Sequence[int]) -> Iterator[Finding]:
    """What ``rank`` saw or wrote in padding rows that must not be there.

    Gathered ids are -1 there, gathered weights and this rank's partial sums 0.
    """
    for name, stage, content in (
        ("gathered_ids", "router", -1),
        ("gathered_weights", "router", 0),
        ("partial", "experts", 0),
    ):
        tap = getattr(taps, name)
        if tap is None or len(tap) % len(tokens_by_rank):
            continue
        padding = tap.cpu()[_padding_rows(len(tap), tokens_by_rank)]
        wrong = padding != content
        if wrong.any():
            value = padding[wrong][0].item()
            yield Finding(
                stage,
                rank,
                None,
                None,
                f"{name} holds {value:.7g} in a padding row, should be {content}: padding was "
                f"{'routed' if stage == 'router' else 'computed'} ({int(wrong.sum())} of "
                f"{wrong.numel()} values)",
                relation=RELATION,
            )


def _padding_rows(rows: int, tokens_by_rank: Sequence[int]) -> Tensor:
    """Mask [R * N] of the rows that are no token."""
    row_N = torch.arange(rows // len(tokens_by_rank))
    return torch.cat([row_N >= tokens for tokens in tokens_by_rank])
