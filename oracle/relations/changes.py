"""Changes of a layer or its batch whose effect on the answer is known without any truth.

Legend: T tokens of one rank, H hidden_size, E experts, F rows of w13, I
moe_intermediate_size.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from twinmoe.oracle.scenario import Change
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights


def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _split_as(rows_TH: Tensor, hidden_by_rank: list[Tensor]) -> list[Tensor]:
    return [part.clone() for part in rows_TH.split([len(hidden) for hidden in hidden_by_rank])]


@dataclass(frozen=True)
class PermutedTokens(Change):
    """The tokens of all ranks change places, also between ranks; every rank keeps its count."""

    seed: int

    def hidden(self, hidden_by_rank: list[Tensor]) -> list[Tensor]:
        """Shuffle rows over all ranks."""
        rows_TH = torch.cat(hidden_by_rank)
        return _split_as(rows_TH[_order(len(rows_TH), self.seed)], hidden_by_rank)

    def undo(self, rows_TH: Tensor) -> Tensor:
        """Put rows back where they came from."""
        return torch.empty_like(rows_TH).index_copy_(0, _order(len(rows_TH), self.seed), rows_TH)


@dataclass(frozen=True)
class RelabelledExperts(Change):
    """Experts change their ids within and between groups' equals: router, bias and weights follow.

    Whole groups change places, and experts within their group, so that group-limited
    routing stays the same function.
    """

    seed: int

    def weights(self, config: MoEConfig, weights: MoEWeights) -> MoEWeights:
        """Permute all that is indexed by expert."""
        order = self._new_order(config)
        bias_E = weights.correction_bias_E
        return replace(
            weights,
            router_EH=weights.router_EH[order],
            correction_bias_E=None if bias_E is None else bias_E[order],
            w13_LFH=weights.w13_LFH[order],
            w2_LHI=weights.w2_LHI[order],
        )

    def _new_order(self, config: MoEConfig) -> Tensor:
        size = config.num_experts // config.n_group
        groups = _order(config.n_group, self.seed)
        within = [_order(size, self.seed + 1 + group) for group in range(config.n_group)]
        return torch.cat([group * size + within[group] for group in groups.tolist()])


@dataclass(frozen=True)
class ShiftedBias(Change):
    """Every correction bias grows by one power of two: the order of experts stays."""

    amount: float

    def weights(self, config: MoEConfig, weights: MoEWeights) -> MoEWeights:
        """Add to the selection bias."""
        if weights.correction_bias_E is None:
            return weights
        return replace(weights, correction_bias_E=weights.correction_bias_E + self.amount)


@dataclass(frozen=True)
class ScaledDown(Change):
    """The down-projection is multiplied by a power of two, and so is the routed sum, exactly."""

    factor: float

    def weights(self, config: MoEConfig, weights: MoEWeights) -> MoEWeights:
        """Scale w2 of every routed expert."""
        return replace(weights, w2_LHI=weights.w2_LHI * self.factor)


@dataclass(frozen=True)
class ScaledRouting(Change):
    """The routed scaling factor is multiplied by a power of two, and so is the routed sum."""

    factor: float

    def config(self, config: MoEConfig) -> MoEConfig:
        """Scale the factor."""
        scaled = config.routed_scaling_factor * self.factor
        return replace(config, routed_scaling_factor=scaled)


@dataclass(frozen=True)
class SilencedExperts(Change):
    """Routed experts answer zero: what is left is the shared expert, once."""

    def weights(self, config: MoEConfig, weights: MoEWeights) -> MoEWeights:
        """Zero w2 of every routed expert."""
        return replace(weights, w2_LHI=torch.zeros_like(weights.w2_LHI))


@dataclass(frozen=True)
class Tracers(Change):
    """Every expert answers its own small integers: each hit, miss or double hit is countable.

    One lane of the intermediate size carries the answer; the first matrix ignores the
    input by reading one channel that the batch holds at 1.
    """

    def weights(self, config: MoEConfig, weights: MoEWeights) -> MoEWeights:
        """Make expert e add e + 1 in column e % H, and 1 in the next one."""
        w13_EFH, w2_EHI = torch.zeros_like(weights.w13_LFH), torch.zeros_like(weights.w2_LHI)
        w13_EFH[:, 0, 0] = 1
        if config.gated:
            w13_EFH[:, config.moe_intermediate_size, 0] = 1
        hidden = w2_EHI.shape[1]
        for expert in range(config.num_experts):
            w2_EHI[expert, expert % hidden, 0] = expert % 64 + 1
            w2_EHI[expert, (expert + 1) % hidden, 0] += 1
        return replace(weights, w13_LFH=w13_EFH, w2_LHI=w2_EHI)

    def hidden(self, hidden_by_rank: list[Tensor]) -> list[Tensor]:
        """Hold the first channel at 1."""
        traced = [hidden.clone() for hidden in hidden_by_rank]
        for hidden_TH in traced:
            hidden_TH[:, 0] = 1
        return traced


@dataclass(frozen=True)
class PoisonedToken(Change):
    """One token, of all ranks, is NaN throughout."""

    seed: int

    def hidden(self, hidden_by_rank: list[Tensor]) -> list[Tensor]:
        """Overwrite one row."""
        rows_TH = torch.cat(hidden_by_rank)
        rows_TH[self.token(len(rows_TH))] = torch.nan
        return _split_as(rows_TH, hidden_by_rank)

    def token(self, count: int) -> int:
        """Which one of ``count``."""
        return self.seed % count


@dataclass(frozen=True)
class Alone(Change):
    """One rank has all experts and all tokens: expert parallelism of size 1."""

    def hidden(self, hidden_by_rank: list[Tensor]) -> list[Tensor]:
        """Put every batch on one rank, in rank order."""
        return [torch.cat(hidden_by_rank)]


@dataclass(frozen=True)
class OnOneRank(Change):
    """The last rank gets everybody's tokens; the others have none, and still take part."""

    def hidden(self, hidden_by_rank: list[Tensor]) -> list[Tensor]:
        """Move all rows to the last rank."""
        empty = [hidden[:0] for hidden in hidden_by_rank[:-1]]
        return [*empty, torch.cat(hidden_by_rank)]


@dataclass(frozen=True)
class Half(Change):
    """Every rank's first or second half of the batch; one token makes an empty half."""

    second: bool

    def hidden(self, hidden_by_rank: list[Tensor]) -> list[Tensor]:
        """Cut every batch."""
        middles = [len(hidden) // 2 for hidden in hidden_by_rank]
        return [
            hidden[middle:] if self.second else hidden[:middle]
            for hidden, middle in zip(hidden_by_rank, middles, strict=True)
        ]
