"""Layers that somebody might bring, right and wrong in many ways, each by its name.

Legend: T tokens, H hidden_size, K experts per token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from twinmoe.oracle import Taps, storage_contract
from twinmoe.oracle.layer_space import neutral, runs
from twinmoe.oracle.plain_layer import PlainLayer
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.layer import MoELayer
from twinmoe.reference.router import TopKRouter
from twinmoe.reference.weights import MoEWeights

NOT_CALLABLE = 3


@runs(lambda config: config)
def right(config: MoEConfig, weights: MoEWeights, place: RankContext) -> PlainLayer:
    """The readable twin, which runs every layer on any number of ranks, with its experts shown."""
    layer = MoELayer(config, weights, place.group)

    def forward(hidden_TH: Tensor) -> tuple[Tensor, Taps]:
        return layer(hidden_TH), Taps(ids_TK=layer.router(hidden_TH).ids_TK)

    return PlainLayer(forward, storage_contract("right", config.dtype))


def silent(config: MoEConfig, weights: MoEWeights, place: RankContext) -> PlainLayer:
    """The same layer, which shows nothing but its output."""
    shown = right(config, weights, place)
    return PlainLayer(lambda hidden_TH: shown.forward(hidden_TH)[0], shown.contract)


def swapped(config: MoEConfig, weights: MoEWeights, place: RankContext) -> PlainLayer:
    """Gate and up exchanged."""
    gate, up = weights.w13_LFH.chunk(2, dim=1)
    return right(config, replace(weights, w13_LFH=torch.cat([up, gate], dim=1)), place)


@runs(lambda config: neutral(config, reads=("routed_scaling_factor",)))
def unscaled(config: MoEConfig, weights: MoEWeights, place: RankContext) -> PlainLayer:
    """A scaling factor that nobody applies."""
    return right(replace(config, routed_scaling_factor=1.0), weights, place)


def without_forward(_config: MoEConfig, _weights: MoEWeights, _place: RankContext) -> object:
    """Return what is no layer."""
    return object()


def without_contract(_config: MoEConfig, _weights: MoEWeights, _place: RankContext) -> object:
    """A module that declares nothing."""
    return torch.nn.Identity()


def wrong_return(config: MoEConfig, _weights: MoEWeights, _place: RankContext) -> PlainLayer:
    """A forward that returns None, as one forgets a return."""
    return PlainLayer(lambda _hidden_TH: None, storage_contract("none", config.dtype))


def wrong_shape(config: MoEConfig, _weights: MoEWeights, _place: RankContext) -> PlainLayer:
    """A forward that loses a column."""
    contract = storage_contract("narrow", config.dtype)
    return PlainLayer(lambda hidden_TH: hidden_TH[:, :-1], contract)


def fused(config: MoEConfig, weights: MoEWeights, _place: RankContext) -> PlainLayer:
    """One kernel's arithmetic: gate, up and expert outputs stay in fp32."""
    route = TopKRouter(config, weights)

    def forward(hidden_TH: Tensor) -> Tensor:
        routing = route(hidden_TH)
        out_TH = torch.zeros(hidden_TH.shape)
        for expert in range(config.num_experts):
            token, slot = (routing.ids_TK == expert).nonzero(as_tuple=True)
            gate, up = (hidden_TH[token].float() @ weights.w13_LFH[expert].float().T).chunk(2, 1)
            h = (torch.nn.functional.silu(gate) * up).to(config.dtype)
            y = h.float() @ weights.w2_LHI[expert].float().T
            out_TH[token] += routing.weights_TK[token, slot, None] * y
        return out_TH.to(config.dtype)

    return PlainLayer(forward, storage_contract("undeclared", config.dtype))


@runs(lambda config: config)
def raising(config: MoEConfig, _weights: MoEWeights, _place: RankContext) -> PlainLayer:
    """A forward that does not get through."""

    def forward(hidden_TH: Tensor) -> Tensor:
        return kernel(hidden_TH)

    return PlainLayer(forward, storage_contract("raising", config.dtype))


def kernel(_hidden_TH: Tensor) -> Tensor:
    """A launch that fails."""
    raise RuntimeError("no such kernel")


