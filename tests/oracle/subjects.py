"""Layers to hold before the judge: the reference, and a graphed path that can be doctored.

Both run all ranks in this process.  The graphed path is written from the contract alone,
with the reference's router and experts, so that the judge meets arithmetic of another hand.

Legend: T tokens of one rank, N padded rows of one rank, H hidden_size, K experts per token,
R ranks, S slots of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.reference.inputs import tokens
from twinmoe.oracle import RankObservation, RoundingContract, Taps, Truth, Verdict, judge
from twinmoe.oracle.contracts import graphed_contract
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.experts import mlp
from twinmoe.reference.layer import MoELayer
from twinmoe.reference.placement import Placement
from twinmoe.reference.router import Routing, TopKRouter
from twinmoe.reference.shared_expert import SharedExpertMLP
from twinmoe.reference.weights import MoEWeights

#: What goes wrong at one point of the data flow: (rank, right tensor) to wrong tensor.
Fault = Callable[[int, Tensor], Tensor]


def reference(
    config: MoEConfig, weights: MoEWeights, x_TH: Tensor, tapped: bool = True
) -> RankObservation:
    """Run the reference layer as a single rank; its router is tapped."""
    layer = MoELayer(config, weights)
    routings: list[Routing] = []
    layer.router.register_forward_hook(lambda _module, _args, routing: routings.append(routing))
    with torch.no_grad():
        out_TH = layer(x_TH)
    taps = Taps(ids_TK=routings[0].ids_TK, weights_TK=routings[0].weights_TK)
    return RankObservation(out_TH, taps if tapped else Taps(), path="reference")


@dataclass(frozen=True, eq=False)
class Graphed:
    """All-gather, experts on the routing map, reduce-scatter in the order of ranks.

    ``faults`` at ``ids``, ``weights``, ``gathered_hidden``, ``terms`` (a rank's weighted
    expert outputs [R*N, K, H]), ``partial``, ``routed`` and ``output`` replace what a rank
    goes on with, and shows.
    """

    config: MoEConfig
    weights: MoEWeights
    hidden_by_rank: Sequence[Tensor]
    faults: Mapping[str, Fault] = field(default_factory=dict)

    def observe(self, tapped: bool = True) -> list[RankObservation]:
        """Run one forward of all ranks."""
        ranks = range(len(self.hidden_by_rank))
        routings = [self._route(rank) for rank in ranks]
        gathered = [
            torch.cat(parts)
            for parts in zip(*(self._padded(rank, routings[rank]) for rank in ranks), strict=True)
        ]
        received = [self._fault("gathered_hidden", rank, gathered[0]) for rank in ranks]
        partials = [self._share(rank, received[rank], *gathered[1:]) for rank in ranks]
        observations = []
        for rank in ranks:
            routed_TH = self._fault("routed", rank, self._reduced(rank, partials))
            taps = Taps(
                *routings[rank],
                gathered_hidden=received[rank],
                gathered_ids=gathered[1],
                gathered_weights=gathered[2],
                partial=partials[rank],
                routed_TH=routed_TH,
            )
            output_TH = self._fault("output", rank, self._output(rank, routed_TH))
            observations.append(
                RankObservation(output_TH, taps if tapped else Taps(), path="emulated p2p")
            )
        return observations

    def _fault(self, point: str, rank: int, tensor: Tensor) -> Tensor:
        return self.faults[point](rank, tensor.clone()) if point in self.faults else tensor

    def _rows(self) -> int:
        return max(len(hidden_TH) for hidden_TH in self.hidden_by_rank) + 1

    def _route(self, rank: int) -> tuple[Tensor, Tensor]:
        routing = TopKRouter(self.config, self.weights)(self.hidden_by_rank[rank])
        ids_TK = self._fault("ids", rank, routing.ids_TK)
        return ids_TK, self._fault("weights", rank, routing.weights_TK)

    def _padded(self, rank: int, routing: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Hidden states, ids and weights of one rank, [N, ...]; NaN in the padding rows."""
        below = (0, 0, 0, self._rows() - len(self.hidden_by_rank[rank]))
        pad = torch.nn.functional.pad
        return (
            pad(self.hidden_by_rank[rank], below, value=torch.nan),
            pad(routing[0], below, value=-1),
            pad(routing[1], below),
        )

    def _share(self, rank: int, x_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        placement = Placement(self.config.num_experts, len(self.hidden_by_rank))
        terms_NKH = torch.zeros(*ids_NK.shape, self.config.hidden_size)
        for expert in placement.experts_of(rank):
            row_S, slot_S = (ids_NK == expert).nonzero(as_tuple=True)
            matrices = self.weights.w13_LFH[expert], self.weights.w2_LHI[expert]
            y_SH = mlp(self.config, x_NH[row_S], *matrices).float()
            terms_NKH[row_S, slot_S] = weights_NK[row_S, slot_S][:, None].float() * y_SH
        terms_NKH = self._fault("terms", rank, terms_NKH)
        return self._fault("partial", rank, terms_NKH.sum(dim=1))

    def _reduced(self, rank: int, partials: Sequence[Tensor]) -> Tensor:
        first = rank * self._rows()
        rows = slice(first, first + len(self.hidden_by_rank[rank]))
        total_TH = torch.zeros_like(partials[0][rows])
        for partial in partials:
            total_TH = total_TH + partial[rows]
        return total_TH

    def _output(self, rank: int, routed_TH: Tensor) -> Tensor:
        if self.config.has_shared_expert:
            shared = SharedExpertMLP(self.config, self.weights)
            routed_TH = routed_TH + shared(self.hidden_by_rank[rank])
        return routed_TH.to(self.config.dtype)


# --- a graphed layer of four ranks ---

#: Tokens of each rank of the graphed layer.
COUNTS = (40, 0, 33, 24)


def layer(dtype: torch.dtype = torch.bfloat16, **changes: object) -> tuple[MoEConfig, MoEWeights]:
    """Return a layer with every term visible, and its weights."""
    config = MoEConfig(
        **{  # type: ignore[arg-type]
            "hidden_size": 64,
            "moe_intermediate_size": 48,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 2.5,
            "shared_expert_intermediate_size": 24,
            "dtype": dtype,
            **changes,
        }
    )
    return config, MoEWeights.random(config, 3)


def graphed(
    faults: dict[str, Fault] | None = None, dtype: torch.dtype = torch.bfloat16
) -> tuple[Graphed, Truth, RoundingContract]:
    """Return a graphed layer of four ranks, its truth and its contract."""
    config, weights = layer(dtype)
    hidden = [tokens(config, count, seed) for seed, count in enumerate(COUNTS)]
    contract = graphed_contract(config, "grouped_mm", "p2p", torch.float32)
    return Graphed(config, weights, hidden, faults or {}), Truth(config, weights, hidden), contract


def verdict_of(faults: dict[str, Fault] | None = None, tapped: bool = True) -> Verdict:
    """Judge a graphed layer, with something wrong or without."""
    subject, truth, contract = graphed(faults)
    return judge(subject.observe(tapped), truth, contract)


def on_rank(which: int, change: Callable[[Tensor], Tensor]) -> Fault:
    """Return a fault of one rank only."""
    return lambda rank, tensor: change(tensor) if rank == which else tensor
