"""Wrong implementations: one step of a correct one replaced, and the stage that is to blame."""

from dataclasses import dataclass, field
from typing import Any

from twinmoe.oracle.emulation import activations, casts, combine, dispatch, gemm, routers
from twinmoe.oracle.emulation.pipeline import Emulation


@dataclass(frozen=True)
class Mistake:
    """A mistake in one step.

    ``stage`` is what a judge that sees all taps of a graphed path must name; ``eager``
    the same on AlltoAll paths, whose tap is each slot's expert output instead of each
    rank's share.  ``subtle`` mistakes stay within a rounding or two of the contract.
    """

    stage: str
    eager: str
    steps: dict[str, Any] = field(hash=False)
    subtle: bool = False
    needs_ranks: bool = False
    needs_bias: bool = False

    def in_(self, correct: Emulation) -> Emulation:
        """``correct`` with this mistake made."""
        return correct.but(**self.steps)


MISTAKES: dict[str, Mistake] = {
    "weakest slot dropped": Mistake("experts", "combine", {"weigh": combine.weakest_dropped}),
    "weakest slot to a wrong expert": Mistake(
        "experts", "experts", {"assign": dispatch.weakest_misassigned}
    ),
    "bf16 combine accumulator": Mistake(
        "experts", "combine", {"sum_slots": combine.bf16_accumulator}, subtle=True
    ),
    "bf16 GEMM2 partial sums": Mistake(
        "experts", "experts", {"down": gemm.bf16_partial_sums}, subtle=True
    ),
    "truncating cast": Mistake("output", "output", {"store_output": casts.truncated}, subtle=True),
    "truncating cast at h": Mistake(
        "experts", "experts", {"store_h": casts.truncated}, subtle=True
    ),
    "bf16 router weights": Mistake(
        "router", "router", {"route": routers.bf16_weights}, subtle=True
    ),
    "bf16 router logits": Mistake("router", "router", {"route": routers.bf16_logits}, subtle=True),
    "K-tail dropped": Mistake("experts", "experts", {"down": gemm.without_tail}),
    "stale row": Mistake("dispatch", "experts", {"receive": dispatch.last_row_stale}),
    "neighbour's weight": Mistake("experts", "combine", {"weigh": combine.neighbours_weight}),
    "SiLU rounded twice": Mistake(
        "experts", "experts", {"activate": activations.silu_rounded_early}, subtle=True
    ),
    "bf16 ring": Mistake(
        "combine", "", {"sum_ranks": combine.bf16_ring}, subtle=True, needs_ranks=True
    ),
    "gate and up swapped": Mistake(
        "experts", "experts", {"activate": activations.gate_and_up_swapped}
    ),
    "bias in weights": Mistake(
        "router", "router", {"route": routers.bias_in_weights}, needs_bias=True
    ),
    "zeros": Mistake("output", "output", {"store_output": casts.zeros}),
}
