"""One layer, written as an engineer would, and every mistake he may make in it, by a name.

All ranks gather all rows; each adds up what its own experts say; the sums meet in an all-reduce.

Legend: T tokens of this rank, N rows of all ranks, K experts per token, H hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from twinmoe.oracle import storage_contract
from twinmoe.oracle.contract import RoundingContract, Ties, Wire
from twinmoe.oracle.layer_space import neutral, runs
from twinmoe.oracle.plain_layer import LayerFactory, PlainLayer
from twinmoe.oracle.rounding import FP32
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights

#: Of the worlds in which ranks matter.
RANKS = 2


def _summed(share: Tensor, place: RankContext) -> Tensor:
    if place.group is not None:
        dist.all_reduce(share, group=place.group)
    return share


@dataclass(frozen=True)
class Parts:
    """What a mistake may replace.  Each has the right layer's part for a default."""

    #: gate, up -> h
    act: Callable[[Tensor, Tensor], Tensor] = lambda gate, up: F.silu(gate) * up
    #: logits -> scores
    score: Callable[[Tensor], Tensor] = lambda logits: logits.softmax(dim=-1)
    #: chosen scores -> weights
    weigh: Callable[[Tensor], Tensor] = lambda top: top / top.sum(dim=-1, keepdim=True)
    #: k -> how many experts are chosen
    count: Callable[[int], int] = lambda k: k
    #: the configured factor -> the one that is applied
    factor: Callable[[float], float] = lambda factor: factor
    #: experts of this rank, ids chosen [N, K] -> for each own expert, where it was chosen
    mine: Callable[[range, Tensor], list[Tensor]] = lambda own, ids: [ids == e for e in own]
    #: the rank's sum [N, H], place -> the sum of all ranks
    reduce: Callable[[Tensor, RankContext], Tensor] = _summed
    #: the shared expert's rows [T, H], place -> what is added of them
    shared: Callable[[Tensor, RankContext], Tensor] = lambda rows, place: rows
    #: the finished rows, in fp32
    end: Callable[[Tensor], Tensor] = lambda out: out


def _dropped(top: Tensor) -> Tensor:
    weights = top / top.sum(dim=-1, keepdim=True)
    weights[:, -1] = 0
    return weights


def _wrapped(own: range, ids: Tensor) -> list[Tensor]:
    return [ids % len(own) == local for local in range(len(own))]


def _in_turn(own: range, ids: Tensor) -> list[Tensor]:
    rank = own.start // len(own)
    return [ids == local * RANKS + rank for local in range(len(own))]


def _spoilt(out: Tensor) -> Tensor:
    out[:, ::7] += 0.125
    return out


#: By the beginning of the sentence that names it.
MISTAKES: dict[str, Parts] = {
    "GELU, as erf gives it": Parts(act=lambda gate, up: F.gelu(gate) * up),
    "GELU's tanh approximation": Parts(act=lambda gate, up: F.gelu(gate, approximate="tanh") * up),
    "ReLU": Parts(act=lambda gate, up: F.relu(gate) * up),
    "gate and up are swapped in all experts": Parts(act=lambda gate, up: gate * F.silu(up)),
    "only k - 1 experts are chosen": Parts(count=lambda k: k - 1),
    "the last of a token's k experts is dropped": Parts(weigh=_dropped),
    "scores are the sigmoid's": Parts(score=torch.sigmoid),
    "the chosen weights are not renormalised": Parts(weigh=lambda top: top),
    "softmax is taken twice": Parts(weigh=lambda top: top.softmax(dim=-1)),
    "routed_scaling_factor is missing": Parts(factor=lambda _: 1.0),
    "routed_scaling_factor is applied twice": Parts(factor=lambda factor: factor**2),
    "the shared expert is missing": Parts(shared=lambda rows, _: rows * 0),
    "routed_scaling_factor is applied to the shared expert": Parts(
        shared=lambda rows, _: rows * 2.5
    ),
}

#: Those that need several ranks.
OF_RANKS: dict[str, Parts] = {
    "each rank returns only what its own experts add": Parts(reduce=lambda share, _: share),
    "the first rank's ids are taken for every rank's own": Parts(
        mine=lambda own, ids: [ids == local for local in range(len(own))]
    ),
    "every rank computes every token's experts": Parts(mine=_wrapped),
    "experts are dealt to ranks in turn": Parts(mine=_in_turn),
    "the routed sum is added once by every rank": Parts(
        reduce=lambda share, place: _summed(share, place) * place.world_size
    ),
    "the shared expert is added once by every rank": Parts(
        shared=lambda rows, place: rows * place.world_size
    ),
}

