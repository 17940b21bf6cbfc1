"""Latencies of the optimized layer, stage by stage: in graph replay on GPUs.

Every figure stands beside the least time that its bytes need, and beside the other ways
to do the same work in the same run: a ratio within one run is worth more than any
microsecond.  On a CPU the same code runs without graphs, to be tested; its figures mean
nothing.

Legend: N tokens of a rank, R ranks, H hidden_size, K experts per token, L local experts.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor

from twinmoe.optimized.communication.eligibility import Tier
from twinmoe.optimized.communication.order import Collective
from twinmoe.optimized.communication.pool_setup import release_pools
from twinmoe.optimized.communication.symmetric_transport import SymmetricTransport
from twinmoe.optimized.experts import backend_report
from twinmoe.optimized.experts.flashinfer import FlashInferBackend
from twinmoe.optimized.layer import MoELayer
from twinmoe.optimized.options import InferenceOptions
from twinmoe.optimized.router import Routing
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.placement import Placement
from twinmoe.reference.router import TopKRouter
from twinmoe.reference.weights import MoEWeights

#: What the floors assume: bytes per second of an H200's memory, as measured by a copy, and of
#: its NVLink, one direction, by the datasheet.
MEMORY_RATE, LINK_RATE = 4.3e12, 450e9

#: Calls in one graph.  Each has inputs of its own, so that caches hold what they would in use.
CALLS = 16

#: Weights are laid out several times until they exceed this, several times a GPU's L2.
COLD_BYTES = 600e6


@dataclass(frozen=True)
class Request:
    """One model at one size; all ranks get the same."""

    model: str
    config: MoEConfig
    tokens: int
    backends: tuple[str, ...] = ()
    replays: int = 20
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One measurement: microseconds, and the floor of its bytes."""

    model: str
    gpus: int
    tokens: int
    stage: str
    path: str
    us: float
    floor_us: float


def measure(context: RankContext, request: Request) -> list[Row]:
    """All stages of one request on this rank; a collective over the world."""
    release_pools(context.group)
    bench = _Bench(context, request)
    with torch.no_grad():
        rows = [*bench.routers(), *bench.collectives(), *bench.experts(), *bench.layers()]
    release_pools(context.group)
    return rows


def slowest(by_rank: Sequence[Sequence[Row]]) -> list[Row]:
    """Each measurement as the slowest rank saw it: a layer is done when all ranks are."""
    return [max(rows, key=lambda row: row.us) for rows in zip(*by_rank, strict=True)]


