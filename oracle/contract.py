"""RoundingContract: what a path promises about where, and to what, it rounds.

A contract is the only thing the judge believes about an implementation, and it is
checked: a path that rounds elsewhere than it declares falls outside its envelope.
"""

from dataclasses import MISSING, dataclass, fields, replace
from enum import Enum

import torch

from twinmoe.oracle.quantise import Quantiser
from twinmoe.oracle.rounding import FORMATS, FP32, FP64, Format

#: Characters of a contract's name.
_NAME = 200


class Wire(Enum):
    """How partial sums of several ranks become one: the order, and the roundings.

    ========== ==========================================================================
    NONE       no sum crosses ranks; a token's terms are all summed by its owner
    RANK_ORDER fp32 accumulation in the order of ranks: deterministic, bit for bit
    ANY_ORDER  fp32 accumulation in an unspecified order (NVLink multicast reduction)
    PER_HOP    a rounding to the payload's dtype at every hop, in an unspecified order
    ========== ==========================================================================
    """

    NONE = "none"
    RANK_ORDER = "rank order"
    ANY_ORDER = "any order"
    PER_HOP = "per hop"


class Order(Enum):
    """In which order a stored running sum meets a token's terms.

    ========= ===========================================================================
    EXPERT_ID as loops over experts add them
    SLOT      the best expert's first, as loops over k do
    ANY       as atomic additions and parallel reductions do
    ========= ===========================================================================
    """

    EXPERT_ID = "expert id"
    SLOT = "slot"
    ANY = "any order"


class Weighs(Enum):
    """What a router weight multiplies, unless the config's ``router_weight_on_input`` says.

    ========== ==========================================================================
    OUTPUT     the second GEMM's result
    ACTIVATION the first GEMM's, activated: w2 is linear, so that only roundings differ
    ========== ==========================================================================
    """

    OUTPUT = "outputs"
    ACTIVATION = "activations"


class Scales(Enum):
    """What ``routed_scaling_factor`` multiplies: the router weights, or the routed sum."""

    WEIGHTS = "router weights"
    SUM = "routed sum"


class AsRouted(Enum):
    """At a point of the shared expert: as at the same point of routed ones."""

    AS_ROUTED = "as routed"


class Ties(Enum):
    """Which expert is taken where two scores are exactly equal."""

    LOWEST_ID = "lowest id"
    ANY = "any"


