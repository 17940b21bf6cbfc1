"""Wrong implementations: one step of a correct one replaced, and the stage that is to blame."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from twinmoe.oracle.contract import RoundingContract, Wire
from twinmoe.oracle.emulation import activations, casts, combine, dispatch, gemm, routers
from twinmoe.oracle.emulation.pipeline import Emulation
from twinmoe.oracle.rounding import BF16


@dataclass(frozen=True, eq=False)
class Mistake:
    """One step made wrongly.

    ``stage`` is what a judge must name that sees the taps of a graphed path, ``eager`` the
    same on an AlltoAll path, which shows each slot's expert output instead of each rank's
    share.  ``breaks`` tells whether a contract forbids the mistake at all; ``needs_bias``
    that it is none in a layer without a correction bias.
    """

    stage: str
    eager: str
    steps: Mapping[str, Any]
    breaks: Callable[[RoundingContract], bool]
    needs_bias: bool = False

    def into(self, correct: Emulation) -> Emulation:
        """``correct`` with this mistake made."""
        return correct.but(**self.steps)

    def blamed(self, contract: RoundingContract) -> str:
        """The stage to blame on a path of ``contract``."""
        return self.eager if contract.wire is Wire.NONE else self.stage


def _always(_contract: RoundingContract) -> bool:
    return True


def _wide_wire(contract: RoundingContract) -> bool:
    """A ring in bf16 is what a bf16 payload promises, or nearly so."""
    return contract.partial is not None and contract.partial is not BF16


def _narrow(contract: RoundingContract) -> bool:
    """A cast to the accumulator's own format has nothing to cut off."""
    return contract.output.precision < contract.accumulator.precision


def _mistake(
    stage: str,
    eager: str = "",
    breaks: Callable[[RoundingContract], bool] = _always,
    needs_bias: bool = False,
    **steps: Any,
) -> Mistake:
    return Mistake(stage, eager or stage, steps, breaks, needs_bias)


MISTAKES: dict[str, Mistake] = {
    "weakest slot dropped": _mistake("experts", "combine", weigh=combine.weakest_dropped),
    "weakest slot to a wrong expert": _mistake("experts", assign=dispatch.weakest_misassigned),
    "bf16 combine accumulator": _mistake("experts", "combine", sum_slots=combine.bf16_accumulator),
    "bf16 GEMM2 partial sums": _mistake("experts", down=gemm.bf16_partial_sums),
    "truncating cast": _mistake("output", breaks=_narrow, store_output=casts.truncated),
    "truncating cast at h": _mistake("experts", breaks=_narrow, store_h=casts.truncated),
    "bf16 router weights": _mistake("router", route=routers.bf16_weights),
    "bf16 router logits": _mistake("router", route=routers.bf16_logits),
    "K-tail dropped": _mistake("experts", down=gemm.without_tail),
    "stale row": _mistake("dispatch", "experts", receive=dispatch.last_row_stale),
    "neighbour's weight": _mistake("experts", "combine", weigh=combine.neighbours_weight),
    "SiLU rounded twice": _mistake("experts", activate=activations.silu_rounded_early),
    "bf16 ring": _mistake("combine", breaks=_wide_wire, sum_ranks=combine.bf16_ring),
    "gate and up swapped": _mistake("experts", activate=activations.gate_and_up_swapped),
    "bias in weights": _mistake("router", needs_bias=True, route=routers.bias_in_weights),
    "zeros": _mistake("output", store_output=casts.zeros),
}
