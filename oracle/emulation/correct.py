"""Correct implementations: every choice that a contract leaves open, made in turn."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from twinmoe.oracle.contract import RoundingContract
from twinmoe.oracle.contracts import eager_contract, graphed_contract
from twinmoe.oracle.emulation import activations, combine, gemm, routers
from twinmoe.oracle.emulation.combine import RankSum
from twinmoe.oracle.emulation.pipeline import Emulation
from twinmoe.reference.config import MoEConfig

#: Legal implementations of each step, the plainest first.
GEMMS: dict[str, gemm.Gemm] = {
    "sequential": gemm.sequential,
    "pairwise": gemm.pairwise,
    "blocked": gemm.blocked,
    "split-K 2": gemm.split_k(2),
    "split-K 4": gemm.split_k(4),
    "reverse": gemm.reverse,
    "permuted": gemm.permuted(seed=5),
}
ROUTES: dict[str, routers.Route] = {
    "divide": routers.score_then_select,
    "reciprocal": routers.reciprocal,
    "top-k then softmax": routers.select_then_score,
}
ACTIVATES: dict[str, activations.Activate] = {
    "direct": activations.direct,
    "exponential": activations.by_exponential,
    "gate last": activations.gate_last,
}
SLOT_SUMS: dict[str, combine.SlotSum] = {
    "in order": combine.in_order,
    "backwards": combine.backwards,
    "tree": combine.halves_first,
    "fma": combine.fused_multiply_add,
}

_ANY_ORDER: dict[str, RankSum] = {
    "rotated": combine.rotated,
    "reversed": combine.reversed_ranks,
    "tree": combine.rank_tree,
    "rank order": combine.rank_order,
}


@dataclass(frozen=True)
class Path:
    """A contract per layer, and the sums over ranks that it allows."""

    name: str
    contract: Callable[[MoEConfig], RoundingContract]
    rank_sums: dict[str, RankSum]


def _paths() -> dict[str, Path]:
    """Each dispatcher, wire and expert backend of the optimized twin."""
    sums = {"p2p": {"rank order": combine.rank_order}, "nvls": _ANY_ORDER, "gloo": _per_hop()}
    paths = []
    for backend in ("grouped_mm", "triton"):
        paths.append(_eager(backend))
        for tier, allowed in sums.items():
            paths += [_graphed(backend, tier, wide, allowed) for wide in (True, False)]
    return {path.name: path for path in paths}


def _per_hop() -> dict[str, RankSum]:
    return {"ring": combine.ring}


def _eager(backend: str) -> Path:
    return Path(
        f"alltoall {backend}",
        lambda config: eager_contract(config, backend),
        {"rank order": combine.rank_order},
    )


def _graphed(backend: str, tier: str, wide: bool, allowed: dict[str, RankSum]) -> Path:
    def contract(config: MoEConfig) -> RoundingContract:
        return graphed_contract(config, backend, tier, torch.float32 if wide else config.dtype)

    return Path(f"{tier} {backend} {'fp32' if wide else 'model'} wire", contract, allowed)


PATHS = _paths()


def draw(path: Path, generator: torch.Generator) -> Emulation:
    """A correct implementation of ``path``, every open choice made at random."""

    def one(options: dict[str, object]) -> object:
        names = list(options)
        return options[names[int(torch.randint(len(names), (), generator=generator))]]

    return Emulation(
        logits=one(GEMMS),
        route=one(ROUTES),
        gate_up=one(GEMMS),
        activate=one(ACTIVATES),
        down=one(GEMMS),
        sum_slots=one(SLOT_SUMS),
        sum_ranks=one(path.rank_sums),
    )
