"""How far two right implementations of one layer may lie apart: derived, not tuned.

Both round at the same places but sum in different orders.  So each stored value may come out as a
neighbour (one ulp, 2 u |v|), and each sum of n terms may differ by twice the bound of any order,
n u / (1 - n u) * sum |terms| (Higham, Accuracy and Stability of Numerical Algorithms, section
3.1).  These are carried through the layer to first order, in fp64; the second order is covered by
SLACK.  An exchanged gate and up, a dropped slot or a wrong expert overshoots by far.

Legend: T tokens, H hidden_size, E experts, F rows of w13, I intermediate size.
"""

import torch

from twinmoe.reference.config import MoEConfig
from twinmoe.reference.dense import dense_routing
from twinmoe.reference.experts import ACTIVATIONS
from twinmoe.reference.weights import MoEWeights

#: Largest slope of silu (1.10), gelu (1.13) and relu (1); relu2 has none and is not covered.
STEEPEST = 1.13

#: Products of two first-order terms, each far below a tenth here.
SLACK = 1.1


def difference_bound(config: MoEConfig, weights: MoEWeights, x_TH: torch.Tensor) -> torch.Tensor:
    """Return [T, H] in fp64: the largest difference of two implementations with equal routing.

    For gated experts without a limit, with the router weight on the output.
    """
    x_TH = x_TH.double()
    weights_TE = dense_routing(config, weights, x_TH)[0].double().abs()
    weight_error_TE = weights_TE * _routing_error(config, weights, x_TH)
    y_TEH, y_error_TEH = _expert(config, x_TH, weights.w13_LFH, weights.w2_LHI)
    terms_TH = torch.einsum("te,teh->th", weights_TE, y_TEH.abs())
    error_TH = torch.einsum("te,teh->th", weights_TE, y_error_TEH)
    error_TH += torch.einsum("te,teh->th", weight_error_TE, y_TEH.abs())
    if weights.shared_w13_FH is not None and weights.shared_w2_HI is not None:
        assert weights.shared_gate_1H is None, "a gated shared expert is not covered"
        shared_T1H, shared_error_T1H = _expert(
            config, x_TH, weights.shared_w13_FH[None], weights.shared_w2_HI[None]
        )
        terms_TH += shared_T1H[:, 0].abs()
        error_TH += shared_error_T1H[:, 0]
    error_TH += _order(config.accumulate_dtype, config.num_experts_per_tok + 1) * terms_TH
    return SLACK * (error_TH + _ulp(config.dtype) * terms_TH)


def _expert(
    config: MoEConfig, x_TH: torch.Tensor, w13_EFH: torch.Tensor, w2_EHI: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs [T, E, H] in fp64 and the bound of their difference."""
    ulp, wide = _ulp(config.dtype), config.accumulate_dtype
    w13_EFH, w2_EHI = w13_EFH.double(), w2_EHI.double()
    gate_up_TEF = torch.einsum("th,efh->tef", x_TH, w13_EFH)
    size_TEF = torch.einsum("th,efh->tef", x_TH.abs(), w13_EFH.abs())
    error_TEF = ulp * gate_up_TEF.abs() + _order(wide, x_TH.shape[1]) * size_TEF
    (gate, up), (gate_error, up_error) = gate_up_TEF.chunk(2, dim=2), error_TEF.chunk(2, dim=2)
    act = ACTIVATIONS[config.hidden_act](gate)
    h = act * up
    # The activation itself may differ by a few ulp of the accumulate dtype between libraries.
    h_error = STEEPEST * gate_error * up.abs() + act.abs() * up_error
    h_error += (ulp + 4 * _ulp(wide)) * h.abs()
    y_TEH = torch.einsum("tei,ehi->teh", h, w2_EHI)
    size_TEH = torch.einsum("tei,ehi->teh", h.abs(), w2_EHI.abs())
    y_error_TEH = torch.einsum("tei,ehi->teh", h_error, w2_EHI.abs())
    y_error_TEH += ulp * y_TEH.abs() + _order(wide, w2_EHI.shape[2]) * size_TEH
    return y_TEH, y_error_TEH


def _routing_error(config: MoEConfig, weights: MoEWeights, x_TH: torch.Tensor) -> torch.Tensor:
    """Bound the relative difference of routing weights, [T, 1]."""
    router_EH = weights.router_EH.double()
    size_TE = torch.einsum("th,eh->te", x_TH.abs(), router_EH.abs())
    # Tokens and weights may have to be rounded to the router dtype before they are multiplied.
    logit_error_T1 = (
        (_order(config.router_dtype, x_TH.shape[1]) + 2 * _ulp(config.router_dtype)) * size_TE
    ).amax(dim=1, keepdim=True)
    # Scores move by at most the factor exp(error); softmax and normalising square it.
    sums = config.num_experts + config.num_experts_per_tok + 8
    return torch.expm1(4 * logit_error_T1) + _order(config.router_dtype, sums)


def _ulp(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _order(dtype: torch.dtype, terms: int) -> float:
    """Twice Higham's gamma_n: what two orders of summation may differ by, over sum |terms|."""
    unit = torch.finfo(dtype).eps / 2
    return 2 * terms * unit / (1 - terms * unit)
