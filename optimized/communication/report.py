"""What a transport says about itself: which tier runs, why no better one, and what was launched."""

from collections.abc import Mapping, Set
from dataclasses import dataclass

from twinmoe.optimized.communication.eligibility import Refusal, Refusals, Tier
from twinmoe.optimized.launch import COUNTS


@dataclass(frozen=True)
class TransportReport:
    """Attestation of one transport, as of the moment it was asked for."""

    tier: Tier
    #: The tier as people call it: "nvls", "nvls (emulated)", "p2p", "nccl", "gloo".
    label: str
    rank: int
    world_size: int
    #: Higher tiers, and the ranks that refused them.
    refusals: Refusals
    #: Calls that a lower leaf served because of their shape.
    shape_refusals: Mapping[str, Refusal]
    #: Launches in this process by operation, such as "all_gather[p2p]"; all transports counted.
    launches: Mapping[str, int]
    #: Bytes of symmetric memory that this rank's pool holds.
    pool_bytes: int

    def __str__(self) -> str:
        lines = [f"transport {self.label}, rank {self.rank} of {self.world_size}"]
        for tier, by_rank in self.refusals.items():
            lines.append(f"  {tier.value} refused: {describe_refusals(by_rank)}")
        for call, refusal in self.shape_refusals.items():
            lines.append(f"  {call}: {refusal.value}, went peer-to-peer")
        counts = ", ".join(f"{name} x{count}" for name, count in self.launches.items())
        lines.append(f"  launches: {counts or 'none'}; pool: {self.pool_bytes} bytes")
        return "\n".join(lines)


def counts_of(names: Set[str]) -> dict[str, int]:
    """Return how often each of ``names`` was launched in this process, if it was."""
    return {name: COUNTS[name] for name in sorted(names & COUNTS.keys())}


def describe_refusals(by_rank: Mapping[int, Refusal]) -> str:
    """Give the reasons with their ranks, for example "rank 2: rendezvous_failed"."""
    ranks: dict[Refusal, list[str]] = {}
    for rank, refusal in sorted(by_rank.items()):
        ranks.setdefault(refusal, []).append(str(rank))
    return "; ".join(
        f"rank{'s' if len(of) > 1 else ''} {', '.join(of)}: {refusal.value}"
        for refusal, of in ranks.items()
    )