class _Bench:
    """The layers, inputs and clock of one rank."""

    def __init__(self, context: RankContext, request: Request) -> None:
        self.context, self.request, self.config = context, request, request.config
        placement = Placement(self.config.num_experts, context.world_size)
        self.owned = placement.experts_of(context.rank)
        expert_bytes = sum(t[0].numel() for t in self._expert_shapes()) * self.config.dtype.itemsize
        self.expert_bytes = expert_bytes
        on_gpu = context.device.type == "cuda"
        copies = min(8, math.ceil(COLD_BYTES / (expert_bytes * len(self.owned)))) if on_gpu else 1
        self.calls = CALLS if on_gpu else 1
        self.weights = [self._weights(copy) for copy in range(copies)]
        self.hidden = [self._hidden(call) for call in range(self.calls)]
        self.num_valid = torch.tensor([request.tokens], dtype=torch.int32, device=context.device)
        known = backend_report(self.config, context.device)
        usable = tuple(name for name, reason in known.items() if reason is None)
        self.backends = request.backends or usable
        collective = _tier_label(context)
        self.tiers = {"p2p": Tier.P2P, collective: Tier.COLLECTIVE}
        self._layers: dict[tuple[str, str], list[MoELayer]] = {}

    # --- stages -----------------------------------------------------------------------

    def routers(self) -> list[Row]:
        """The fused router, and the reference's in PyTorch operations."""
        layer = self._layer("p2p", self.backends[0])[0]
        torch_router = TopKRouter(self.config, self.weights[0])
        width = self.config.dtype.itemsize
        read = (self.config.num_experts + self.request.tokens) * self.config.hidden_size * width
        floor = read / MEMORY_RATE
        fused = [partial(layer.router, x, None) for x in self.hidden]
        plain = [partial(torch_router, x) for x in self.hidden]
        return [
            self._row("router", "fused", fused, floor),
            self._row("router", "torch", plain, floor),
        ]

    def collectives(self) -> list[Row]:
        """Both collectives, on every tier; a group of one has none."""
        if self.context.world_size == 1:
            return []
        rows = []
        for name in self.tiers:
            layer = self._layer(name, self.backends[0])[0]
            routings = [layer.router(x, None) for x in self.hidden]
            peers, tokens = self.context.world_size - 1, self.request.tokens
            sent = tokens * (self.config.hidden_size * self.config.dtype.itemsize)
            sent += tokens * 8 * self.config.num_experts_per_tok
            gathers = [
                partial(_gather, layer, x, r) for x, r in zip(self.hidden, routings, strict=True)
            ]
            rows.append(self._row("all-gather", name, gathers, peers * sent / LINK_RATE))
            summed = tokens * self.config.hidden_size * layer.options.wire_dtype.itemsize
            scatters = [partial(_scatter, layer, tokens * (peers + 1))] * self.calls
            rows.append(self._row("reduce-scatter", name, scatters, peers * summed / LINK_RATE))
        return rows

    def experts(self) -> list[Row]:
        """Every backend on all ranks' rows, index building and weighted sum included."""
        calls, active = self._expert_calls()
        mine = sum(by_rank[self.context.rank] for by_rank in active)
        floor = self.expert_bytes * mine / len(active) / MEMORY_RATE
        rows = []
        for backend in self.backends:
            layers = self._layer("p2p", backend)
            out = torch.empty_like(calls[0][0], dtype=self._wire(backend))
            bodies = [
                partial(layers[i % len(layers)].experts.forward, x, ids, weights, out)
                for i, (x, ids, weights) in enumerate(calls)
            ]
            rows.append(self._row("experts", backend, bodies, floor))
        return rows

    def layers(self) -> list[Row]:
        """The whole graphed path, for every tier and backend; every call waits for all ranks."""
        _, active = self._expert_calls()
        busiest = [max(by_rank) for by_rank in active]
        shared = self.weights[0].shared_w13_FH, self.weights[0].shared_w2_HI
        read = self.expert_bytes * sum(busiest) / len(busiest)
        read += sum(t.numel() * t.element_size() for t in shared if t is not None)
        rows = []
        for tier in self.tiers if self.context.world_size > 1 else ("p2p",):
            for backend in self.backends:
                layers = self._layer(tier, backend)
                bodies = [
                    partial(_forward, layers[i % len(layers)], x, self.num_valid)
                    for i, x in enumerate(self.hidden)
                ]
                rows.append(self._row("layer", f"{tier} + {backend}", bodies, read / MEMORY_RATE))
        return rows

    # --- inputs -----------------------------------------------------------------------

    def _expert_shapes(self) -> tuple[Tensor, Tensor]:
        config = self.config
        w13 = torch.empty(1, config.w13_rows, config.hidden_size, device="meta")
        return w13, torch.empty(1, config.hidden_size, config.moe_intermediate_size, device="meta")

    def _weights(self, copy: int) -> MoEWeights:
        """This rank's shard, drawn on its device; replicated parts alike on all ranks."""
        config, device = self.config, self.context.device
        shared = torch.Generator(device).manual_seed(self.request.seed + 1000 * copy)
        own = torch.Generator(device).manual_seed(
            self.request.seed + 1000 * copy + 1 + self.context.rank
        )

        def normal(generator: torch.Generator, *shape: int) -> Tensor:
            values = torch.empty(shape, dtype=config.dtype, device=device)
            return values.normal_(std=shape[-1] ** -0.5, generator=generator)

        H, local = config.hidden_size, len(self.owned)
        size, rows_per_unit = config.shared_expert_intermediate_size, 1 + config.gated
        bias_E = None
        if config.use_correction_bias:
            bias_E = torch.empty(config.num_experts, device=device)
            bias_E.normal_(std=0.01, generator=shared)
        return MoEWeights(
            router_EH=normal(shared, config.num_experts, H),
            correction_bias_E=bias_E,
            shared_w13_FH=normal(shared, rows_per_unit * size, H) if size else None,
            shared_w2_HI=normal(shared, H, size) if size else None,
            shared_gate_1H=normal(shared, 1, H) if config.shared_expert_gate else None,
            w13_LFH=normal(own, local, config.w13_rows, H),
            w2_LHI=normal(own, local, H, config.moe_intermediate_size),
            experts=self.owned,
        )

    def _hidden(self, call: int) -> Tensor:
        seed = self.request.seed + 7919 * (call + 1) + self.context.rank
        generator = torch.Generator(self.context.device).manual_seed(seed)
        shape = self.request.tokens, self.config.hidden_size
        values = torch.empty(shape, dtype=self.config.dtype, device=self.context.device)
        return values.normal_(generator=generator)

    def _expert_calls(self) -> tuple[list[tuple[Tensor, ...]], list[list[int]]]:
        """Arguments of the experts for each call, and how many experts of each rank it wakes."""
        layer = self._layer(next(iter(self.tiers)), self.backends[0])[0]
        calls: list[tuple[Tensor, ...]] = []
        active = []
        for x_NH in self.hidden:
            gathered = layer.dispatcher.token_dispatch(x_NH, layer.router(x_NH, None))
            ids = gathered.ids.clone()
            owners = ids.unique() // len(self.owned)
            active.append(torch.bincount(owners, minlength=self.context.world_size).tolist())
            calls.append((gathered.hidden.clone(), ids, gathered.weights.clone()))
        return calls, active

    def _wire(self, backend: str) -> torch.dtype:
        """A backend that rounds its share to the model's dtype has nothing more to send."""
        return self.config.dtype if backend == FlashInferBackend.name else torch.float32

    def _layer(self, tier: str, backend: str) -> list[MoELayer]:
        """One layer per copy of the weights, made once."""
        key = tier, backend
        if key not in self._layers:
            options = InferenceOptions(
                transport=self.tiers[tier],
                experts_backend=backend,
                wire_dtype=self._wire(backend),
                max_tokens_per_rank=self.request.tokens,
            )
            self._layers[key] = [
                MoELayer(self.config, weights, self.context.group, options)
                for weights in self.weights
            ]
        return self._layers[key]

    def _row(
        self, stage: str, path: str, bodies: Sequence[Callable[[], object]], floor: float
    ) -> Row:
        seconds = _seconds(self.context, bodies, self.request.replays) / len(bodies)
        request = self.request
        gpus = self.context.world_size
        return Row(request.model, gpus, request.tokens, stage, path, 1e6 * seconds, 1e6 * floor)


