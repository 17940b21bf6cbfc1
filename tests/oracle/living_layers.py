"""Layers that offer reloads, a kill switch, poison and graphs: right, and wrong in one of them.

Legend: T tokens, H hidden_size, E experts, F rows of w13, K experts per token.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import silu

from twinmoe.oracle import Taps, storage_contract
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.router import TopKRouter
from twinmoe.reference.weights import MoEWeights


class Silent:
    """Every token through every expert, with no word to the host; offers nothing."""

    def __init__(self, config: MoEConfig, weights: MoEWeights, _place: RankContext) -> None:
        self.weights, self.route = weights, TopKRouter(config, weights)
        self.contract = storage_contract("living", config.dtype)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """w13 [E, F, H] and w2 [E, H, I] as the forward uses them."""
        return self.weights.w13_LFH, self.weights.w2_LHI

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Taps]:
        """[T, H] to [T, H]."""
        routing = self.route(hidden_TH)
        w13_EFH, w2_EHI = self.matrices()
        gate, up = torch.matmul(hidden_TH, w13_EFH.mT).float().chunk(2, dim=-1)
        y_ETH = torch.matmul((silu(gate) * up).to(hidden_TH.dtype), w2_EHI.mT).float()
        ids_KT1 = routing.ids_TK.long().T[..., None].expand(-1, -1, hidden_TH.shape[1])
        y_KTH = y_ETH.gather(0, ids_KT1)
        out_TH = (routing.weights_TK.T[..., None] * y_KTH).sum(0).to(hidden_TH.dtype)
        return out_TH, Taps(routing.ids_TK, routing.weights_TK)


class Living(Silent):
    """Offers everything: weights of its own, a switch with a count, and a forward for graphs."""

    graph_safe = True

    def __init__(self, config: MoEConfig, weights: MoEWeights, place: RankContext) -> None:
        super().__init__(config, weights, place)
        self.w13_EFH, self.w2_EHI = weights.w13_LFH.clone(), weights.w2_LHI.clone()
        self.scratch_EHI = torch.empty_like(self.w2_EHI)
        self.killed, self.calls = False, 0

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Copies, by a kernel of the kind that the switch leaves."""
        self.calls += not self.killed
        self.scratch_EHI.copy_(self.w2_EHI)
        return self.w13_EFH, self.scratch_EHI

    def reload(self, weights: MoEWeights) -> None:
        """Overwrite, and derive anew."""
        self.weights.copy_(weights)
        self.w13_EFH.copy_(weights.w13_LFH)
        self.w2_EHI.copy_(weights.w2_LHI)

    def set_kill_switch(self, disabled: bool) -> None:
        """Leave the counted kernels."""
        self.killed = disabled

    def symmetric_calls(self) -> int:
        """Count what the switch is to prevent."""
        return self.calls

    def poison(self) -> None:
        """Spoil the scratch memory."""
        self.scratch_EHI.fill_(torch.nan)


class StaleCopies(Living):
    """A reload that forgets what was derived from the weights."""

    def reload(self, weights: MoEWeights) -> None:
        """Overwrite the weights alone."""
        self.weights.copy_(weights)


class MovedWeights(Living):
    """A reload that makes new tensors, which live graphs do not know."""

    def reload(self, weights: MoEWeights) -> None:
        """Right outside graphs."""
        self.weights.copy_(weights)
        self.w13_EFH, self.w2_EHI = weights.w13_LFH.clone(), weights.w2_LHI.clone()


class StuckSwitch(Living):
    """Whatever ran first is what runs from then on."""

    chosen: bool | None = None

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Choose once."""
        self.chosen = self.killed if self.chosen is None else self.chosen
        self.calls += not self.chosen
        return self.w13_EFH, self.w2_EHI


class SetUpRegardless(Living):
    """The switch leaves the kernels, but each forward still finds its peers."""

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Count a rendezvous."""
        self.calls += 1
        return self.w13_EFH, self.w2_EHI


class ReadsScratch(Living):
    """What the last forward left in scratch memory is part of the next answer."""

    filled = False

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Fill it once."""
        if not self.filled:
            self.scratch_EHI.copy_(self.w2_EHI)
            self.filled = True
        return self.w13_EFH, self.scratch_EHI


class NeverFilled(Silent):
    """A row of new memory that nobody writes, and that is mostly 0."""

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Taps]:
        """Add it to the answer."""
        out_TH, taps = super().forward(hidden_TH)
        row_H = torch.empty(out_TH.shape[1], dtype=out_TH.dtype)
        return out_TH + row_H.where(row_H.isnan(), 0), taps


class KeyedByAddress(Silent):
    """Transposed copies in a cache that knows tensors by their addresses."""

    cache: ClassVar[dict[int, Tensor]] = {}

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Take the copy of whatever lay there first."""
        w13_EFH, w2_EHI = self.weights.w13_LFH, self.weights.w2_LHI
        key = hash((w13_EFH.data_ptr(), w13_EFH.shape, w13_EFH.dtype))
        return self.cache.setdefault(key, w13_EFH.clone()), w2_EHI


class SecondLife(Silent):
    """A new layer begins with the scales that the one before it left behind."""

    lives: ClassVar[list[object]] = []

    def __init__(self, config: MoEConfig, weights: MoEWeights, place: RankContext) -> None:
        super().__init__(config, weights, place)
        self.fresh = bool(self.lives)
        self.lives.append(None)

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Taps]:
        """Wrong once."""
        out_TH, taps = super().forward(hidden_TH)
        self.fresh, was_fresh = False, self.fresh
        return out_TH * (2 if was_fresh else 1), taps