@dataclass(frozen=True, kw_only=True)
class RoundingContract:
    """Storage format at each point of one path; None keeps the accumulator's format.

    Inputs and weights as stored are exact by definition.  Router arithmetic is in
    ``router``; ``logits``, ``scores``, ``score_sum`` (the sum of the chosen scores),
    ``normalised_weights`` (each chosen score over that sum) and ``router_weights`` (scaled, as
    the experts meet them) are what is stored of it.  ``weighted_input``
    is the format of ``weight * hidden`` where the router weight is applied to the input,
    ``weighted_activation`` and ``terms`` those of weighted activations and outputs where it
    ``weighs`` these, ``gate`` that of the activated gate before it meets up.  GEMMs accumulate in
    ``accumulator``, in any order.  ``combine`` is the format of the running sum of a token's
    terms, which are added in ``combine_order``; None sums them in the accumulator, in any order.
    ``partial`` is the payload of the cross-rank sum, ``reduced`` the format of its result, and
    ``scaled`` that of the result times the routed scaling factor, if it ``scales`` the sum.  The
    shared expert has points of its own; ``shared_gate_logits``, ``shared_gate_weights`` (their
    sigmoid) and ``shared_terms`` (its weighted outputs) are of its gate.

    Raises TypeError for a ``torch.dtype``: a format also says how it rounds and overflows; and
    ValueError for a ``name`` that does not fit into a line of a report.
    """

    name: str
    accumulator: Format
    router: Format
    logits: Format | None = None
    scores: Format | None = None
    ties: Ties = Ties.LOWEST_ID
    score_sum: Format | None = None
    normalised_weights: Format | None = None
    router_weights: Format | None = None
    weighted_input: Format
    quantise_input: Quantiser | None = None
    gate_up: Format | None
    gate: Format | None = None
    activation: Format | None
    weighs: Weighs = Weighs.OUTPUT
    weighted_activation: Format | None = None
    quantise_activation: Quantiser | None = None
    expert_output: Format | None
    terms: Format | None = None
    combine: Format | None = None
    combine_order: Order = Order.EXPERT_ID
    partial: Format | None
    wire: Wire
    reduced: Format | None
    scales: Scales = Scales.WEIGHTS
    scaled: Format | None = None
    shared_gate_up: Format | None
    shared_activated_gate: Format | AsRouted | None = AsRouted.AS_ROUTED
    shared_activation: Format | AsRouted | None = AsRouted.AS_ROUTED
    shared_output: Format | None
    shared_gate_logits: Format | None = None
    shared_gate_weights: Format | None = None
    shared_terms: Format | None = None
    output: Format

    def __post_init__(self) -> None:
        if len(self.name) > _NAME or not self.name.isprintable():
            raise ValueError(
                f"name ({self.name!r:.{_NAME}}) of a contract stands in reports: give it up to "
                f"{_NAME} characters, all of them printable"
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.dtype):
                raise TypeError(
                    f"{field.name} ({value}) is a dtype, and a contract names formats, which also "
                    f"say how they round: use twinmoe.oracle.rounding.FORMATS[{value}]"
                )

    @property
    def of_shared_expert(self) -> "RoundingContract":
        """The same contract, with the shared expert's points in the place of a routed one's."""
        gate, activation = self.shared_activated_gate, self.shared_activation
        return replace(
            self,
            gate_up=self.shared_gate_up,
            gate=self.gate if isinstance(gate, AsRouted) else gate,
            activation=self.activation if isinstance(activation, AsRouted) else activation,
            expert_output=self.shared_output,
        )

    @property
    def deterministic(self) -> bool:
        """Whether equal calls give equal bits: sums that are stored must have a declared order."""
        in_order = self.combine is None or self.combine_order is not Order.ANY
        return in_order and self.wire in (Wire.NONE, Wire.RANK_ORDER)

    def rows(self) -> list[tuple[str, str]]:
        """(point, format) pairs in the order of the data flow, for a table.

        The order of a sum that is not stored says nothing, and is left out.
        """
        shown = []
        for field in fields(self)[1:]:
            if field.name == "combine_order" and self.combine is None:
                continue
            shown.append((field.name.replace("_", " "), _show(getattr(self, field.name))))
        return shown


def default_rows() -> dict[str, str]:
    """What :meth:`RoundingContract.rows` shows of a contract that leaves a point out."""
    known = {field.name: field.default for field in fields(RoundingContract)}
    return {
        name.replace("_", " "): _show(default)
        for name, default in known.items()
        if default is not MISSING
    }


def _show(point: object) -> str:
    if point is None:
        return "kept"
    if isinstance(point, Quantiser):
        return f"{point.codes.name} in blocks of {point.block}"
    return str(point.value) if isinstance(point, Enum) else str(getattr(point, "name", point))


def accumulator_of(dtype: torch.dtype) -> Format:
    """GEMMs over fp64 operands accumulate in fp64, all others in fp32."""
    return FP64 if dtype is torch.float64 else FP32


def storage_contract(
    name: str, dtype: torch.dtype, router_dtype: torch.dtype = torch.float32
) -> RoundingContract:
    """Every stored tensor in the model's dtype, sums in the accumulator's, no wire.

    This is the arithmetic of the reference and of the eager path.
    """
    stored = FORMATS[dtype]
    return RoundingContract(
        name=name,
        accumulator=accumulator_of(dtype),
        router=FORMATS[router_dtype],
        weighted_input=stored,
        gate_up=stored,
        activation=stored,
        expert_output=stored,
        partial=None,
        wire=Wire.NONE,
        reduced=None,
        shared_gate_up=stored,
        shared_output=stored,
        output=stored,
    )
