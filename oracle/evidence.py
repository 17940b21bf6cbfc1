"""All ranks' observations of one forward, laid out by global token.

Legend: T tokens of all ranks, in rank order; H hidden_size; K experts per token; R ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from twinmoe.oracle.bits import as_bits
from twinmoe.oracle.observation import RankObservation
from twinmoe.oracle.truth import Truth


@dataclass(frozen=True)
class Evidence:
    """What was seen; None where a rank shows no such tap.

    The ``gathered_*`` fields hold, for each rank, what it received of every token; the
    ``partials_RTH`` each rank's share of every token.
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
        )

    def of_tokens(self, tokens: Tensor) -> "Evidence":
        """The evidence on some tokens (indices) only."""

        def pick(name: str, tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            per_rank = "_R" in name
            return tensor[:, tokens] if per_rank else tensor[tokens]

        picked: dict[str, Any] = {
            field.name: pick(field.name, getattr(self, field.name)) for field in fields(self)
        }
        return Evidence(**picked)

    def wrong_copies(self, hidden_TH: Tensor) -> Iterator[tuple[str, int, Tensor]]:
        """(what, receiving rank, mask [T]) of gathered rows whose bits are not those sent."""
        for what, received, sent in (
            ("hidden states", self.gathered_hidden_RTH, hidden_TH),
            ("ids", self.gathered_ids_RTK, self.ids_TK),
            ("weights", self.gathered_weights_RTK, self.weights_TK),
        ):
            if received is None or sent is None:
                continue
            for rank, copy in enumerate(received):
                yield what, rank, (as_bits(copy) != as_bits(sent)).any(dim=-1)


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
