"""A layer in plain torch that stores exactly the tensors that it is told to store.

Written without the project's own arithmetic: what a person might write, with each rounding a
choice.

Legend: T tokens, K experts per token, H hidden_size.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import silu

from tests.oracle.mistaken_layers import Parts, factory_of
from twinmoe.oracle.contract import Ties, storage_contract
from twinmoe.oracle.plain_layer import PlainLayer
from twinmoe.oracle.rounding import FORMATS
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights

#: What the storage contract stores, and what it keeps, by the points' names.
STORED = ("gate_up", "activation", "expert_output")
KEPT = ("logits", "scores", "router_weights", "gate", "terms", "combine")

#: What a router stores that computes in the model's dtype from end to end.
NARROW_ROUTER = ("logits", "scores", "score_sum", "normalised_weights", "router_weights")


def answer(
    config: MoEConfig, weights: MoEWeights, hidden_TH: Tensor, stored: Collection[str]
) -> Tensor:
    """Run the layer; tensors not in ``stored`` stay in fp32."""

    def kept(point: str, tensor: Tensor) -> Tensor:
        return tensor.to(config.dtype).float() if point in stored else tensor

    x_TH = hidden_TH.float()
    logits = kept("logits", x_TH @ weights.router_EH.float().T)
    top_TK, ids_TK = kept("scores", logits.softmax(dim=-1)).topk(config.num_experts_per_tok)
    sum_T1 = kept("score_sum", top_TK.sum(dim=-1, keepdim=True))
    top_TK = kept("router_weights", kept("normalised_weights", top_TK / sum_T1))
    out_TH = torch.zeros(hidden_TH.shape)
    for expert in range(config.num_experts):
        token, slot = (ids_TK == expert).nonzero(as_tuple=True)
        gate, up = kept("gate_up", x_TH[token] @ weights.w13_LFH[expert].float().T).chunk(2, -1)
        h = kept("activation", kept("gate", silu(gate)) * up)
        y = kept("expert_output", h @ weights.w2_LHI[expert].float().T)
        term = kept("terms", top_TK[token, slot, None] * y)
        out_TH[token] = kept("combine", out_TH[token] + term)
    if weights.shared_w13_FH is not None and weights.shared_w2_HI is not None:
        gate, up = kept("shared_gate_up", x_TH @ weights.shared_w13_FH.float().T).chunk(2, -1)
        h = kept("activation", kept("gate", silu(gate)) * up)
        y = kept("shared_output", h @ weights.shared_w2_HI.float().T)
        out_TH = kept("reduced", out_TH) + y
    return out_TH.to(config.dtype)


def _storing(config: MoEConfig, weights: MoEWeights, points: tuple[str, ...]) -> PlainLayer:
    """A layer that stores, or keeps, these points unlike the contract that it declares."""
    stored = {*STORED} ^ {*points}
    contract = replace(storage_contract("undeclared", config.dtype), ties=Ties.ANY)
    return PlainLayer(lambda hidden_TH: answer(config, weights, hidden_TH, stored), contract)


def two_roundings(config: MoEConfig, weights: MoEWeights, _place: RankContext) -> PlainLayer:
    """Logits stored in the model's dtype though weights are not; gate and up kept in fp32."""
    return _storing(config, weights, ("logits", "gate_up"))


def mixtral_as_in_transformers(
    config: MoEConfig, weights: MoEWeights, _place: RankContext
) -> PlainLayer:
    """Everything that eager bf16 code stores."""
    return _storing(config, weights, ("logits", "router_weights", "gate", "terms", "combine"))


def summed_in_place(config: MoEConfig, weights: MoEWeights, _place: RankContext) -> PlainLayer:
    """A loop over experts that adds to a tensor of the model's dtype, and declares so."""
    narrow = FORMATS[config.dtype]
    stored = storage_contract("summed in place", config.dtype)
    contract = replace(stored, ties=Ties.ANY, terms=narrow, combine=narrow)
    points = (*STORED, "terms", "combine")
    return PlainLayer(lambda hidden_TH: answer(config, weights, hidden_TH, points), contract)


def _summed_narrow(share_TH: Tensor, place: RankContext) -> Tensor:
    if place.group is None:
        return share_TH
    narrow_TH = share_TH.bfloat16()
    dist.all_reduce(narrow_TH, group=place.group)
    return narrow_TH.float()


#: Ranks' shares, and every sum of them, in bf16, which the contract does not say.
narrow_wire = factory_of(Parts(reduce=_summed_narrow))


def narrow_router(config: MoEConfig, weights: MoEWeights, _place: RankContext) -> PlainLayer:
    """Softmax, top-k and division in the model's dtype, as gpt-fast's Mixtral does; undeclared."""
    return _storing(config, weights, NARROW_ROUTER)
