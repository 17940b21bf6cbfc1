"""One fp64 truth of a layer's output, carried through a rounding contract.

The truth knows nothing of dispatch: it computes what every (token, slot) contributes,
then follows the contract's sums and roundings to the output.  Ranks enter only where
they round: each rank's share of a token is summed first, then the shares.

Legend: T tokens of all ranks, in rank order; H hidden_size; K experts per token; R ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twinmoe.oracle.activation import activate, clamp
from twinmoe.oracle.contract import RoundingContract, Wire
from twinmoe.oracle.envelope import Enclosure, Grade, matmul, product, rounded, total
from twinmoe.oracle.rounding import Format
from twinmoe.oracle.routing import RoutingTruth
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.placement import Placement
from twinmoe.reference.weights import MoEWeights


@dataclass(frozen=True)
class Stages:
    """Enclosures along one path, for one choice of experts.

    ``terms_TKH`` weighted expert outputs, before any sum; ``partials_RTH`` each rank's
    share as its experts finish it, before the wire; ``shared_TH`` what the shared expert
    adds; ``sum_TH`` the final sum before the one rounding to the output's dtype.
    """

    weights_TK: Enclosure
    expert_output_TKH: Enclosure
    terms_TKH: Enclosure
    partials_RTH: Enclosure
    shared_TH: Enclosure | None
    sum_TH: Enclosure


class Truth:
    """What a layer of ``config`` and ``weights`` must answer to ``hidden_by_rank``.

    ``weights`` holds all experts; ``hidden_by_rank`` one [T_r, H] tensor per rank, T_r
    possibly 0.  Values are taken as stored, whatever their dtype.
    """

    def __init__(
        self, config: MoEConfig, weights: MoEWeights, hidden_by_rank: Sequence[Tensor]
    ) -> None:
        self.config = config
        self.weights = weights
        self.tokens_by_rank = [len(hidden) for hidden in hidden_by_rank]
        self.hidden_TH = torch.cat(list(hidden_by_rank))
        self.placement = Placement(config.num_experts, len(hidden_by_rank))

    def locate(self, token: int) -> tuple[int, int]:
        """(rank, row on that rank) of a global token index."""
        for rank, count in enumerate(self.tokens_by_rank):
            if token < count:
                return rank, token
            token -= count
        raise IndexError(f"token {token} beyond the batch")

    def routing(self, contract: RoundingContract, grade: Grade = Grade.SHARP) -> RoutingTruth:
        """Scores, exact selection and admissible answers."""
        weights = self.weights
        return RoutingTruth.of(
            self.config,
            self.hidden_TH,
            weights.router_EH,
            weights.correction_bias_E,
            contract,
            grade,
        )

    def stages(
        self,
        contract: RoundingContract,
        routing: RoutingTruth,
        ids_TK: Tensor,
        grade: Grade = Grade.SHARP,
    ) -> Stages:
        """Carry the truth for the experts ``ids_TK`` through ``contract``."""
        weights_TK = routing.weights(ids_TK)
        y_TKH = self._expert_outputs(contract, ids_TK, weights_TK, grade)
        terms_TKH = self._terms(contract, weights_TK, y_TKH)
        partials_RTH = self._partials(contract, ids_TK, terms_TKH)
        routed_TH = across_ranks(contract, partials_RTH)
        shared_TH = self._shared(contract, grade)
        sum_TH = routed_TH
        if shared_TH is not None:
            both = Enclosure(
                torch.stack([routed_TH.value, shared_TH.value]),
                torch.stack([routed_TH.radius, shared_TH.radius]),
            )
            sum_TH = total(both, 0, contract.accumulator.unit)
        return Stages(weights_TK, y_TKH, terms_TKH, partials_RTH, shared_TH, sum_TH)

    def _expert_outputs(
        self, contract: RoundingContract, ids_TK: Tensor, weights_TK: Enclosure, grade: Grade
    ) -> Enclosure:
        value = torch.zeros(*ids_TK.shape, self.config.hidden_size, dtype=torch.float64)
        radius = torch.zeros_like(value)
        for expert in ids_TK.unique().tolist():
            token, slot = (ids_TK == expert).nonzero(as_tuple=True)
            x_SH = Enclosure.exact(self.hidden_TH[token])
            if self.config.router_weight_on_input:
                weight = weights_TK[token, slot]
                weight = Enclosure(weight.value[:, None], weight.radius[:, None])
                x_SH = product(x_SH, weight, contract.accumulator.unit)
                x_SH = rounded(x_SH, contract.weighted_input)
            y_SH = _mlp(
                self.config,
                contract,
                x_SH,
                (self.weights.w13_LFH[expert].double(), self.weights.w2_LHI[expert].double()),
                (contract.gate_up, contract.expert_output),
                grade,
            )
            value[token, slot], radius[token, slot] = y_SH.value, y_SH.radius
        return Enclosure(value, radius)

    def _terms(
        self, contract: RoundingContract, weights_TK: Enclosure, y_TKH: Enclosure
    ) -> Enclosure:
        if self.config.router_weight_on_input:
            return y_TKH
        weight = Enclosure(weights_TK.value[..., None], weights_TK.radius[..., None])
        return product(weight, y_TKH, contract.accumulator.unit)

    def _partials(
        self, contract: RoundingContract, ids_TK: Tensor, terms_TKH: Enclosure
    ) -> Enclosure:
        """One share per rank of the experts it owns; one share in all without a wire."""
        unit = contract.accumulator.unit
        if contract.wire is Wire.NONE:
            shares = [total(terms_TKH, 1, unit)]
        else:
            owner_TK1 = self.placement.owner(ids_TK)[..., None]
            shares = []
            for rank in range(self.placement.ep_size):
                mine = Enclosure(
                    torch.where(owner_TK1 == rank, terms_TKH.value, 0.0),
                    torch.where(owner_TK1 == rank, terms_TKH.radius, 0.0),
                )
                shares.append(rounded(total(mine, 1, unit), contract.partial))
        return Enclosure(
            torch.stack([share.value for share in shares]),
            torch.stack([share.radius for share in shares]),
        )

    def _shared(self, contract: RoundingContract, grade: Grade) -> Enclosure | None:
        weights, config = self.weights, self.config
        if weights.shared_w13_FH is None or weights.shared_w2_HI is None:
            return None
        x_TH = Enclosure.exact(self.hidden_TH)
        matrices = (weights.shared_w13_FH.double(), weights.shared_w2_HI.double())
        stored = (contract.shared_gate_up, contract.shared_output)
        y_TH = _mlp(config, contract, x_TH, matrices, stored, grade)
        if weights.shared_gate_1H is None:
            return y_TH
        unit = contract.accumulator.unit
        logit = matmul(x_TH, weights.shared_gate_1H.double(), contract.accumulator, grade)
        gate = torch.sigmoid(logit.value)
        spread = gate * torch.sigmoid(-logit.value) * torch.expm1(logit.radius)
        underflow = contract.accumulator.smallest_normal
        return product(Enclosure(gate, spread + 4 * unit * gate + underflow), y_TH, unit)


def _mlp(
    config: MoEConfig,
    contract: RoundingContract,
    x: Enclosure,
    matrices: tuple[Tensor, Tensor],
    stored: tuple[Format | None, Format | None],
    grade: Grade,
) -> Enclosure:
    """One expert: w13 and w2 with their results ``stored`` so, the activation between."""
    (w13_FH, w2_HI), (gate_up_format, output_format) = matrices, stored
    gate_up = rounded(matmul(x, w13_FH, contract.accumulator, grade), gate_up_format)
    if config.gated:
        half = w13_FH.shape[0] // 2
        gate, up = gate_up[..., :half], gate_up[..., half:]
        if config.swiglu_limit is not None:
            gate = clamp(gate, -torch.inf, config.swiglu_limit)
            up = clamp(up, -config.swiglu_limit, config.swiglu_limit)
        h = activate(config.hidden_act, gate, contract.accumulator)
        h = product(h, up, contract.accumulator.unit)
    else:
        h = activate(config.hidden_act, gate_up, contract.accumulator)
    h = rounded(h, contract.activation)
    return rounded(matmul(h, w2_HI, contract.accumulator, grade), output_format)


def across_ranks(contract: RoundingContract, partials_RTH: Enclosure) -> Enclosure:
    """The wire rule: what summing the ranks' shares may add, and how the sum is stored.

    RANK_ORDER and ANY_ORDER accumulate in fp32: (R - 1) u32 sum |p_r|.  PER_HOP rounds
    to the payload's format at every hop: (R - 1) u_payload sum |p_r|.
    """
    unit = contract.accumulator.unit
    if contract.wire is Wire.PER_HOP and contract.partial is not None:
        unit = contract.partial.unit
    return rounded(total(partials_RTH, 0, unit), contract.reduced)
