"""One fp64 truth of a layer's output, carried through a rounding contract.

The truth knows nothing of dispatch: it computes what every (token, slot) contributes,
then follows the contract's sums and roundings to the output.  Ranks enter only where
they round: each rank's share of a token is summed first, then the shares.

Memory: one expert's matrices as stored, a few MiB of them in fp64 at a time, and about
thirty tensors [T, K, H] of fp64 for the judged tokens T.  Sampling tokens
(:meth:`Truth.of_tokens`) bounds it at any size.

Legend: T tokens of all ranks, in rank order; H hidden_size; K experts per token; R ranks;
S slots of one expert.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Generic, Protocol

import torch
from torch import Tensor

from twinmoe.oracle.activation import activate, clamp
from twinmoe.oracle.contract import Order, RoundingContract, Scales, Weighs, Wire
from twinmoe.oracle.envelope import (
    E,
    Enclosure,
    Grade,
    Index,
    held,
    matmul,
    product,
    rounded,
    total,
)
from twinmoe.oracle.products import summand
from twinmoe.oracle.quantise import quantised
from twinmoe.oracle.routing import RoutingTruth, held_factor
from twinmoe.oracle.running_sums import running_sums
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.placement import Placement


class WeightSource(Protocol):
    """What the truth needs of weights: :class:`MoEWeights`, or a source that makes them late."""

    @property
    def router_EH(self) -> Tensor: ...  # noqa: D102 - the layout of record, see MoEWeights
    @property
    def correction_bias_E(self) -> Tensor | None: ...  # noqa: D102
    @property
    def shared_w13_FH(self) -> Tensor | None: ...  # noqa: D102
    @property
    def shared_w2_HI(self) -> Tensor | None: ...  # noqa: D102
    @property
    def shared_gate_1H(self) -> Tensor | None: ...  # noqa: D102

    def expert(self, expert: int) -> tuple[Tensor, Tensor]:
        """(w13 [F, H], w2 [H, I]) of one expert, by its global id."""
        ...


@dataclass(frozen=True)
class Stages(Generic[E]):
    """Enclosures along one path, for one choice of experts.

    ``terms_TKH`` weighted expert outputs, before any sum; ``partials_RTH`` each rank's
    share, as it is put on the wire; ``routed_TH`` the sum over ranks; ``shared_TH`` what
    the shared expert adds; ``sum_TH`` the final sum before the one rounding to the
    output's format.
    """

    weights_TK: E
    expert_output_TKH: E
    terms_TKH: E
    partials_RTH: E
    routed_TH: E
    shared_TH: E | None
    sum_TH: E


class Truth:
    """What a layer of ``config`` and ``weights`` must answer to ``hidden_by_rank``.

    ``weights`` holds all experts; ``hidden_by_rank`` one [T_r, H] tensor per rank, T_r
    possibly 0.  Values are taken as stored, whatever their dtype.  Experts are computed
    in fp64 on the device that holds their matrices, everything else on the CPU.
    """

    def __init__(
        self, config: MoEConfig, weights: WeightSource, hidden_by_rank: Sequence[Tensor]
    ) -> None:
        self.config = config
        self.weights = weights
        self.tokens_by_rank = [len(hidden) for hidden in hidden_by_rank]
        self.placement = Placement(config.num_experts, len(self.tokens_by_rank))
        self.hidden_TH = torch.cat(list(hidden_by_rank)).cpu()
        #: Each token's rank, and its row there.
        self.rank_T = torch.arange(self.placement.ep_size).repeat_interleave(
            torch.tensor(self.tokens_by_rank)
        )
        self.row_T = torch.cat([torch.arange(count) for count in self.tokens_by_rank])

    def of_tokens(self, tokens: Tensor) -> "Truth":
        """The same truth for some tokens only (indices [T']), with all their experts."""
        chosen = copy(self)
        chosen.hidden_TH = self.hidden_TH[tokens]
        chosen.rank_T, chosen.row_T = self.rank_T[tokens], self.row_T[tokens]
        return chosen

    def routing(
        self,
        contract: RoundingContract,
        grade: Grade = Grade.SHARP,
        carry: type[Enclosure] = Enclosure,
    ) -> RoutingTruth:
        """Scores, exact selection and admissible answers, or for a Spread expected errors."""
        weights = self.weights
        return RoutingTruth.of(
            self.config,
            carry.exact(self.hidden_TH),
            weights.router_EH.cpu(),
            None if weights.correction_bias_E is None else weights.correction_bias_E.cpu(),
            contract,
            grade,
        )

    def stages(
        self,
        contract: RoundingContract,
        ids_TK: Tensor,
        weights_TK: E,
        grade: Grade = Grade.SHARP,
        expert_output_TKH: E | None = None,
    ) -> Stages[E]:
        """Carry the truth for experts ``ids_TK``, weighted ``weights_TK``, through ``contract``.

        ``expert_output_TKH`` saves computing the experts again where it does not depend
        on the weights.
        """
        weights_TK = rounded(weights_TK, contract.router_weights)
        y_TKH = expert_output_TKH
        if self._weighs_before_output(contract):
            (y_TKH,) = self._expert_outputs(contract, ids_TK, [weights_TK], grade)
        elif y_TKH is None:
            (y_TKH,) = self.unweighted(contract, ids_TK, [type(weights_TK)], grade)
        terms_TKH = self.terms(contract, weights_TK, y_TKH)
        partials_RTH = self._partials(contract, ids_TK, terms_TKH)
        scaled_TH = self.scaled(contract, across_ranks(contract, partials_RTH))
        routed_TH = sum_TH = held(scaled_TH, contract.accumulator)
        shared_TH = self._shared(contract, type(weights_TK), grade)
        if shared_TH is not None:
            sum_TH = with_shared(contract, scaled_TH, shared_TH)
        return Stages(weights_TK, y_TKH, terms_TKH, partials_RTH, routed_TH, shared_TH, sum_TH)

    def unweighted(
        self,
        contract: RoundingContract,
        ids_TK: Tensor,
        carries: Sequence[type[Enclosure]],
        grade: Grade = Grade.SHARP,
    ) -> list[Any]:
        """Each slot's expert output [T, K, H] without its weight, once for each of ``carries``.

        Every expert's matrices are asked for once, however late they are made.
        """
        weights = [carry.exact(torch.ones(ids_TK.shape)) for carry in carries]
        return self.recall(
            (contract, ids_TK, *carries, grade),
            lambda: self._expert_outputs(contract, ids_TK, weights, grade),
        )

    def recall(self, _question: tuple[object, ...], compute: Callable[[], list[Any]]) -> list[Any]:
        """Answer what expert outputs were asked for: here, compute them anew."""
        return compute()

    def _expert_outputs(
        self, contract: RoundingContract, ids_TK: Tensor, weights: Sequence[Enclosure], grade: Grade
    ) -> list[Any]:
        """One for each of the ``weights`` [T, K], which matter where they precede the output."""
        on_input = self.config.router_weight_on_input
        on_activation = contract.weighs is Weighs.ACTIVATION and not on_input
        parts: list[list[tuple[Index, Enclosure]]] = [[] for _ in weights]
        for expert in ids_TK.unique().tolist():
            if expert < 0:
                continue
            token, slot = (ids_TK == expert).nonzero(as_tuple=True)
            w13_FH, w2_HI = self.weights.expert(expert)
            for weights_TK, outputs in zip(weights, parts, strict=True):
                x_SH = type(weights_TK).exact(self.hidden_TH[token])
                weight_S1 = weights_TK[token, slot][:, None]
                if on_input:
                    x_SH = product(x_SH, weight_S1, contract.accumulator)
                    x_SH = rounded(x_SH, contract.weighted_input)
                device = w13_FH.device
                y_SH = _mlp(
                    self.config,
                    contract,
                    x_SH.to(device),
                    (w13_FH, w2_HI),
                    grade,
                    weight_S1.to(device) if on_activation else None,
                )
                outputs.append(((token, slot), y_SH.to(torch.device("cpu"))))
        shape = (*ids_TK.shape, self.config.hidden_size)
        return [
            type(weights_TK).scattered(shape, outputs)
            for weights_TK, outputs in zip(weights, parts, strict=True)
        ]

    def terms(self, contract: RoundingContract, weights_TK: E, expert_output_TKH: E) -> E:
        """Each slot's weighted output [T, K, H], as stored."""
        if self._weighs_before_output(contract):
            return expert_output_TKH
        weights_TK1 = weights_TK[..., None]
        return summand(weights_TK1, expert_output_TKH, contract.terms, contract.accumulator)

    def _weighs_before_output(self, contract: RoundingContract) -> bool:
        return self.config.router_weight_on_input or contract.weighs is Weighs.ACTIVATION

    def scaled(self, contract: RoundingContract, sum_TH: E) -> E:
        """The routed sum times the factor, where that has not been in the router weights.

        A term, which the shared expert may be added to: it need not fit the accumulator.
        """
        if contract.scales is Scales.WEIGHTS:
            return sum_TH
        accumulator = contract.accumulator
        held = held_factor(self.config, accumulator)
        factor = type(sum_TH).of(held.value, held.radius)
        return summand(sum_TH, factor, contract.scaled, accumulator)

    def _partials(self, contract: RoundingContract, ids_TK: Tensor, terms_TKH: E) -> E:
        """One share per rank of the experts it owns; one share in all without a wire."""
        if contract.wire is Wire.NONE:
            shares = [over_slots(contract, ids_TK, terms_TKH)]
        else:
            owner_TK1 = self.placement.owner(ids_TK)[..., None]
            shares = [
                rounded(
                    over_slots(contract, ids_TK, terms_TKH.only(owner_TK1 == rank)),
                    contract.partial,
                )
                for rank in range(self.placement.ep_size)
            ]
        return type(terms_TKH).stack(shares)

    def _shared(self, contract: RoundingContract, carry: type[E], grade: Grade) -> E | None:
        weights, config = self.weights, self.config
        if weights.shared_w13_FH is None or weights.shared_w2_HI is None:
            return None
        x_TH = carry.exact(self.hidden_TH)
        matrices = (weights.shared_w13_FH, weights.shared_w2_HI)
        device = matrices[0].device
        y_TH = _mlp(config, contract.of_shared_expert, x_TH.to(device), matrices, grade)
        y_TH = y_TH.to(torch.device("cpu"))
        if weights.shared_gate_1H is None:
            return y_TH
        accumulator = contract.accumulator
        logit = matmul(x_TH, weights.shared_gate_1H.cpu(), accumulator, grade)
        logit = rounded(logit, contract.shared_gate_logits)
        gate = torch.sigmoid(logit.value)
        spread = gate * torch.sigmoid(-logit.value) * torch.expm1(logit.radius)
        evaluation = 4 * accumulator.unit * gate + accumulator.smallest_normal
        spread = spread.nan_to_num(0.0, torch.inf)  # a logit that is surely no number
        weight = carry(gate, carry.join(spread, evaluation))
        weight = rounded(weight, contract.shared_gate_weights)
        return summand(weight, y_TH, contract.shared_terms, accumulator)


def _mlp(
    config: MoEConfig,
    contract: RoundingContract,
    x: E,
    matrices: tuple[Tensor, Tensor],
    grade: Grade,
    weight: E | None = None,
) -> E:
    """One expert: w13, the activation, its ``weight`` [..., 1] where it is met there, and w2."""
    (w13_FH, w2_HI), accumulator = matrices, contract.accumulator
    x = quantised(x, contract.quantise_input, accumulator)
    gate_up = rounded(matmul(x, w13_FH, accumulator, grade), contract.gate_up)
    if config.gated:
        half = w13_FH.shape[0] // 2
        gate, up = gate_up[..., :half], gate_up[..., half:]
        if config.swiglu_limit is not None:
            gate = clamp(gate, -torch.inf, config.swiglu_limit)
            up = clamp(up, -config.swiglu_limit, config.swiglu_limit)
        h = activate(config.hidden_act, gate, accumulator).stored(contract.gate).times(up)
    else:
        h = activate(config.hidden_act, gate_up, accumulator)
    h = h.stored(contract.activation)
    if weight is not None:
        h = h.times(weight).stored(contract.weighted_activation)
    x = quantised(h.held(), contract.quantise_activation, accumulator)
    return rounded(matmul(x, w2_HI, accumulator, grade), contract.expert_output)


def over_slots(contract: RoundingContract, ids_TK: Tensor, terms_TKH: E) -> E:
    """The sum [T, H] of a token's terms: see ``RoundingContract.combine``."""
    if contract.combine is None:
        return total(terms_TKH, 1, contract.accumulator)
    if contract.combine_order is Order.ANY:
        result = total(terms_TKH, 1, contract.accumulator)
        exact = 1 if contract.terms == contract.combine else 0  # a stored term stays as it is
        return rounded(
            running_sums(result, terms_TKH, 1, contract.combine, exact), contract.combine
        )
    token_T1 = torch.arange(len(ids_TK))[:, None]
    order_TK = torch.arange(ids_TK.shape[1]).expand(ids_TK.shape)
    if contract.combine_order is Order.EXPERT_ID:
        order_TK = ids_TK.argsort(dim=1)
    first, *rest = (terms_TKH[token_T1, slot_T1][:, 0] for slot_T1 in order_TK.split(1, dim=1))
    first = rounded(first, contract.combine)  # the sum's buffer holds it from the first term on
    for term in rest:
        pair = type(terms_TKH).stack([first, term])
        first = rounded(total(pair, 0, contract.accumulator), contract.combine)
    return first


def across_ranks(contract: RoundingContract, partials_RTH: E) -> E:
    """The wire rule: what summing the ranks' shares may add, and how the sum is stored.

    RANK_ORDER and ANY_ORDER accumulate in fp32: (R - 1) u32 sum |p_r|.  PER_HOP rounds
    after each addition, the last of which makes the result; before it, for n shares that
    are not zero, sums of 2 .. n - 1 of them are rounded: u_hop sum max |s_j|.
    """
    result = total(partials_RTH, 0, contract.accumulator)
    hop = contract.reduced or contract.partial
    if contract.wire is Wire.PER_HOP and hop is not None:
        result = running_sums(result, partials_RTH, 0, hop, 1)
    return rounded(result, contract.reduced)


def rank_order_sum(shares_RTH: Tensor) -> Tensor:
    """fp32 accumulation in the order of ranks, bit for bit as the reduce-scatter kernel does."""
    total_TH = torch.zeros_like(shares_RTH[0], dtype=torch.float32)
    for share_TH in shares_RTH:
        total_TH = total_TH + share_TH.float()
    return total_TH


def with_shared(contract: RoundingContract, routed_TH: E, shared_TH: E) -> E:
    """The routed sum plus the shared expert, in the accumulator."""
    return total(type(routed_TH).stack([routed_TH, shared_TH]), 0, contract.accumulator)