def _tier_label(context: RankContext) -> str:
    return "nccl" if context.device.type == "cuda" else "gloo"


def _forward(layer: MoELayer, x_NH: Tensor, num_valid: Tensor) -> Tensor:
    with layer.graphed():
        result: Tensor = layer(x_NH, num_valid)
    return result


def _gather(layer: MoELayer, x_NH: Tensor, routing: Routing) -> None:
    _alone(layer, Collective.REDUCE_SCATTER)
    layer.dispatcher.token_dispatch(x_NH, routing)


def _scatter(layer: MoELayer, rows: int) -> None:
    _alone(layer, Collective.ALL_GATHER)
    transport = layer.transport
    partials = transport.partial_buffer(rows, layer.config.hidden_size, layer.options.wire_dtype)
    transport.reduce_scatter(partials)


def _alone(layer: MoELayer, pretended: Collective) -> None:
    """Repeat a collective without the barrier that a repetition needs: only time is looked at."""
    if isinstance(layer.transport, SymmetricTransport):
        layer.transport._pool.order.record(pretended)


def _seconds(context: RankContext, bodies: Sequence[Callable[[], object]], replays: int) -> float:
    """Median seconds of running all bodies once."""
    if context.device.type != "cuda":
        return median(_clock(bodies) for _ in range(3))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for body in bodies:
            body()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for body in bodies:
            body()
    graph.replay()
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    millis: float = median(a.elapsed_time(b) for a, b in pairwise(events))
    return millis / 1e3


def _clock(bodies: Sequence[Callable[[], object]]) -> float:
    start = time.perf_counter()
    for body in bodies:
        body()
    return time.perf_counter() - start
