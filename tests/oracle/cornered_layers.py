"""Layers that are right but in one corner: past a size, a range or a count, beside a NaN."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import count

import torch
from torch import Tensor

from tests.oracle.mistaken_layers import Parts, factory_of
from tests.oracle.plain_layers import right
from twinmoe.oracle import storage_contract
from twinmoe.oracle.plain_layer import LayerFactory, PlainLayer
from twinmoe.oracle.testing import neutral, runs
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.router import TopKRouter
from twinmoe.reference.weights import MoEWeights

#: (output, input) -> what is returned instead.
Spoil = Callable[[Tensor, Tensor], Tensor]


def _spoilt(spoil: Spoil) -> LayerFactory:
    """The readable twin, whose answer is spoilt."""

    def make(config: MoEConfig, weights: MoEWeights, place: RankContext) -> PlainLayer:
        layer = right(config, weights, place)

        def forward(hidden_TH: Tensor) -> object:
            out_TH, taps = layer.forward(hidden_TH)
            return spoil(out_TH, hidden_TH), taps

        return PlainLayer(forward, layer.contract)  # type: ignore[arg-type]

    return runs(lambda config: config)(make)


def _lost_after(rows: int) -> Spoil:
    return lambda out_TH, _: torch.cat([out_TH[:rows], torch.zeros_like(out_TH[rows:])])


sixty_four_rows = _spoilt(_lost_after(64))
a_hundred_rows = _spoilt(_lost_after(100))
one_row_wrong = _spoilt(lambda out_TH, _: out_TH * 2 if len(out_TH) == 1 else out_TH)
wrong_from_18_to_129 = _spoilt(lambda out_TH, _: out_TH * (1 + (18 <= len(out_TH) <= 129)))
wrong_from_256 = _spoilt(lambda out_TH, _: out_TH * (1 + (len(out_TH) >= 256)))
wrong_at_63 = _spoilt(lambda out_TH, _: out_TH * (1 + (len(out_TH) == 63)))
leaky = _spoilt(lambda out_TH, hidden_TH: out_TH + (0 * hidden_TH.sum()))


@runs(lambda config: config)
def tired(config: MoEConfig, weights: MoEWeights, place: RankContext) -> PlainLayer:
    """From its tenth call on, nothing."""
    layer, calls = right(config, weights, place), count(1)

    def forward(hidden_TH: Tensor) -> object:
        out_TH, taps = layer.forward(hidden_TH)
        return out_TH * (next(calls) < 10), taps

    return PlainLayer(forward, layer.contract)  # type: ignore[arg-type]


@runs(lambda config: config)
def coarse_bias(config: MoEConfig, weights: MoEWeights, place: RankContext) -> PlainLayer:
    """The correction bias in 16 bits, as ``model.to(dtype)`` leaves it."""
    bias_E = weights.correction_bias_E
    if bias_E is not None:
        weights = replace(weights, correction_bias_E=bias_E.bfloat16().float())
    return right(config, weights, place)


def _guessing(guess: Callable[[MoEConfig, MoEWeights], dict[str, Tensor]]) -> LayerFactory:
    """The readable twin, with weights as their shapes seemed to say."""

    def make(config: MoEConfig, weights: MoEWeights, place: RankContext) -> PlainLayer:
        return right(config, replace(weights, **guess(config, weights)), place)  # type: ignore[arg-type]

    return runs(lambda config: config)(make)


def _turned_if_square(name: str) -> Callable[[MoEConfig, MoEWeights], dict[str, Tensor]]:
    def guess(_config: MoEConfig, weights: MoEWeights) -> dict[str, Tensor]:
        tensor: Tensor = getattr(weights, name)
        square = tensor.shape[-1] == tensor.shape[-2]
        return {name: tensor.transpose(-1, -2).contiguous() if square else tensor}

    return guess


w2_guessed_by_shape = _guessing(_turned_if_square("w2_LHI"))
w13_guessed_by_shape = _guessing(_turned_if_square("w13_LFH"))
router_guessed_by_shape = _guessing(_turned_if_square("router_EH"))


@runs(lambda config: config)
def wrong_at_128_and_8(config: MoEConfig, weights: MoEWeights, place: RankContext) -> PlainLayer:
    """A table of tuned tiles whose one entry is wrong."""
    if (config.num_experts, config.num_experts_per_tok) == (128, 8):
        weights = replace(weights, w2_LHI=weights.w2_LHI * 2)
    return right(config, weights, place)


@runs(lambda config: config)
def one_warp_of_experts(config: MoEConfig, weights: MoEWeights, place: RankContext) -> PlainLayer:
    """For more rows than a tile of 16, no more experts in a group than a warp has lanes."""
    layer = right(config, weights, place)

    def forward(hidden_TH: Tensor) -> object:
        out_TH, taps = layer.forward(hidden_TH)
        fits = len(hidden_TH) <= 16 or config.num_experts <= 32 * config.n_group
        return out_TH * (1 if fits else 2), taps

    return PlainLayer(forward, layer.contract)  # type: ignore[arg-type]


def _eight_at_most(top: Tensor) -> Tensor:
    weights = top / top.sum(dim=-1, keepdim=True)
    return weights * (torch.arange(top.shape[1]) < 8)


def _within(capacity: Callable[[range, Tensor], int]) -> Callable[[range, Tensor], list[Tensor]]:
    """Where each expert was chosen, but for rows beyond its capacity."""

    def mine(own: range, ids: Tensor) -> list[Tensor]:
        masks = [ids == expert for expert in own]
        places = [mask.flatten().cumsum(0).view_as(mask) for mask in masks]
        most = capacity(own, ids)
        return [mask & (place <= most) for mask, place in zip(masks, places, strict=True)]

    return mine


capacity_64 = factory_of(Parts(mine=_within(lambda own, ids: 64)))
capacity_of_factor_2 = factory_of(
    Parts(mine=_within(lambda own, ids: max(8, math.ceil(2 * ids.numel() / len(own)))))
)
byte_ids = factory_of(Parts(mine=lambda own, ids: [ids.to(torch.uint8) == e for e in own]))
scan_of_512 = factory_of(Parts(mine=lambda own, ids: [(ids == e) & (ids < 512) for e in own]))
eight_experts = factory_of(Parts(weigh=_eight_at_most))
bare_softmax = factory_of(Parts(score=lambda z: z.exp() / z.exp().sum(dim=-1, keepdim=True)))


def _with_sigmoids(config: MoEConfig) -> MoEConfig:
    return replace(neutral(config), scoring_func="sigmoid")


large_epsilon = runs(_with_sigmoids)(
    factory_of(Parts(score=torch.sigmoid, weigh=lambda top: top / (top.sum(-1, True) + 1e-12)))
)


def uncleared_tiles(config: MoEConfig, weights: MoEWeights, _place: RankContext) -> PlainLayer:
    """A map from tiles of rows to experts, of which each call overwrites what it needs alone."""
    route, maps = TopKRouter(config, weights), dict[int, list[tuple[int, int]]]()

    def forward(hidden_TH: Tensor) -> Tensor:
        ids_TK, weights_TK = (routing := route(hidden_TH)).ids_TK, routing.weights_TK
        slots_S = ids_TK.flatten().argsort(stable=True)
        ends_E = ids_TK.flatten().bincount(minlength=config.num_experts).cumsum(0).tolist()
        firsts = [0, *ends_E[:-1]]
        tiles = [(e, firsts[e]) for e in range(config.num_experts) if ends_E[e] > firsts[e]]
        old = maps.get(len(ids_TK), [])
        maps[len(ids_TK)] = [*tiles, *old[len(tiles) :]]
        y_SH = torch.zeros(len(slots_S), config.hidden_size, dtype=config.dtype)
        for expert, first in maps[len(ids_TK)]:
            rows = slots_S[first : ends_E[expert]]
            x = hidden_TH[rows // config.num_experts_per_tok]
            gate, up = (x @ weights.w13_LFH[expert].T).float().chunk(2, dim=-1)
            h = (torch.nn.functional.silu(gate) * up).to(config.dtype)
            y_SH[rows] = h @ weights.w2_LHI[expert].T
        y_TKH = y_SH.view(*ids_TK.shape, -1).float()
        return (weights_TK[..., None] * y_TKH).sum(1).to(config.dtype)

    return PlainLayer(forward, storage_contract("tiles", config.dtype))
