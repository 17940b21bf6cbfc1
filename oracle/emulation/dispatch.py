"""What reaches the experts: a copy of the rows, and the experts that were chosen.

Legend: T tokens of all ranks, H hidden_size, K experts per token.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from twinmoe.reference.config import MoEConfig

#: (this call's rows, the previous call's rows) to the rows that the experts see.
Receive = Callable[[Tensor, Tensor], Tensor]

#: (ids, weights) of the router's answer to the experts that compute each slot.
Assign = Callable[[MoEConfig, Tensor, Tensor], Tensor]


def copied(x_TH: Tensor, previous_TH: Tensor) -> Tensor:
    """Every row arrives."""
    return x_TH


def last_row_stale(x_TH: Tensor, previous_TH: Tensor) -> Tensor:
    """WRONG: the last row is still that of the previous call."""
    return torch.cat([x_TH[:-1], previous_TH[-1:]])


def as_routed(config: MoEConfig, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Each slot's own expert."""
    return ids_TK


def weakest_misassigned(config: MoEConfig, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """WRONG: the slot of smallest weight goes to the next expert."""
    weakest_T1 = weights_TK.argmin(dim=1, keepdim=True)
    wrong_T1 = (ids_TK.gather(1, weakest_T1) + 1) % config.num_experts
    return ids_TK.scatter(1, weakest_T1, wrong_T1)
