"""One expert-parallel forward in a single process, with every rounding explicit.

Ranks exist only where they round or copy: each rank's share of every row is summed
first, then the shares.  What the contract fixes is read from the contract; what it
leaves open is a field, and so is every place where a planted mistake can sit.

Legend: T tokens of all ranks, in rank order; N padded rows of one rank; H hidden_size;
E experts; K experts per token; R ranks.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from twinmoe.oracle.contract import RoundingContract, Wire
from twinmoe.oracle.emulation import activations, casts, combine, dispatch, gemm, routers
from twinmoe.oracle.emulation.kinds import Inputs
from twinmoe.oracle.observation import RankObservation, Taps
from twinmoe.oracle.rounding import Format
from twinmoe.reference.placement import Placement


@dataclass(frozen=True, kw_only=True)
class Emulation:
    """How one implementation executes a contract, step by step in the data flow's order.

    The defaults are correct under every contract without a ring; ``sum_ranks`` must suit
    the wire.  Covers layers of bf16, fp16 and fp32 whose router weight multiplies the
    output, and what this project's paths store, quantised or not.
    """

    logits: gemm.Gemm = gemm.sequential
    route: routers.Route = routers.score_then_select
    receive: dispatch.Receive = dispatch.copied
    assign: dispatch.Assign = dispatch.as_routed
    quantise: casts.Quantise = casts.divided
    gate_up: gemm.Gemm = gemm.sequential
    activate: activations.Activate = activations.direct
    store_h: casts.Cast = casts.nearest
    down: gemm.Gemm = gemm.sequential
    weigh: combine.Weigh = combine.own_weight
    sum_slots: combine.SlotSum = combine.in_order
    sum_ranks: combine.RankSum = combine.rank_order
    store_output: casts.Cast = casts.nearest

    def __str__(self) -> str:
        """The choices by name, in the data flow's order."""
        chosen = {field.name: getattr(self, field.name).__name__ for field in fields(self)}
        return ", ".join(f"{step}={name}" for step, name in chosen.items())

    def but(self, **choices: Any) -> Self:
        """The same implementation with some ``choices`` made differently."""
        return replace(self, **choices)

    def observe(
        self, contract: RoundingContract, inputs: Inputs, tapped: bool = True
    ) -> list[RankObservation]:
        """Run one forward; without ``tapped`` only outputs are shown.

        Raises ValueError for a layer that is not covered.
        """
        config = inputs.config
        if config.router_weight_on_input or config.dtype is torch.float64:
            raise ValueError(
                f"router_weight_on_input ({config.router_weight_on_input}) with dtype "
                f"({config.dtype}) is not emulated: use weights on the output and 16 or 32 bits"
            )
        return _Forward(self, contract, inputs).observations(tapped)