#: Wrong in ways that have no name: nothing may be named.
NAMELESS: dict[str, Parts] = {
    "a constant is added to some columns": Parts(end=_spoilt),
    "rows are exchanged": Parts(end=lambda out: out.flip(0)),
    "weights are one percent too large": Parts(weigh=lambda top: 1.01 * top / top.sum(-1, True)),
    "the activation is missing": Parts(act=lambda gate, up: gate * up),
    "the last column is lost": Parts(end=lambda out: F.pad(out[:, :-1], (0, 1))),
    "the middle expert is lost": Parts(
        mine=lambda own, ids: [(ids == e) & (e != own[len(own) // 2]) for e in own]
    ),
}


def contract_of(config: MoEConfig, place: RankContext) -> RoundingContract:
    """Everything stored but the shares, which travel in fp32."""
    stored = replace(storage_contract("mine", config.dtype), ties=Ties.ANY)
    if place.group is None:
        return stored
    return replace(stored, partial=FP32, wire=Wire.PER_HOP, reduced=FP32)


def factory_of(parts: Parts) -> LayerFactory:
    """A factory of layers with these parts."""

    @runs(
        lambda config: neutral(
            config, reads=("routed_scaling_factor", "shared_expert_intermediate_size")
        )
    )
    def make(config: MoEConfig, weights: MoEWeights, place: RankContext) -> PlainLayer:
        def experts(rows: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
            gate, up = (rows @ w13.T).float().chunk(2, dim=-1)
            return (parts.act(gate, up).to(rows.dtype) @ w2.T).float()

        def forward(hidden_TH: Tensor) -> Tensor:
            rows, mine = gathered(hidden_TH, place)
            scores = parts.score(rows.float() @ weights.router_EH.float().T)
            top, ids = scores.topk(parts.count(config.num_experts_per_tok))
            top = parts.weigh(top) * parts.factor(config.routed_scaling_factor)
            share = torch.zeros(rows.shape)
            for local, chosen in enumerate(parts.mine(weights.experts, ids)):
                token, slot = chosen.nonzero(as_tuple=True)
                y = experts(rows[token], weights.w13_LFH[local], weights.w2_LHI[local])
                share.index_add_(0, token, top[token, slot, None] * y)
            out = parts.reduce(share, place)[mine]
            if weights.shared_w13_FH is not None and weights.shared_w2_HI is not None:
                y = experts(hidden_TH, weights.shared_w13_FH, weights.shared_w2_HI)
                out = out + parts.shared(y, place)
            return parts.end(out).to(hidden_TH.dtype)

        return PlainLayer(forward, contract_of(config, place))

    return make


def gathered(hidden_TH: Tensor, place: RankContext) -> tuple[Tensor, slice]:
    """All ranks' rows, and which of them are this rank's."""
    if place.group is None:
        return hidden_TH, slice(0, len(hidden_TH))
    counts = torch.empty(place.world_size, dtype=torch.int64)
    dist.all_gather_into_tensor(counts, torch.tensor([len(hidden_TH)]), group=place.group)
    padded = hidden_TH.new_zeros(int(counts.max()), hidden_TH.shape[1])
    padded[: len(hidden_TH)] = hidden_TH
    everyone = [torch.empty_like(padded) for _ in range(place.world_size)]
    dist.all_gather(everyone, padded, group=place.group)
    rows = torch.cat([part[:count] for part, count in zip(everyone, counts, strict=True)])
    start = int(counts[: place.rank].sum())
    return rows, slice(start, start + len(hidden_TH))


def name_of(sentence: str) -> str:
    """The attribute of this module that makes the layer with that mistake."""
    return "".join(letter if letter.isalnum() else "_" for letter in sentence)


def __getattr__(name: str) -> Any:
    for sentence, parts in (MISTAKES | OF_RANKS | NAMELESS | {"right": Parts()}).items():
        if name_of(sentence) == name:
            return factory_of(parts)
    raise AttributeError(name)
