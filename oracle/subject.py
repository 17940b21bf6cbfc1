"""Subject: the narrow protocol by which any layer is judged, and our two twins behind it.

Legend: T tokens of this rank, N padded rows, H hidden_size, R ranks.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from twinmoe.optimized import launch
from twinmoe.optimized.communication.eligibility import Tier
from twinmoe.optimized.graph import GraphRunner
from twinmoe.optimized.layer import MoELayer
from twinmoe.optimized.options import InferenceOptions
from twinmoe.oracle.case import Case
from twinmoe.oracle.contract import RoundingContract
from twinmoe.oracle.contracts import eager_contract, graphed_contract, reference_contract
from twinmoe.oracle.observation import RankObservation, Taps
from twinmoe.oracle.worker import RankContext
from twinmoe.reference import layer as reference_layer
from twinmoe.reference.weights import MoEWeights

#: Row counts per rank for which graphs are captured.
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

#: What each expert backend launches on the graphed path.
_KERNELS = {
    "grouped_mm": ("sort_slots", "expert_activation", "combine_slots"),
    "triton": ("sort_slots", "expert_gate_up", "expert_down", "combine_slots"),
}

_TIERS = {"nvls": Tier.NVLS, "p2p": Tier.P2P, "gloo": Tier.COLLECTIVE, "nccl": Tier.COLLECTIVE}


class Subject(Protocol):
    """A layer on one rank, ready to answer.

    ``contract`` is what it promises; ``observe`` runs one forward [T, H] -> [T, H] and
    shows what happened.  ``required`` names the kernels and collectives that a true account
    of that forward must have counted; no other gather or scatter may have run.
    """

    contract: RoundingContract

    @property
    def required(self) -> frozenset[str]:
        """Names as counted by :mod:`twinmoe.optimized.launch`."""
        ...

    def observe(self, hidden_TH: Tensor) -> RankObservation:
        """Run one forward."""
        ...


SubjectFactory = Callable[[Case, MoEWeights, RankContext], Subject]


class ReferenceSubject:
    """The readable twin."""

    required = frozenset[str]()

    def __init__(self, case: Case, weights: MoEWeights, context: RankContext) -> None:
        self.contract = reference_contract(case.config)
        self._layer = reference_layer.MoELayer(case.config, weights, context.group)

    def observe(self, hidden_TH: Tensor) -> RankObservation:
        """Run one forward; routing is tapped from the router's own call."""
        taps: dict[str, Tensor] = {}

        def keep(_module: object, _inputs: object, routing: object) -> None:
            taps["ids_TK"], taps["weights_TK"] = routing.ids_TK, routing.weights_TK  # type: ignore[attr-defined]

        hook = self._layer.router.register_forward_hook(keep)
        try:
            with torch.no_grad():
                output_TH = self._layer(hidden_TH)
        finally:
            hook.remove()
        return RankObservation(output_TH, Taps(**taps), "reference alltoall")


@dataclass
class _Run:
    """The state of one observation of the optimized twin."""

    output_TH: Tensor
    bucket: int | None = None
    replays: int = 0


class OptimizedSubject:
    """The fast twin, on the path that the case names."""

    def __init__(self, case: Case, weights: MoEWeights, context: RankContext) -> None:
        self.case = case
        wire = torch.float32 if case.wire == "fp32" else case.config.dtype
        options = InferenceOptions(
            transport=_TIERS.get(case.transport),
            experts_backend=case.backend,
            wire_dtype=wire,
            max_tokens_per_rank=_bucket(max(case.tokens)),
        )
        self.layer = MoELayer(case.config, weights, context.group, options)
        self.layer.taps = {}
        self.runner = GraphRunner(self.layer, (_bucket(max(case.tokens)),))
        backend = self.layer.experts.backend_name
        if case.transport == "alltoall":
            self.contract = eager_contract(case.config, backend)
        else:
            self.contract = graphed_contract(case.config, backend, case.transport, wire)

    @property
    def required(self) -> frozenset[str]:
        """What the last forward must have launched; alltoall dispatch has no kernel of its own.

        A shape too narrow for multicast goes peer to peer, and the transport says so.
        """
        if self.case.transport == "alltoall":
            return frozenset()
        report = self.layer.transport.report()
        names = set(_KERNELS[self.layer.experts.backend_name])
        for collective in ("all_gather", "reduce_scatter"):
            narrow = any(call.startswith(collective) for call in report.shape_refusals)
            names.add(f"{collective}[{Tier.P2P.value if narrow else report.label}]")
        return frozenset(names)

    def observe(self, hidden_TH: Tensor) -> RankObservation:
        """Run one forward and show every intermediate tensor."""
        before = launch.COUNTS.copy()
        run = self._run(hidden_TH)
        launches = Counter(launch.COUNTS)
        launches.subtract(before)
        return RankObservation(
            run.output_TH, self._taps(len(hidden_TH)), self._path(run), +launches
        )

    def _run(self, hidden_TH: Tensor) -> _Run:
        if self.case.transport == "alltoall":
            return _Run(self.layer(hidden_TH))
        bucket = _bucket(max(self.case.tokens))
        if self.case.mode == "eager":
            with self.layer.graphed():
                padded_NH, num_valid = self._padded(hidden_TH, bucket)
                return _Run(self.layer(padded_NH, num_valid)[: len(hidden_TH)], bucket)
        captured = self.runner.capture(bucket)
        if self.case.padding == "nan":
            captured.hidden_NH.fill_(torch.nan)
        output_TH = self.runner(hidden_TH, max_tokens=bucket)
        self.layer.taps = captured.taps
        return _Run(output_TH, bucket, captured.replays)

    def _padded(self, hidden_TH: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        filler = torch.nan if self.case.padding == "nan" else 1.0
        padded_NH = hidden_TH.new_full((rows, hidden_TH.shape[1]), filler)
        padded_NH[: len(hidden_TH)] = hidden_TH
        return padded_NH, torch.tensor([len(hidden_TH)], dtype=torch.int32, device=padded_NH.device)

    def _taps(self, tokens: int) -> Taps:
        seen = {name: tensor.clone() for name, tensor in (self.layer.taps or {}).items()}
        return Taps(
            ids_TK=seen["ids"][:tokens],
            weights_TK=seen["weights"][:tokens],
            gathered_hidden=seen.get("gathered_hidden"),
            gathered_ids=seen.get("gathered_ids"),
            gathered_weights=seen.get("gathered_weights"),
            expert_output_TKH=seen.get("expert_output"),
            partial=seen.get("partial"),
            routed_TH=seen["routed"][:tokens],
        )

    def _path(self, run: _Run) -> str:
        if run.bucket is None:
            return str(self.layer.path_report())
        with self.layer.graphed():
            words = f"{self.layer.path_report()}, bucket {run.bucket}"
        return f"{words}, replay {run.replays}" if run.replays else words


def _bucket(tokens: int) -> int:
    return next(bucket for bucket in BUCKETS if tokens <= bucket)


SUBJECTS: dict[str, SubjectFactory] = {
    "reference": ReferenceSubject,
    "optimized": OptimizedSubject,
}
