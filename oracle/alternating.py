"""Batches that wake and rest experts in turn: state that depends on routing shows between them.

Even batches spread their tokens over :data:`TURNS` sets of k experts, odd ones send all of them
to one set.  So experts that one batch keeps busy are idle in the next, and fewer tiles and
counts are in use than before.

Legend: T tokens, H hidden_size, E experts, K experts per token.
"""

import torch
from torch import Tensor

from twinmoe.reference.config import MoEConfig

#: Sets of experts, and hidden channels that ask for one of them each.
TURNS = 4

#: Value of the channel that asks: a token's depends on its number, so that weights differ too.
_CARRIERS = (4.0, 3.5, 3.0)

#: Logit advantage of the first expert of a set at the largest carrier, and of the last.
_ADVANTAGES = (12.0, 6.0)


def ask_in_turn(x_TH: Tensor, batch: int) -> Tensor:
    """Hidden states [T, H] whose first channels ask for the sets of experts of ``batch``."""
    asked_TH = x_TH.clone()
    turns = min(TURNS, x_TH.shape[1])
    token_T = torch.arange(len(x_TH))
    turn_T = (batch + token_T * (batch % 2 == 0)) % turns
    asked_TH[:, :turns] = 0
    asked_TH[token_T, turn_T] = torch.tensor(_CARRIERS)[token_T % len(_CARRIERS)]
    return asked_TH


def answer_in_turn(config: MoEConfig, background_EH: Tensor, generator: torch.Generator) -> Tensor:
    """Router [E, H] whose first channels each favour k experts, those of a set by degrees.

    ``background_EH`` is what the other channels say.
    """
    router_EH = background_EH.clone()
    turns = min(TURNS, router_EH.shape[1])
    router_EH[:, :turns] = 0
    first, last = _ADVANTAGES
    grades_K = torch.linspace(first, last, config.num_experts_per_tok) / max(_CARRIERS)
    groups = torch.randperm(config.n_group, generator=generator)
    # Neighbours, so that a few experts fill what rows many had.
    size = config.num_experts // config.n_group
    within = torch.arange(size).roll(int(torch.randint(size, (), generator=generator)))
    for turn in range(turns):
        chosen = groups.roll(-turn * config.topk_group)[: config.topk_group]
        reachable = (chosen[:, None] * len(within) + within).flatten()
        favoured_K = reachable.roll(-turn * len(grades_K))[: len(grades_K)]
        router_EH[favoured_K, turn] = grades_K.to(router_EH.dtype)
    return router_EH
