"""AlltoAll exchange of tokens: every row travels to the rank that owns its expert, and back.

Legend: T tokens, H hidden_size, K experts per token, R ranks, N rows sent (the (token, k) pairs
that name an expert), S slots (rows received).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from twinmoe.reference.config import ConfigError
from twinmoe.reference.placement import Placement

#: Stands where a peer expects a row count: this rank takes no part, and says why next.
_ABSENT = -1


class PeerError(RuntimeError):
    """Another rank takes no part in a collective: says which, and what it stumbled over."""


@dataclass(frozen=True, eq=False)
class DispatchMetadata:
    """What ``token_combine`` needs to bring rows home.

    ``position_N`` is the place of each sent row among the T * K pairs, in the order sent: by
    owner rank, then by place.  Row counts are per peer rank.
    """

    num_tokens: int
    experts_per_token: int
    position_N: torch.Tensor
    sent_R: list[int]
    received_R: list[int]


class MoEAlltoAllTokenDispatcher:
    """Sends exactly the rows that an expert needs: no token is dropped, nothing is padded.

    ``group`` None means a single rank and needs no torch.distributed.  Differentiable: the
    gradient of an exchange is the reverse exchange, so if one rank of the group runs backward, all
    do.  Ranks may hold different numbers of tokens, also none.

    Raises ConfigError when the group and the placement differ in size.
    """

    def __init__(self, placement: Placement, group: dist.ProcessGroup | None) -> None:
        group_size = 1 if group is None else group.size()
        if placement.ep_size != group_size:
            raise ConfigError(
                f"the placement's ep_size ({placement.ep_size}) must be the group's size "
                f"({group_size}): every rank owns a part of the experts; use a Placement of "
                f"{group_size} rank(s)"
            )
        self.placement = placement
        self.group = group

    @contextmanager
    def told_to_peers(self, device: torch.device) -> Iterator[None]:
        """Around what a rank does before ``token_dispatch``: an error there ends the peers' wait.

        They wait for this rank's row counts, and find in their place that it takes no part; then
        all exchange the reasons.  Without an error nothing is sent.  ``device`` is that of the
        tokens that the peers send.
        """
        try:
            yield
        except Exception as error:
            if self.group is not None:
                absent_R = torch.full((self.placement.ep_size,), _ABSENT, device=device)
                self._counts_for_me(absent_R)
                self._reasons(f"{type(error).__name__}: {error}")
            raise

    def token_dispatch(
        self, x: torch.Tensor, ids_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, DispatchMetadata]:
        """Send rows to their experts' owners.

        ``x`` is [T, H], or [T, K, H] when each pair has a row of its own; ``ids_TK`` holds global
        expert ids, -1 where a pair has no expert and is not sent.  Returns the received rows
        [S, H], for each the local id (int64) of its expert, and the way back.  Raises PeerError
        if another rank failed in `told_to_peers`.
        """
        num_tokens, experts_per_token = ids_TK.shape
        ids = ids_TK.flatten()
        owner = self.placement.owner(ids)
        position_N = owner.argsort(stable=True)[(ids < 0).sum() :]
        row_N = position_N if x.dim() == 3 else position_N // experts_per_token
        rows_NH = x.flatten(0, -2)[row_N]

        sent_R = owner[position_N].bincount(minlength=self.placement.ep_size)
        received_R = self._counts_for_me(sent_R).tolist()
        if _ABSENT in received_R:
            raise PeerError(self._reasons())
        metadata = DispatchMetadata(
            num_tokens, experts_per_token, position_N, sent_R.tolist(), received_R
        )
        x_SH = self._exchange(rows_NH, metadata.sent_R, metadata.received_R)
        ids_S = self._exchange(ids[position_N], metadata.sent_R, metadata.received_R)
        return x_SH, self.placement.local_id(ids_S), metadata

    def token_combine(self, y_SH: torch.Tensor, metadata: DispatchMetadata) -> torch.Tensor:
        """Bring expert outputs [S, H] home as [T, K, H]; zeros for pairs that were not sent."""
        y_NH = self._exchange(y_SH, metadata.received_R, metadata.sent_R)
        num_pairs = metadata.num_tokens * metadata.experts_per_token
        y = y_NH.new_zeros(num_pairs, y_NH.shape[1]).index_copy(0, metadata.position_N, y_NH)
        return y.view(metadata.num_tokens, metadata.experts_per_token, y_NH.shape[1])

    def _counts_for_me(self, sent_R: torch.Tensor) -> torch.Tensor:
        one_each = [1] * self.placement.ep_size
        return self._exchange(sent_R, one_each, one_each)

    def _reasons(self, own: str | None = None) -> str:
        """Exchange why ranks are absent; say it of all of them."""
        reasons: list[str | None] = [own] * self.placement.ep_size
        dist.all_gather_object(reasons, own, group=self.group)
        absent = [f"rank {rank} ({reason})" for rank, reason in enumerate(reasons) if reason]
        return (
            f"no rows come from {', '.join(absent)}: tokens are exchanged by all ranks or by none; "
            "correct it there, and call all ranks again"
        )

    def _exchange(
        self, rows: torch.Tensor, send_R: list[int], receive_R: list[int]
    ) -> torch.Tensor:
        if self.group is None:
            return rows
        return _all_to_all(rows, send_R, receive_R, self.group)


class _AllToAll(torch.autograd.Function):
    """``all_to_all_single`` of rows; its gradient takes the same way back."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        send_R: list[int],
        receive_R: list[int],
        group: dist.ProcessGroup,
    ) -> torch.Tensor:
        ctx.send_R, ctx.receive_R, ctx.group = send_R, receive_R, group
        received = rows.new_empty(sum(receive_R), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), receive_R, send_R, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        home = _all_to_all(gradients[0], ctx.receive_R, ctx.send_R, ctx.group)
        return home, None, None, None


def _all_to_all(
    rows: torch.Tensor, send_R: list[int], receive_R: list[int], group: dist.ProcessGroup
) -> torch.Tensor:
    received: torch.Tensor = _AllToAll.apply(rows, send_R, receive_R, group)  # type: ignore[no-untyped-call]
    return received