class _Forward:
    """One call of :meth:`Emulation.observe`: every intermediate tensor, in order."""

    def __init__(self, how: Emulation, contract: RoundingContract, inputs: Inputs) -> None:
        self.how, self.contract = how, contract
        self.config, self.weights = config, weights = inputs.config, inputs.weights
        self.counts = [len(hidden) for hidden in inputs.hidden_by_rank]
        self.placement = Placement(config.num_experts, len(self.counts))
        self.hidden_TH = torch.cat(inputs.hidden_by_rank)
        x_TH = self.hidden_TH.float()
        self.ids_TK, self.weights_TK = how.route(
            config, how.logits(x_TH, weights.router_EH.float()), weights.correction_bias_E
        )
        # any other rows of the right size will do for an earlier call's
        self.seen_TH = how.receive(x_TH, x_TH.roll(1, dims=-1))
        self.y_TKH = self._experts()
        self.shares_RTH = self._shares()
        self.routed_TH = self._across_ranks()
        self.output_TH = how.store_output(self._with_shared(), contract.output)

    def _experts(self) -> Tensor:
        ids_TK = self.how.assign(self.config, self.ids_TK, self.weights_TK)
        y_TKH = torch.zeros(*ids_TK.shape, self.config.hidden_size)
        for expert in ids_TK.unique().tolist():
            token, slot = (ids_TK == expert).nonzero(as_tuple=True)
            w13_FH, w2_HI = self.weights.w13_LFH[expert], self.weights.w2_LHI[expert]
            stored = (self.contract.gate_up, self.contract.expert_output)
            y_TKH[token, slot] = self._mlp(self.seen_TH[token], w13_FH, w2_HI, stored)
        return y_TKH

    def _mlp(
        self, x_NH: Tensor, w13_FH: Tensor, w2_HI: Tensor, stored: tuple[Format | None, ...]
    ) -> Tensor:
        gate_up_format, output_format = stored
        x_NH = self.how.quantise(x_NH, self.contract.quantise_input)
        gate_up = casts.nearest(self.how.gate_up(x_NH, w13_FH.float()), gate_up_format)
        h = self.how.store_h(self.how.activate(self.config, gate_up), self.contract.activation)
        h = self.how.quantise(h, self.contract.quantise_activation)
        return casts.nearest(self.how.down(h, w2_HI.float()), output_format)

    def _shares(self) -> Tensor:
        """Each rank's weighted sum over its own experts, stored for the wire: [R, T, H]."""
        weights_TK = self.how.weigh(self.weights_TK)
        if self.contract.wire is Wire.NONE:
            return self.how.sum_slots(weights_TK, self.y_TKH)[None]
        owner_TK = self.placement.owner(self.ids_TK)
        shares = []
        for rank in range(len(self.counts)):
            mine_TK = owner_TK == rank
            y_TKH = torch.where(mine_TK[..., None], self.y_TKH, 0.0)
            share_TH = self.how.sum_slots(torch.where(mine_TK, weights_TK, 0.0), y_TKH)
            shares.append(casts.nearest(share_TH, self.contract.partial))
        return torch.stack(shares)

    def _across_ranks(self) -> Tensor:
        if self.contract.wire is Wire.NONE:
            return self.shares_RTH[0]
        counts = torch.tensor(self.counts)
        owner_T = torch.arange(len(counts)).repeat_interleave(counts)
        total_TH = self.how.sum_ranks(self.shares_RTH, owner_T, self.contract.partial)
        return casts.nearest(total_TH, self.contract.reduced)

    def _with_shared(self) -> Tensor:
        weights, contract = self.weights, self.contract
        if weights.shared_w13_FH is None or weights.shared_w2_HI is None:
            return self.routed_TH
        x_TH, stored = self.hidden_TH.float(), (contract.shared_gate_up, contract.shared_output)
        shared_TH = self._mlp(x_TH, weights.shared_w13_FH, weights.shared_w2_HI, stored)
        if weights.shared_gate_1H is not None:
            gate_T1 = torch.sigmoid(self.how.logits(x_TH, weights.shared_gate_1H.float()))
            shared_TH = gate_T1 * shared_TH
        return self.routed_TH + shared_TH

    # --- what the judge sees --------------------------------------------------------------

    def observations(self, tapped: bool) -> list[RankObservation]:
        """One per rank, with all taps of the path or with none."""
        outputs = self.output_TH.to(self.config.dtype).split(self.counts)
        if not tapped:
            return [RankObservation(output_TH) for output_TH in outputs]
        return [
            RankObservation(output_TH, taps)
            for output_TH, taps in zip(outputs, self._taps(), strict=True)
        ]

    def _taps(self) -> list[Taps]:
        per_rank = {
            "ids_TK": self.ids_TK.split(self.counts),
            "weights_TK": self.weights_TK.split(self.counts),
            "routed_TH": self.routed_TH.split(self.counts),
        }
        if self.contract.wire is Wire.NONE:
            stored_TKH = casts.as_stored(self.y_TKH, self.contract.expert_output)
            per_rank["expert_output_TKH"] = stored_TKH.split(self.counts)
        taps = [
            Taps(**{name: parts[rank] for name, parts in per_rank.items()})
            for rank in range(len(self.counts))
        ]
        if self.contract.wire is Wire.NONE:
            return taps
        stored_RTH = casts.as_stored(self.shares_RTH, self.contract.partial)
        return [
            replace(tap, **self._gathered(), partial=self._padded(share_TH))
            for tap, share_TH in zip(taps, stored_RTH, strict=True)
        ]

    def _gathered(self) -> dict[str, Tensor]:
        """What every rank received: rows of all ranks, padded to the longest."""
        return {
            "gathered_hidden": self._padded(self.seen_TH.to(self.config.dtype)),
            "gathered_ids": self._padded(self.ids_TK, -1),
            "gathered_weights": self._padded(self.weights_TK),
        }

    def _padded(self, rows: Tensor, filler: float = 0.0) -> Tensor:
        """[T, ...] as [R*N, ...], each rank's rows followed by ``filler``."""
        longest = max(self.counts)
        parts = []
        for mine in rows.split(self.counts):
            padding = mine.new_full((longest - len(mine), *mine.shape[1:]), filler)
            parts += [mine, padding]
        return torch.cat(parts)
