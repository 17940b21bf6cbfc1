"""Orders in which weighted expert outputs become one row: over slots, then over ranks.

Legend: T tokens of all ranks, H hidden_size, K experts per token, R ranks.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from twinmoe.oracle.emulation.casts import nearest, to_bf16
from twinmoe.oracle.rounding import Format

#: The router's weights [T, K] to those that the combine multiplies with.
Weigh = Callable[[Tensor], Tensor]

#: (weights [T, K], expert outputs [T, K, H]) to their weighted sum [T, H] in fp32.
SlotSum = Callable[[Tensor, Tensor], Tensor]

#: (shares [R, T, H], the rank that owns each token [T], payload) to their sum [T, H].
RankSum = Callable[[Tensor, Tensor, Format | None], Tensor]


# --- weights ------------------------------------------------------------------------------


def own_weight(weights_TK: Tensor) -> Tensor:
    """Each slot's own."""
    return weights_TK


def weakest_dropped(weights_TK: Tensor) -> Tensor:
    """WRONG: the slot of smallest weight is lost."""
    return weights_TK.scatter(1, weights_TK.argmin(dim=1, keepdim=True), 0.0)


def neighbours_weight(weights_TK: Tensor) -> Tensor:
    """WRONG: every token's slots are scaled with the next token's weights."""
    return weights_TK.roll(-1, dims=0)


# --- slots --------------------------------------------------------------------------------


def in_order(weights_TK: Tensor, y_TKH: Tensor) -> Tensor:
    """From the best expert to the weakest, product and sum rounded apart."""
    return _chain((weights_TK[..., None] * y_TKH).unbind(1))


def backwards(weights_TK: Tensor, y_TKH: Tensor) -> Tensor:
    """From the weakest expert to the best."""
    return in_order(weights_TK.flip(1), y_TKH.flip(1))


def halves_first(weights_TK: Tensor, y_TKH: Tensor) -> Tensor:
    """A binary tree over the slots."""
    return _tree(list((weights_TK[..., None] * y_TKH).unbind(1)))


def fused_multiply_add(weights_TK: Tensor, y_TKH: Tensor) -> Tensor:
    """In order, product and sum rounded together, once."""
    total_TH = torch.zeros_like(y_TKH[:, 0])
    for weight_T, y_TH in zip(weights_TK.unbind(1), y_TKH.unbind(1), strict=True):
        exact_TH = weight_T.double()[:, None] * y_TH.double()
        total_TH = (total_TH.double() + exact_TH).float()
    return total_TH


def bf16_accumulator(weights_TK: Tensor, y_TKH: Tensor) -> Tensor:
    """WRONG: the running sum is kept in bf16, as by adding into the output buffer."""
    total_TH = torch.zeros_like(y_TKH[:, 0])
    for weight_T, y_TH in zip(weights_TK.unbind(1), y_TKH.unbind(1), strict=True):
        total_TH = to_bf16(total_TH + weight_T[:, None] * y_TH)
    return total_TH


# --- ranks --------------------------------------------------------------------------------


def rank_order(shares_RTH: Tensor, owner_T: Tensor, payload: Format | None) -> Tensor:
    """From rank 0 up, in fp32: the peer-to-peer reduce-scatter."""
    return _chain(shares_RTH)


def reversed_ranks(shares_RTH: Tensor, owner_T: Tensor, payload: Format | None) -> Tensor:
    """From the last rank down, in fp32."""
    return _chain(shares_RTH.flip(0))


def rank_tree(shares_RTH: Tensor, owner_T: Tensor, payload: Format | None) -> Tensor:
    """A binary tree in fp32, as a switch may reduce."""
    return _tree(list(shares_RTH))


def rotated(shares_RTH: Tensor, owner_T: Tensor, payload: Format | None) -> Tensor:
    """In fp32, each owner starting with its own share."""
    return _chain(_from_own(shares_RTH, owner_T))


def ring(shares_RTH: Tensor, owner_T: Tensor, payload: Format | None) -> Tensor:
    """Round the ring, the sum stored in the payload's format at every hop."""
    hops = _from_own(shares_RTH, owner_T).roll(-1, dims=0)
    total_TH = hops[0]
    for share_TH in hops[1:]:
        total_TH = nearest(total_TH + share_TH, payload)
    return total_TH


def bf16_ring(shares_RTH: Tensor, owner_T: Tensor, payload: Format | None) -> Tensor:
    """WRONG: a ring whose hops are in bf16, whatever the payload was declared to be."""
    hops = to_bf16(_from_own(shares_RTH, owner_T).roll(-1, dims=0))
    total_TH = hops[0]
    for share_TH in hops[1:]:
        total_TH = to_bf16(total_TH + share_TH)
    return total_TH


def _from_own(shares_RTH: Tensor, owner_T: Tensor) -> Tensor:
    """The shares in the order own, own + 1, ... (mod R) of each token's owner."""
    ranks = len(shares_RTH)
    order_RT = (torch.arange(ranks)[:, None] + owner_T) % ranks
    return shares_RTH.gather(0, order_RT[..., None].expand_as(shares_RTH))


def _chain(parts: Iterable[Tensor]) -> Tensor:
    first, *rest = parts
    for part in rest:
        first = first + part
    return first


def _tree(parts: list[Tensor]) -> Tensor:
    while len(parts) > 1:
        pairs = [a + b for a, b in zip(parts[0::2], parts[1::2], strict=False)]
        parts = pairs + parts[len(pairs) * 2 :]
    return parts[0]
