"""Dispatch is a copy: what each rank received is what the others sent, bit for bit.

An all-gather brings every row to every rank.  An AlltoAll brings to an expert's owner a row of
each token that chose it, in an order that is the dispatcher's own affair.

Legend: T tokens of all ranks, H hidden_size, K experts per token, S rows that a rank received.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from twinmoe.oracle.bits import as_bits
from twinmoe.oracle.evidence import Evidence, Received
from twinmoe.oracle.truth import Truth


@dataclass(frozen=True)
class WrongCopy:
    """The first token (of all ranks') whose row did not arrive as sent, and what to say of it."""

    token: int
    message: str


def wrong_copies(evidence: Evidence, truth: Truth) -> Iterator[WrongCopy]:
    """What was received otherwise than sent, by an all-gather or an AlltoAll."""

    def place(token: int) -> str:
        return f"token {int(truth.row_T[token])} on rank {int(truth.rank_T[token])}"

    yield from _gathered(evidence, truth, place)
    ids_TK = evidence.ids_TK
    if evidence.received is None or ids_TK is None or not len(ids_TK):
        return
    if bool(((ids_TK >= 0) & (ids_TK < truth.config.num_experts)).all()):
        for rank, received in enumerate(evidence.received):
            yield from _exchanged(rank, received, _sent_to(rank, ids_TK, evidence, truth), place)


# --- all-gather -------------------------------------------------------------------------------


def _gathered(evidence: Evidence, truth: Truth, place: Callable[[int], str]) -> Iterator[WrongCopy]:
    for what, received, sent in (
        ("hidden states", evidence.gathered_hidden_RTH, truth.hidden_TH),
        ("ids", evidence.gathered_ids_RTK, evidence.ids_TK),
        ("weights", evidence.gathered_weights_RTK, evidence.weights_TK),
    ):
        if received is None or sent is None:
            continue
        for rank, copy in enumerate(received):
            wrong_T = (as_bits(copy) != as_bits(sent)).any(dim=-1)
            for token in wrong_T.nonzero().flatten().tolist()[:1]:
                yield WrongCopy(
                    token,
                    f"gathered {what} of {place(token)} differ from what was sent, as received by "
                    f"rank {rank} ({int(wrong_T.sum())} of {len(wrong_T)} rows differ)",
                )


# --- AlltoAll ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sent:
    """What goes to one rank: the token of each row, the row, and its expert's local id."""

    token_S: Tensor
    hidden_SH: Tensor
    ids_S: Tensor


def _sent_to(rank: int, ids_TK: Tensor, evidence: Evidence, truth: Truth) -> _Sent:
    token_S, slot_S = (truth.placement.owner(ids_TK) == rank).nonzero(as_tuple=True)
    rows = evidence.sent_TKH
    hidden_SH = truth.hidden_TH[token_S] if rows is None else rows[token_S, slot_S]
    if rows is None and truth.config.router_weight_on_input:  # other rows than the tokens
        hidden_SH = hidden_SH[:, :0]
    return _Sent(token_S, hidden_SH, truth.placement.local_id(ids_TK[token_S, slot_S]))


def _exchanged(
    rank: int, received: Received, sent: _Sent, place: Callable[[int], str]
) -> Iterator[WrongCopy]:
    arrived = Counter(_keys(received.hidden_SH[:, : sent.hidden_SH.shape[1]], received.ids_S))
    missing = []
    for number, key in enumerate(_keys(sent.hidden_SH, sent.ids_S)):
        if arrived[key]:
            arrived[key] -= 1
        else:
            missing.append(number)
    surplus = arrived.total()
    if not missing and not surplus:
        return
    counts = f"{len(missing)} of {len(sent.token_S)} rows did not arrive, {surplus} others did"
    if not missing:
        yield WrongCopy(0, f"rank {rank} received rows that nobody sent it ({counts})")
        return
    token, expert = int(sent.token_S[missing[0]]), int(sent.ids_S[missing[0]])
    yield WrongCopy(
        token,
        f"the row of {place(token)} for expert {expert} of rank {rank} did not arrive there as it "
        f"was sent ({counts})",
    )


def _keys(hidden_SH: Tensor, ids_S: Tensor) -> list[tuple[int, bytes]]:
    """Each row's expert and bits."""
    bits_SB = hidden_SH.contiguous().view(torch.uint8)
    rows = [row.tobytes() for row in bits_SB.numpy()]
    return list(zip(ids_S.tolist(), rows, strict=True))
