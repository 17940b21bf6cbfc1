"""Scenario: all that one forward is computed from, as a value that every process can rebuild.

The ranks build layers and batches from it, and the driver builds the truth from it, each
for itself.

Legend: T tokens of one rank, H hidden_size.
"""

from dataclasses import dataclass, field, replace
from functools import lru_cache

from torch import Tensor

from twinmoe.oracle.case import MAX_SEED, Case
from twinmoe.oracle.emulation.remember import RememberingTruth
from twinmoe.oracle.inputs import hidden_for, weights_for
from twinmoe.oracle.truth import Truth
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.placement import Placement
from twinmoe.reference.weights import MoEWeights

#: Elements of one expert matrix times experts: truths of larger layers are not kept.
_SMALL = 1 << 20


@dataclass(frozen=True)
class Change:
    """Another layer or batch, made from a case's own; this one changes nothing."""

    def config(self, config: MoEConfig) -> MoEConfig:
        """The layer's settings."""
        return config

    def weights(self, config: MoEConfig, weights: MoEWeights) -> MoEWeights:
        """The layer's weights, all experts; ``config`` is the case's own."""
        return weights

    def hidden(self, hidden_by_rank: list[Tensor]) -> list[Tensor]:
        """Each rank's batch [T, H]; as many entries as the changed layer has ranks."""
        return hidden_by_rank


@dataclass(frozen=True)
class Scenario:
    """One forward's inputs: version of the weights, number of the batch, and a change to both."""

    case: Case
    version: int = 0
    step: int = 0
    change: Change = field(default_factory=Change)

    @property
    def config(self) -> MoEConfig:
        """The layer's settings."""
        return self.change.config(self.case.config)

    def weights(self, experts: range | None = None) -> MoEWeights:
        """Weights of ``experts`` (None: all)."""
        case = self.case
        if self.version:
            case = replace(case, seed=(case.seed + 7919 * self.version) % MAX_SEED)
        if type(self.change) is Change:
            return weights_for(case, experts)
        changed = self.change.weights(case.config, weights_for(case))
        if experts is None:
            return changed
        size = self.config.num_experts // len(experts)
        return changed.shard(
            Placement(self.config.num_experts, size), experts.start // len(experts)
        )

    def hidden(self) -> list[Tensor]:
        """Every rank's batch, in rank order."""
        own = [hidden_for(self.case, rank, self.step) for rank in range(self.case.ep_size)]
        return self.change.hidden(own)

    def truth(self) -> Truth:
        """What the layer must answer; of a small layer, kept for whoever asks the same again."""
        config = self.config
        elements = config.num_experts * config.hidden_size * config.moe_intermediate_size
        if elements > _SMALL:
            return Truth(config, self.weights(), self.hidden())
        return _kept_truth(self)


@lru_cache(maxsize=8)
def _kept_truth(scenario: Scenario) -> Truth:
    return RememberingTruth(scenario.config, scenario.weights(), scenario.hidden())
