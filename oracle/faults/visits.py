"""Where a case's tokens go: routing of record on the case's own numbers, for exact triggers.

Legend: T tokens of one rank, K experts per token, E experts, R ranks.
"""

import functools

import torch
from torch import Tensor

from twinmoe.oracle.case import Case
from twinmoe.oracle.inputs import hidden_for, weights_for
from twinmoe.reference.placement import Placement
from twinmoe.reference.router import TopKRouter


@functools.lru_cache(maxsize=64)
def visited(case: Case, batch: int = 0) -> tuple[Tensor, ...]:
    """Each rank's expert ids [T, K] in batch number ``batch``."""
    router = TopKRouter(case.config, weights_for(case, range(1)))
    return tuple(router(hidden_for(case, rank, batch)).ids_TK for rank in range(case.ep_size))


def visits(case: Case, batch: int = 0) -> Tensor:
    """How many slots of all ranks each expert gets, [E]."""
    return torch.cat(visited(case, batch)).flatten().bincount(minlength=case.config.num_experts)


def sent(case: Case) -> Tensor:
    """How many slots each rank (row) has for each rank's experts (column), [R, R]."""
    placement = Placement(case.config.num_experts, case.ep_size)
    owners = [placement.owner(ids_TK).flatten() for ids_TK in visited(case)]
    return torch.stack([owner.bincount(minlength=case.ep_size) for owner in owners])


def crosses(case: Case) -> bool:
    """Some token's expert lives on another rank."""
    slots_RR = sent(case)
    return bool((slots_RR - slots_RR.diag().diag()).any())


def leaves_rank_0(case: Case) -> bool:
    """Some slot is computed on another rank than the first."""
    return bool(sent(case)[:, 1:].any())


def starves_a_rank(case: Case) -> bool:
    """Some rank's experts get no slot at all."""
    return not bool(sent(case).sum(0).all())


def owners_of_a_token(case: Case) -> int:
    """Most ranks that any one token visits."""
    placement = Placement(case.config.num_experts, case.ep_size)
    owners_TK = placement.owner(torch.cat(visited(case)))
    return max((len(row.unique()) for row in owners_TK), default=0)
