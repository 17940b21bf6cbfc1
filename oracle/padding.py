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
    """What ``rank`` routed, received or wrote in padding rows that must not be there.

    Ids are -1 there, weights and this rank's partial sums 0.  The router answers for what it
    made of its own padding, dispatch for what arrived.
    """
    own = (tokens_by_rank[rank],)
    for name, stage, content, counts, done in (
        ("routed_ids", "router", -1, own, "routed"),
        ("routed_weights", "router", 0, own, "routed"),
        ("gathered_ids", "dispatch", -1, tokens_by_rank, "routed"),
        ("gathered_weights", "dispatch", 0, tokens_by_rank, "routed"),
        ("partial", "experts", 0, tokens_by_rank, "computed"),
    ):
        tap = getattr(taps, name)
        if tap is None:
            continue
        padding = tap[_padding_rows(len(tap), counts)]
        wrong = padding != content
        if wrong.any():
            value = padding[wrong][0].item()
            yield Finding(
                stage,
                rank,
                None,
                None,
                f"{name} holds {value:.7g} in a padding row, should be {content}: padding was "
                f"{done} ({int(wrong.sum())} of {wrong.numel()} values)",
                relation=RELATION,
            )


def _padding_rows(rows: int, tokens_by_rank: Sequence[int]) -> Tensor:
    """Mask [rows] of the rows that are no token, of as many rows for each rank."""
    row_N = torch.arange(rows // len(tokens_by_rank))
    return torch.cat([row_N >= tokens for tokens in tokens_by_rank])
