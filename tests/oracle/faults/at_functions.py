"""One fault planted around single functions, on any rank's behalf, and what they work on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from twinmoe.optimized.experts import InferenceGroupedMLP
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults import FAULTS
from twinmoe.oracle.faults.seams import Seams
from twinmoe.oracle.inputs import hidden_for, weights_for
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.placement import Placement
from twinmoe.reference.router import TopKRouter


@contextmanager
def planted(name: str, case: Case, rank: int = 0) -> Iterator[None]:
    """``name``'s fault, as ``rank`` of the case's ranks has it; the case must reach it."""
    assert FAULTS[name].reaches(case), f"{name} cannot matter on {case}"
    context = RankContext(rank, case.ep_size, None, torch.device("cpu"))
    with Seams(context, case) as seams:
        FAULTS[name].plant(seams)
        yield


def routed(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """All ranks' hidden states, ids (int32) and weights, without padding."""
    x_TH = torch.cat([hidden_for(case, rank) for rank in range(case.ep_size)])
    routing = TopKRouter(case.config, weights_for(case))(x_TH)
    return x_TH, routing.ids_TK.int(), routing.weights_TK


def experts_of(case: Case, rank: int) -> InferenceGroupedMLP:
    """``rank``'s experts."""
    placement = Placement(case.config.num_experts, case.ep_size)
    weights = weights_for(case, placement.experts_of(rank))
    return InferenceGroupedMLP(case.config, weights, placement, rank, case.backend)


def padded(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same batch with two rows of padding that hold NaN, name no expert and weigh nothing."""
    return (
        torch.cat([x_TH, x_TH.new_full((2, x_TH.shape[1]), torch.nan)]),
        torch.cat([ids_TK, ids_TK.new_full((2, ids_TK.shape[1]), -1)]),
        torch.cat([weights_TK, weights_TK.new_zeros(2, weights_TK.shape[1])]),
    )


def share(experts: InferenceGroupedMLP, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """One rank's share of every row."""
    out_MH = torch.empty(batch[0].shape, dtype=torch.float32)
    experts(*batch, out_MH)
    return out_MH
