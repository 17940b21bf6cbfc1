"""Correct implementations: every choice that a contract leaves open, made in turn."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from twinmoe.oracle.contract import RoundingContract
from twinmoe.oracle.contracts import eager_contract, graphed_contract
from twinmoe.oracle.emulation import activations, casts, combine, gemm, routers
from twinmoe.oracle.emulation.pipeline import Emulation
from twinmoe.oracle.quantise import Quantiser
from twinmoe.oracle.rounding import E4M3, FP32, TENSOR_CORE, Format
from twinmoe.reference.config import MoEConfig

Choice = TypeVar("Choice")

#: Orders in which fp32 sums to nearest may be made, the plainest first.
GEMMS: dict[str, gemm.Gemm] = {
    "sequential": gemm.sequential,
    "pairwise": gemm.pairwise,
    "blocks of 16": gemm.blocked,
    "split-K 2": gemm.split_k(2),
    "split-K 4": gemm.split_k(4),
    "reversed": gemm.reverse,
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
    "fused multiply-add": combine.fused_multiply_add,
}
QUANTISES: dict[str, casts.Quantise] = {
    "divided": casts.divided,
    "by reciprocals": casts.by_reciprocals,
}
ANY_ORDER: dict[str, combine.RankSum] = {
    "rotated": combine.rotated,
    "reversed": combine.reversed_ranks,
    "tree": combine.rank_tree,
    "rank order": combine.rank_order,
}

#: An fp32 accumulator that flushes to zero.
FLUSHING = replace(FP32, name="fp32, flushing", flushes=True)

#: Activations as DeepSeek-V3's fp8 GEMMs take them: one scale for 128 values of a row.
FP8 = Quantiser(block=128, codes=E4M3, scales=FP32)


@dataclass(frozen=True)
class Path:
    """A contract, and the GEMMs and sums over ranks that it allows."""

    name: str
    contract: Callable[[MoEConfig], RoundingContract]
    rank_sums: Mapping[str, combine.RankSum]
    gemms: Mapping[str, gemm.Gemm]

    def plain(self) -> Emulation:
        """The implementation that makes the first choice everywhere."""
        return Emulation(
            gate_up=next(iter(self.gemms.values())),
            down=next(iter(self.gemms.values())),
            sum_ranks=next(iter(self.rank_sums.values())),
        )

    def draw(self, generator: torch.Generator) -> Emulation:
        """An implementation with every choice made at random."""

        def one(options: Mapping[str, Choice]) -> Choice:
            picked = int(torch.randint(len(options), (), generator=generator))
            return list(options.values())[picked]

        return Emulation(
            logits=one(GEMMS),
            route=one(ROUTES),
            quantise=one(QUANTISES),
            gate_up=one(self.gemms),
            activate=one(ACTIVATES),
            down=one(self.gemms),
            sum_slots=one(SLOT_SUMS),
            sum_ranks=one(self.rank_sums),
        )

    def supports(self, dtype: torch.dtype) -> bool:
        """Tensor cores multiply 16-bit operands."""
        return self.gemms is not _TENSOR_CORE_GEMMS or dtype.itemsize == 2


_TENSOR_CORE_GEMMS = {"truncating": gemm.truncating}
_FLUSHING_GEMMS = {"flushing": gemm.flushing}
_RANK_SUMS: dict[str, Mapping[str, combine.RankSum]] = {
    "p2p": {"rank order": combine.rank_order},
    "nvls": ANY_ORDER,
    "gloo": {"ring": combine.ring},
}


def _eager(backend: str) -> Path:
    return Path(
        f"alltoall {backend}",
        lambda config: eager_contract(config, backend),
        _RANK_SUMS["p2p"],
        GEMMS,
    )


def _graphed(backend: str, tier: str, wide: bool) -> Path:
    def contract(config: MoEConfig) -> RoundingContract:
        return graphed_contract(config, backend, tier, torch.float32 if wide else config.dtype)

    wire = "fp32" if wide else "model"
    return Path(f"{tier} {backend}, {wire} wire", contract, _RANK_SUMS[tier], GEMMS)


def _accumulating(path: Path, accumulator: Format, gemms: Mapping[str, gemm.Gemm]) -> Path:
    """``path`` on hardware with another accumulator, declared as such."""

    def contract(config: MoEConfig) -> RoundingContract:
        return replace(path.contract(config), accumulator=accumulator)

    return replace(path, name=f"{path.name}, {accumulator.name}", contract=contract, gemms=gemms)


def _fp8(path: Path) -> Path:
    """``path`` with both GEMMs on quantised activations."""

    def contract(config: MoEConfig) -> RoundingContract:
        return replace(path.contract(config), quantise_input=FP8, quantise_activation=FP8)

    return replace(path, name=f"{path.name}, fp8", contract=contract)


def _paths() -> list[Path]:
    paths = []
    for backend in ("grouped_mm", "triton"):
        paths.append(_eager(backend))
        paths += [_graphed(backend, tier, wide) for tier in _RANK_SUMS for wide in (True, False)]
    wired = _graphed("triton", "p2p", wide=True)
    return [
        *paths,
        _accumulating(wired, TENSOR_CORE, _TENSOR_CORE_GEMMS),
        _accumulating(_eager("grouped_mm"), TENSOR_CORE, _TENSOR_CORE_GEMMS),
        _accumulating(wired, FLUSHING, _FLUSHING_GEMMS),
        _fp8(_eager("grouped_mm")),
    ]


#: Each dispatcher, wire and expert backend of the optimized twin, and other accumulators.
PATHS: dict[str, Path] = {path.name: path for path in _paths()}