def raising_without_tokens(
    config: MoEConfig, weights: MoEWeights, place: RankContext
) -> PlainLayer:
    """A layer that is right, but for an empty batch."""
    inner = right(config, weights, place)

    def forward(hidden_TH: Tensor) -> object:
        if not len(hidden_TH):
            raise ValueError("no tokens")
        return inner.forward(hidden_TH)

    return PlainLayer(forward, inner.contract)  # type: ignore[arg-type]


def wrong_dtype(config: MoEConfig, _weights: MoEWeights, _place: RankContext) -> PlainLayer:
    """A forward that forgets the last cast."""
    return PlainLayer(lambda hidden_TH: hidden_TH.double(), storage_contract("wide", config.dtype))


def wrong_device(config: MoEConfig, _weights: MoEWeights, _place: RankContext) -> PlainLayer:
    """A forward that leaves its rank's device."""
    contract = storage_contract("elsewhere", config.dtype)
    return PlainLayer(lambda hidden_TH: hidden_TH.to("meta"), contract)


def wrong_taps(config: MoEConfig, _weights: MoEWeights, _place: RankContext) -> PlainLayer:
    """A forward that shows one expert for each token."""
    contract = storage_contract("tapped", config.dtype)
    return PlainLayer(lambda hidden_TH: (hidden_TH, Taps(ids_TK=torch.zeros(3, 1))), contract)


def wrong_layout(config: MoEConfig, _weights: MoEWeights, _place: RankContext) -> PlainLayer:
    """A forward whose answer has no rows in memory."""
    contract = storage_contract("sparse", config.dtype)
    return PlainLayer(lambda hidden_TH: hidden_TH.to_sparse(), contract)


def listed_taps(config: MoEConfig, _weights: MoEWeights, _place: RankContext) -> PlainLayer:
    """A forward that shows ids as a list."""
    contract, taps = storage_contract("listed", config.dtype), Taps(ids_TK=[[0, 1]] * 3)  # type: ignore[arg-type]
    return PlainLayer(lambda hidden_TH: (hidden_TH, taps), contract)


def scores_for_ids(config: MoEConfig, _weights: MoEWeights, _place: RankContext) -> PlainLayer:
    """A forward that shows scores where ids belong."""
    contract = storage_contract("scores", config.dtype)
    return PlainLayer(lambda x_TH: (x_TH, Taps(ids_TK=torch.rand(len(x_TH), 2))), contract)


@runs(lambda config: neutral(config, no_such_setting=1))
def wrong_runs(_config: MoEConfig, _weights: MoEWeights, _place: RankContext) -> object:
    """A declaration that fails on every config."""
    return None


@runs(lambda config: config)
def overwriting(config: MoEConfig, weights: MoEWeights, place: RankContext) -> PlainLayer:
    """One buffer for all answers of a size, as a graph's output is."""
    layer = right(config, weights, place)
    buffers: dict[int, Tensor] = {}

    def forward(hidden_TH: Tensor) -> tuple[Tensor, Taps]:
        out_TH, taps = layer.forward(hidden_TH)
        kept_TH = buffers.setdefault(len(out_TH), torch.empty_like(out_TH))
        return kept_TH.copy_(out_TH), taps

    return PlainLayer(forward, layer.contract)


def static_ids(config: MoEConfig, weights: MoEWeights, place: RankContext) -> PlainLayer:
    """One buffer for the ids of all forwards of a size, as a graph's are."""
    layer = right(config, weights, place)
    buffers: dict[int, Tensor] = {}

    def forward(hidden_TH: Tensor) -> tuple[Tensor, Taps]:
        out_TH, taps = layer.forward(hidden_TH)
        ids_TK = buffers.setdefault(len(out_TH), torch.empty_like(taps.ids_TK))
        return out_TH, Taps(ids_TK=ids_TK.copy_(taps.ids_TK))

    return PlainLayer(forward, layer.contract)


@runs(lambda config: config)
def narrow_bias(config: MoEConfig, weights: MoEWeights, place: RankContext) -> PlainLayer:
    """A correction bias that is kept in 16 bits, in a router that is else in fp32."""
    bias_E = weights.correction_bias_E
    kept_E = None if bias_E is None else bias_E.to(torch.bfloat16).float()
    return silent(config, replace(weights, correction_bias_E=kept_E), place)
