"""One layer on one rank, with its weights, and what no forward may do to them or its input.

Legend: T tokens of this rank, H hidden_size.
"""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from twinmoe.oracle.bits import as_bits, same_bits
from twinmoe.oracle.observation import RankObservation
from twinmoe.oracle.scenario import Scenario
from twinmoe.oracle.side_effects import noticed
from twinmoe.oracle.subject import Call, Changeable, Guarded, Subject, SubjectFactory
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.placement import Placement
from twinmoe.reference.weights import MoEWeights


class LiveLayer:
    """A subject and the weights it was built with.

    A scenario of fewer ranks than the world has (a batch computed by one rank alone) is
    served by the first ranks.
    """

    def __init__(self, scenario: Scenario, context: RankContext, factory: SubjectFactory) -> None:
        self._scenario, self._context, self._factory = scenario, context, factory
        self._placement = Placement(scenario.config.num_experts, len(scenario.hidden()))
        self._hold(self._made(scenario.version))
        self._left: list[str] = []
        self.subject = self._built()

    def observe(self, hidden_TH: Tensor, call: Call) -> tuple[RankObservation, list[str]]:
        """Run one forward; say what it overwrote that was not its own to write."""
        hidden_TH = hidden_TH.to(self._context.device)
        before = hidden_TH.clone()
        complaints, self._left = self._left, []
        with noticed("the forward") as left:
            observation = self.subject.observe(hidden_TH, call)
        complaints += left
        if not same_bits(hidden_TH, before):
            complaints.append("the forward overwrote its input")
        if _digest(self._weights) != self._digest:
            complaints.append("the forward overwrote the layer's weights")
        if isinstance(self.subject, Guarded):
            complaints += self.subject.complaints()
        return observation, complaints

    def reload(self, version: int, *, from_file: bool) -> None:
        """Give the layer other weights, in place where it can, straight or through a checkpoint."""
        weights = self._loaded(version) if from_file else self._made(version)
        if isinstance(self.subject, Changeable):
            self.subject.reload(weights)
            self._digest = _digest(self._weights)
        else:
            self._hold(weights)
            self.subject = self._built()

    def _built(self) -> Subject:
        with noticed("building the layer") as left:
            subject = self._factory(self._scenario, self._weights, self._context)
        self._left += left
        return subject

    def _hold(self, weights: MoEWeights) -> None:
        self._weights, self._digest = weights, _digest(weights)

    def _made(self, version: int) -> MoEWeights:
        scenario = replace(self._scenario, version=version)
        return scenario.weights(self._placement.experts_of(self._context.rank)).to(
            self._context.device
        )

    def _loaded(self, version: int) -> MoEWeights:
        """Write a checkpoint on one rank; let each rank read its own experts from it."""
        context, config = self._context, self._scenario.config
        shared: list[str] = [""]
        if context.rank == 0:
            shared = [tempfile.mkdtemp(prefix="twinmoe-")]
            whole = replace(self._scenario, version=version).weights()
            whole.save(Path(shared[0]) / "layer.safetensors", config)
        if context.group is not None:
            dist.broadcast_object_list(shared, src=0, group=context.group)
        try:
            path = Path(shared[0]) / "layer.safetensors"
            weights = MoEWeights.load_for_rank(
                path, config, self._placement, context.rank, context.group
            )
            # Copies: tensors in a file lie at any offset, and a CPU's GEMM sums by alignment.
            copies = {name: tensor.clone() for name, tensor in weights.tensors().items()}
            return replace(weights, **copies).to(context.device)  # type: ignore[arg-type]
        finally:
            if context.rank == 0:
                shutil.rmtree(shared[0], ignore_errors=True)


def _digest(weights: MoEWeights) -> int:
    """Sum the weights' bits by rows and by columns: cheap, no copy, and a moved value shows."""
    digest = 0
    for tensor in weights.tensors().values():
        bits = as_bits(tensor)
        rows = bits.sum(dim=-1, dtype=torch.int64).flatten()
        columns = bits.flatten(0, -2).sum(dim=0, dtype=torch.int64) if bits.dim() > 1 else bits
        for sums in (rows, columns):
            digest += int((sums * torch.arange(1, sums.numel() + 1, device=sums.device)).sum())
    return digest
