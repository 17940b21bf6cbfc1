"""All ranks' observations of one forward, laid out by global token.

Legend: T tokens of all ranks, in rank order; H hidden_size; K experts per token; R ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from twinmoe.oracle.bits import as_bits
from twinmoe.oracle.contract import RoundingContract
from twinmoe.oracle.observation import RankObservation, Taps
from twinmoe.oracle.rounding import FORMATS
from twinmoe.oracle.truth import Truth


class MisshapenError(ValueError):
    """An output or a tap that no correct layer returns: a wrong shape, or another dtype."""


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
        """Check the shapes against ``truth`` and lay the tensors out.

        Raises ValueError when a rank is missing or an output has the wrong shape.
        """
        counts = truth.tokens_by_rank
        if len(observations) != len(counts):
            raise ValueError(
                f"{len(observations)} observations for {len(counts)} ranks: pass one per rank"
            )
        for rank, (seen, tokens) in enumerate(zip(observations, counts, strict=True)):
            expected = (tokens, truth.config.hidden_size)
            if tuple(seen.output_TH.shape) != expected:
                raise MisshapenError(
                    f"rank {rank} returned a tensor of shape {tuple(seen.output_TH.shape)}, "
                    f"expected {expected}: one output row per input row"
                )
            _check_taps(rank, seen.taps, counts)

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


def check_dtype(seen: torch.dtype, contract: RoundingContract) -> None:
    """Raise ValueError unless outputs are stored as ``contract`` says."""
    if FORMATS.get(seen) != contract.output:
        raise MisshapenError(
            f"the output's dtype ({seen}) is not the {contract.output.name} that contract "
            f"{contract.name!r} declares: return that dtype, or declare another output format"
        )


#: Taps that hold every rank's padded rows; the others hold the rank's own.
_PADDED = ("gathered_hidden", "gathered_ids", "gathered_weights", "partial")


def _check_taps(rank: int, taps: Taps, counts: Sequence[int]) -> None:
    for field in fields(taps):
        tap = getattr(taps, field.name)
        if tap is None:
            continue
        if field.name not in _PADDED and len(tap) != counts[rank]:
            raise MisshapenError(
                f"rank {rank}'s tap {field.name} has {len(tap)} rows, expected {counts[rank]}: "
                "one row per token of the rank"
            )
        padded, ragged = divmod(len(tap), len(counts))
        if field.name in _PADDED and (ragged or padded < max(counts)):
            raise MisshapenError(
                f"rank {rank}'s tap {field.name} has {len(tap)} rows for {len(counts)} ranks, "
                f"expected at least {max(counts)} for each: every rank's rows, padded alike"
            )


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
