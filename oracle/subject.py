"""Subject: the narrow protocol by which any layer is judged, and our two twins behind it.

Legend: T tokens of this rank, N padded rows, H hidden_size, R ranks.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from twinmoe.optimized import launch
from twinmoe.optimized.communication.eligibility import Tier
from twinmoe.optimized.communication.packing import MIN_MULTICAST_LANE_BYTES, pack
from twinmoe.optimized.communication.pool_setup import pools_of
from twinmoe.optimized.graph import GraphRunner
from twinmoe.optimized.layer import MoELayer
from twinmoe.optimized.options import InferenceOptions
from twinmoe.oracle.contract import RoundingContract
from twinmoe.oracle.contracts import eager_contract, graphed_contract, reference_contract
from twinmoe.oracle.expected_transport import SetupWatch, unexpected_backend, unexpected_transport
from twinmoe.oracle.history import Step
from twinmoe.oracle.inputs import largest_batch
from twinmoe.oracle.observation import RankObservation, Taps
from twinmoe.oracle.scenario import Scenario
from twinmoe.oracle.worker import RankContext
from twinmoe.reference import layer as reference_layer
from twinmoe.reference.weights import MoEWeights

#: Row counts per rank for which graphs are captured.
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

#: What each expert backend launches on the graphed path.
_KERNELS = {
    "grouped_mm": ("sort_slots", "expert_activation", "combine_slots"),
    "triton": ("sort_slots", "expert_gate_up", "expert_down", "combine_slots"),
    "flashinfer": ("cutlass_fused_moe",),
}

_TIERS = {"nvls": Tier.NVLS, "p2p": Tier.P2P, "gloo": Tier.COLLECTIVE, "nccl": Tier.COLLECTIVE}

#: How contracts call the tiers that transports report.
_TIER_OF_LABEL = {"nvls (emulated)": "nvls", "local": "gloo"}


@dataclass(frozen=True)
class Call:
    """How one forward is to run.

    ``path``: "alltoall", "graphed" (the same kernels without a graph) or "captured".
    ``max_tokens`` is the largest batch of all ranks; ``filler`` what padding rows hold,
    None for old data.  ``is_last``: no rank goes on before this forward's padded buffers
    have been looked at; before that, a faster rank may be writing the next batch there.
    ``tokens`` are the batches of all ranks; ``poisoned``: new memory is filled with NaN.
    """

    path: str
    max_tokens: int
    filler: float | None = None
    is_last: bool = True
    tokens: tuple[int, ...] = ()
    poisoned: bool = False


class Subject(Protocol):
    """A layer on one rank, ready to answer.

    Built on all ranks from a scenario, this rank's shard of its weights and the rank's
    context.  ``observe`` runs one forward [T, H] -> [T, H] and shows what happened.
    """

    def contract(self, call: Call) -> RoundingContract:
        """What the layer promises for such a call."""
        ...

    def required(self, call: Call) -> frozenset[str]:
        """Name the kernels and collectives that such a call, truly told, must have counted.

        As in :mod:`twinmoe.optimized.launch`; no other gather or scatter may have run.
        """
        ...

    def observe(self, hidden_TH: Tensor, call: Call) -> RankObservation:
        """Run one forward."""
        ...


@runtime_checkable
class Guarded(Protocol):
    """A subject that notices by itself what no forward may do."""

    def complaints(self) -> list[str]:
        """Say what it has caught since it was asked last."""
        ...


@runtime_checkable
class Changeable(Guarded, Protocol):
    """A subject whose state can be changed between forwards, as histories do."""

    def reload(self, weights: MoEWeights) -> None:
        """Overwrite the weights in place."""
        ...

    def set_kill_switch(self, disabled: bool) -> None:
        """Turn the symmetric-memory kernels off or on; collective."""
        ...

    def poison(self) -> None:
        """Fill with NaN every static buffer whose content may not matter; between barriers."""
        ...


SubjectFactory = Callable[[Scenario, MoEWeights, RankContext], Subject]


class ReferenceSubject:
    """The readable twin."""

    def __init__(self, scenario: Scenario, weights: MoEWeights, context: RankContext) -> None:
        self._config = scenario.config
        group = context.group if len(scenario.hidden()) > 1 else None
        self._layer = reference_layer.MoELayer(scenario.config, weights, group)

    def contract(self, _call: Call) -> RoundingContract:
        """One contract, whatever the call asks for: there is one path."""
        return reference_contract(self._config)

    def required(self, _call: Call) -> frozenset[str]:
        """No launch of ours."""
        return frozenset()

    def observe(self, hidden_TH: Tensor, _call: Call) -> RankObservation:
        """Run one forward; the router and the experts are tapped at their own calls."""
        taps: dict[str, Tensor] = {}

        def keep(_module: object, _inputs: object, routing: object) -> None:
            taps["ids_TK"], taps["weights_TK"] = routing.ids_TK, routing.weights_TK  # type: ignore[attr-defined]

        def receive(_module: object, received: tuple[Tensor, Tensor]) -> None:
            taps["received_hidden"], taps["received_ids"] = received

        hooks = [
            self._layer.router.register_forward_hook(keep),
            self._layer.experts.register_forward_pre_hook(receive),
        ]
        try:
            with torch.no_grad():
                output_TH = self._layer(hidden_TH)
        finally:
            for hook in hooks:
                hook.remove()
        return RankObservation(output_TH, Taps(**taps), "reference alltoall")


@dataclass
class _Run:
    """The state of one observation of the optimized twin."""

    output_TH: Tensor
    bucket: int | None = None
    replays: int = 0


class OptimizedSubject:
    """The fast twin, on the transport that the case names."""

    def __init__(self, scenario: Scenario, weights: MoEWeights, context: RankContext) -> None:
        self.case, self.config, self.weights = scenario.case, scenario.config, weights
        hidden_by_rank = scenario.hidden()
        largest = bucket_for(max(largest_batch(scenario.case), *map(len, hidden_by_rank)))
        self._wire = torch.float32 if self.case.wire == "fp32" else self.config.dtype
        group = context.group if len(hidden_by_rank) > 1 else None
        options, self._setups = self.options(largest), SetupWatch()
        self._killed = options.disable_triton_nvls_kernels
        self._setups.turn(self._killed)
        built = replace(options, transport=None) if self._killed else options
        self.layer = MoELayer(self.config, weights, group, built)
        self.layer.options = options  # which tier is forced once the switch is off
        self.layer.taps = {}
        self.runner = GraphRunner(self.layer, tuple(size for size in BUCKETS if size <= largest))

    def options(self, max_tokens_per_rank: int) -> InferenceOptions:
        """How the layer is built: with the switch on, where the history begins with it."""
        return InferenceOptions(
            transport=_TIERS.get(self.case.transport),
            disable_triton_nvls_kernels=self.case.steps()[0] == Step("k", 1),
            experts_backend=self.case.backend,
            wire_dtype=self._wire,
            max_tokens_per_rank=max_tokens_per_rank,
        )

    def contract(self, call: Call) -> RoundingContract:
        """The contract of the path, the backend and the transport as it stands."""
        backend = self.layer.experts.backend_name
        if call.path == "alltoall":
            return eager_contract(self.config, backend, self.layer.device.type)
        tier = self.case.transport
        if self._killed or tier == "alltoall":
            tier = self.layer.transport.report().label
        tier = _TIER_OF_LABEL.get(tier, tier)
        device_type = self.layer.device.type
        return graphed_contract(self.config, backend, tier, self._wire, device_type)

    def required(self, call: Call) -> frozenset[str]:
        """See `Subject`; payloads too narrow for multicast, and no others, go peer to peer."""
        if call.path == "alltoall":
            return frozenset()
        report = self.layer.transport.report()
        names = set(_KERNELS[self.layer.experts.backend_name])
        rows, config = bucket_for(call.max_tokens), self.config
        routed, hidden = 4 * rows * config.num_experts_per_tok, rows * config.hidden_size
        payloads = {
            "all_gather": [routed, routed, hidden * config.dtype.itemsize],
            "reduce_scatter": [hidden * self._wire.itemsize],
        }
        for collective, num_bytes in payloads.items():
            narrow = report.tier is Tier.NVLS and not _fits_multicast(num_bytes)
            names.add(f"{collective}[{Tier.P2P.value if narrow else report.label}]")
        return frozenset(names)

    def observe(self, hidden_TH: Tensor, call: Call) -> RankObservation:
        """Run one forward and show every intermediate tensor that is still this batch's."""
        before = launch.COUNTS.copy()
        run = self._run(hidden_TH, call)
        launches = Counter(launch.COUNTS)
        launches.subtract(before)
        taps = self._taps(len(hidden_TH), call.is_last)
        return RankObservation(run.output_TH, taps, self._path(run), +launches)

    # --- what histories change ----------------------------------------------------------

    def reload(self, weights: MoEWeights) -> None:
        """See `Changeable`."""
        self.layer.reload(weights)

    def set_kill_switch(self, disabled: bool) -> None:
        """See `Changeable`."""
        self._setups.turn(disabled)
        self.layer.set_kill_switch(disabled)
        self._killed = disabled

    def poison(self) -> None:
        """See `Changeable`."""
        for static in self.runner.static_tensors():
            spoil(static)
        for pool in pools_of(self.layer.group):
            pool.poison()

    def complaints(self) -> list[str]:
        """See `Guarded`."""
        told = [self._setups.told(), self.unexpected()]
        told += [
            f"bytes between the regions of pool {pool.name!r} were written: a store went astray"
            for pool in pools_of(self.layer.group)
            if pool.trespassed()
        ]
        return [text for text in told if text]

    def unexpected(self) -> str:
        """Say that another transport or backend stands ready than the case asks for."""
        report, device = self.layer.transport.report(), self.layer.device
        return unexpected_backend(
            self.case.backend, self.layer.experts.backend_name
        ) or unexpected_transport(_TIERS.get(self.case.transport), self._killed, report, device)

    # --- one forward --------------------------------------------------------------------

    def _run(self, hidden_TH: Tensor, call: Call) -> _Run:
        if call.path == "alltoall":
            self.layer.taps = {}
            return _Run(self.layer(hidden_TH))
        bucket = bucket_for(call.max_tokens)
        if call.path == "graphed":
            self.layer.taps = {}
            with self.layer.graphed():
                padded_NH, num_valid = self._padded(hidden_TH, bucket, call.filler)
                return _Run(self.layer(padded_NH, num_valid)[: len(hidden_TH)], bucket)
        self.layer.taps = {}  # of its own: a captured graph keeps the tensors that it saw
        captured = self.runner.capture(bucket)
        if call.filler is not None:
            captured.hidden_NH.fill_(call.filler)
        output_TH = self.runner(hidden_TH, max_tokens=bucket)
        self.layer.taps = captured.taps
        return _Run(output_TH, bucket, captured.replays)

    def _padded(self, hidden_TH: Tensor, rows: int, filler: float | None) -> tuple[Tensor, Tensor]:
        padded_NH = hidden_TH.new_full(
            (rows, hidden_TH.shape[1]), 1.0 if filler is None else filler
        )
        padded_NH[: len(hidden_TH)] = hidden_TH
        return padded_NH, torch.tensor([len(hidden_TH)], dtype=torch.int32, device=padded_NH.device)

    def _taps(self, tokens: int, is_last: bool) -> Taps:
        seen = {
            name: tensor.clone()
            for name, tensor in (self.layer.taps or {}).items()
            if is_last or name not in _OVERWRITTEN
        }
        return Taps(
            ids_TK=seen["ids"][:tokens],
            weights_TK=seen["weights"][:tokens],
            gathered_hidden=seen.get("gathered_hidden"),
            gathered_ids=seen.get("gathered_ids"),
            gathered_weights=seen.get("gathered_weights"),
            expert_output_TKH=seen.get("expert_output"),
            partial=seen.get("partial"),
            routed_TH=seen["routed"][:tokens],
            routed_ids=seen["ids"],
            routed_weights=seen["weights"],
            sent_TKH=seen.get("sent"),
            received_hidden=seen.get("received_hidden"),
            received_ids=seen.get("received_ids"),
        )

    def _path(self, run: _Run) -> str:
        if run.bucket is None:
            return str(self.layer.path_report())
        with self.layer.graphed():
            words = f"{self.layer.path_report()}, bucket {run.bucket}"
        return f"{words}, replay {run.replays}" if run.replays else words


#: Taps that lie in symmetric memory, where a faster rank may be at the next batch.
_OVERWRITTEN = ("gathered_hidden", "gathered_ids", "gathered_weights", "partial")


def bucket_for(tokens: int) -> int:
    """The smallest of :data:`BUCKETS` that holds ``tokens`` rows."""
    return next(bucket for bucket in BUCKETS if tokens <= bucket)


def _fits_multicast(num_bytes: list[int]) -> bool:
    """Whether every tensor of a collective is cut into lanes as wide as multicast needs."""
    slots, _ = pack(num_bytes, 1)
    return all(slot.lane_bytes >= MIN_MULTICAST_LANE_BYTES for slot in slots)


def spoil(tensor: Tensor) -> None:
    """Fill with NaN, or with a number that no index is."""
    tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)


SUBJECTS: dict[str, SubjectFactory] = {
    "reference": ReferenceSubject,
    "optimized": OptimizedSubject,
}
