"""All ranks' observations of one forward, laid out by global token.

Legend: T tokens of all ranks, in rank order; H hidden_size; K experts per token; R ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from twinmoe.oracle.observation import RankObservation
from twinmoe.oracle.truth import Truth


@dataclass(frozen=True)
class Received:
    """What one rank's experts got from an AlltoAll: rows, and local ids of their experts."""

    hidden_SH: Tensor
    ids_S: Tensor


@dataclass(frozen=True)
class Evidence:
    """What was seen; None where a rank shows no such tap.

    The ``gathered_*`` fields hold, for each rank, what it received of every token; the
    ``partials_RTH`` each rank's share of every token.  ``sent_TKH`` are the rows of an AlltoAll
    where they are not the tokens, ``received`` what each rank got of them.
    """

    output_TH: Tensor
    ids_TK: Tensor | None
    weights_TK: Tensor | None
    expert_output_TKH: Tensor | None
    routed_TH: Tensor | None
    partials_RTH: Tensor | None
    gathered_hidden_RTH: Tensor | None
    gathered_ids_RTK: Tensor | None
    gathered_weights_RTK: Tensor | None
    sent_TKH: Tensor | None
    received: tuple[Received, ...] | None

    @classmethod
    def of(cls, observations: Sequence[RankObservation], truth: Truth) -> "Evidence":
        """Lay out what :func:`twinmoe.oracle.admission.admitted` has let in."""
        counts = truth.tokens_by_rank

        def own(name: str) -> Tensor | None:
            return _all(observations, name, torch.cat)

        def padded(name: str) -> Tensor | None:
            return _all(
                observations,
                name,
                lambda taps: torch.stack([_without_padding(tap, counts) for tap in taps]),
            )

        return cls(
            torch.cat([seen.output_TH for seen in observations]).cpu(),
            own("ids_TK"),
            own("weights_TK"),
            own("expert_output_TKH"),
            own("routed_TH"),
            padded("partial"),
            padded("gathered_hidden"),
            padded("gathered_ids"),
            padded("gathered_weights"),
            own("sent_TKH"),
            _received(observations),
        )

    def of_tokens(self, tokens: Tensor) -> "Evidence":
        """The evidence on some tokens (indices) only."""

        def pick(name: str, tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            per_rank = "_R" in name
            return tensor[:, tokens] if per_rank else tensor[tokens]

        picked: dict[str, Any] = {
            field.name: pick(field.name, getattr(self, field.name))
            for field in fields(self)
            if field.name != "received"  # rows of all tokens, which cannot be told apart
        }
        return Evidence(**picked, received=None)


def _received(observations: Sequence[RankObservation]) -> tuple[Received, ...] | None:
    """Each rank's received rows; None if any rank lacks them."""
    found = []
    for seen in observations:
        hidden_SH, ids_S = seen.taps.received_hidden, seen.taps.received_ids
        if hidden_SH is None or ids_S is None or len(hidden_SH) != len(ids_S):
            return None
        found.append(Received(hidden_SH, ids_S))
    return tuple(found)


def _all(
    observations: Sequence[RankObservation],
    name: str,
    join: Callable[[list[Tensor]], Tensor],
) -> Tensor | None:
    """One tensor from the tap of every rank; None if any rank lacks it."""
    taps = [getattr(seen.taps, name) for seen in observations]
    return None if any(tap is None for tap in taps) else join(taps).cpu()


def _without_padding(padded: Tensor, counts: Sequence[int]) -> Tensor:
    """Drop each rank's padding rows: [R*N, ...] to [T, ...]."""
    chunks = padded.unflatten(0, (len(counts), len(padded) // len(counts)))
    return torch.cat([chunk[:count] for chunk, count in zip(chunks, counts, strict=True)])
