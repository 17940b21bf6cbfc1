"""The norm of a forward: how it is made from a case's line, and shown to be the same again.

Legend: T tokens of all ranks, H hidden_size, K experts per token.
"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from twinmoe.oracle.bits import as_bits
from twinmoe.oracle.case import Case
from twinmoe.oracle.contract import RoundingContract
from twinmoe.oracle.contracts import eager_contract, graphed_contract
from twinmoe.oracle.envelope import Enclosure
from twinmoe.oracle.scenario import Scenario
from twinmoe.oracle.truth import Truth

#: fp64 truths of two machines differ by the order of their sums, far below any radius.
_FP64_NOISE = 2.0**-40


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, dtypes, shapes and bits."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(as_bits(tensor).numpy().data)
    return digest.hexdigest()


class Drawn:
    """What the line of a case draws on this machine for one forward: drawn once, used twice."""

    def __init__(self, scenario: Scenario) -> None:
        self._config = scenario.config
        self._weights, self._hidden_by_rank = scenario.weights(), scenario.hidden()

    def digests(self) -> dict[str, str]:
        """SHA-256 of the weights, and of the batch in token order."""
        hidden_TH = torch.cat(self._hidden_by_rank)
        return {
            "weights": tensors_digest(self._weights.tensors().items()),
            "hidden": tensors_digest([("hidden", hidden_TH)]),
        }

    def interval(self, contract: RoundingContract, ids_TK: Tensor) -> Enclosure:
        """The truth under ``contract`` if tokens go to ``ids_TK``: [T, H]."""
        truth = Truth(self._config, self._weights, self._hidden_by_rank)
        weights_TK = truth.routing(contract).weights(ids_TK.long())
        return truth.stages(contract, ids_TK.long(), weights_TK).sum_TH


def declared(case: Case, name: str, device: str) -> RoundingContract:
    """What this version's path called ``name`` declares for ``case`` on a device of that type.

    Raises ValueError for a name that is no path of this version.
    """
    tier, _, backend = name.partition(" + ")
    if tier == "alltoall":
        return eager_contract(case.config, backend, device)
    wire = torch.float32 if case.wire == "fp32" else case.config.dtype
    try:
        return graphed_contract(case.config, backend, tier, wire, device)
    except KeyError:
        raise ValueError(f"tier ({tier!r}) has no contract") from None


def same_interval(one: Enclosure, other: Enclosure) -> Tensor:
    """Where two fp64 computations of one interval agree: a mask [T, H].

    Each centre lies in the other's interval, and the radii are of one size: the last bit of an
    fp64 sum may differ between machines, and with it the side of a rounding boundary inside.
    """
    slack = _FP64_NOISE * one.value.abs()
    apart = (one.value - other.value).abs()
    near = apart <= torch.minimum(one.radius, other.radius) + slack
    alike = (one.radius <= 2 * other.radius + slack) & (other.radius <= 2 * one.radius + slack)
    special = (one.value == other.value) | (one.value.isnan() & other.value.isnan())
    unbounded = one.radius.isinf() & other.radius.isinf()
    return (near | special | unbounded) & (alike | unbounded | one.radius.isnan())
