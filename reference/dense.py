"""A second formulation, written independently: every expert sees every token, a mask decides.

Nothing here is shared with the router, the dispatcher or the experts: an expert is chosen when
fewer than k others beat it, groups are masks, and the combine is one contraction.  Rounds at the
same places as the layer, so that in fp64 the two differ by summation order alone.

Legend: T tokens, H hidden_size, I intermediate size, E experts, G groups, M experts in a group.
"""

import math

import torch

from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights


def dense_moe(config: MoEConfig, weights: MoEWeights, x_TH: torch.Tensor) -> torch.Tensor:
    """Return [T, H] in ``config.dtype`` for all tokens, from the weights of all experts."""
    wide = config.accumulate_dtype
    weights_TE, chosen_TE = dense_routing(config, weights, x_TH)
    weights_TE = weights_TE.to(wide)
    x_TEH = x_TH.to(wide)[:, None, :].expand(-1, config.num_experts, -1)
    if config.router_weight_on_input:
        x_TEH = _rounded(config, weights_TE[:, :, None] * x_TEH)
        weights_TE = chosen_TE.to(wide)
    y_TEH = _expert(config, x_TEH, weights.w13_LFH, weights.w2_LHI)
    # An expert that was not chosen may overflow: it has to vanish, not to be multiplied by zero.
    y_TEH = torch.where(chosen_TE[:, :, None], y_TEH, 0.0)
    out_TH = torch.einsum("te,teh->th", weights_TE, y_TEH)
    if weights.shared_w13_FH is not None and weights.shared_w2_HI is not None:
        shared_T1H = _expert(
            config,
            x_TH.to(wide)[:, None, :],
            weights.shared_w13_FH[None],
            weights.shared_w2_HI[None],
        )
        shared_TH = shared_T1H[:, 0]
        if weights.shared_gate_1H is not None:
            gate_T = torch.einsum("th,h->t", x_TH.to(wide), weights.shared_gate_1H[0].to(wide))
            shared_TH = shared_TH / (1 + torch.exp(-gate_T))[:, None]
        out_TH = out_TH + shared_TH
    return out_TH.to(config.dtype)


def dense_routing(
    config: MoEConfig, weights: MoEWeights, x_TH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return routing weights [T, E], zero where not chosen, and the mask of chosen experts."""
    dtype = config.router_dtype
    logits_TE = torch.einsum("th,eh->te", x_TH.to(dtype), weights.router_EH.to(dtype))
    return dense_choice(config, weights, logits_TE)


def dense_choice(
    config: MoEConfig, weights: MoEWeights, logits_TE: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of logits [T, E]."""
    scores_TE = _scores(config, logits_TE)
    choice_TE = scores_TE.detach()
    if weights.correction_bias_E is not None:
        choice_TE = choice_TE + weights.correction_bias_E.detach().to(logits_TE.dtype)
    chosen_TE = _chosen(config, choice_TE)
    weights_TE = torch.where(chosen_TE, scores_TE, 0.0)
    if config.norm_topk_prob:
        weights_TE = weights_TE / (weights_TE.sum(dim=1, keepdim=True) + 1e-20)
    return weights_TE * config.routed_scaling_factor, chosen_TE


def _scores(config: MoEConfig, logits_TE: torch.Tensor) -> torch.Tensor:
    match config.scoring_func:
        case "softmax":
            below_TE = logits_TE - logits_TE.amax(dim=1, keepdim=True)  # NaN where that is infinite
            return torch.exp(below_TE - torch.log(torch.exp(below_TE).sum(dim=1, keepdim=True)))
        case "sigmoid":
            return torch.sigmoid(logits_TE)
        case _:
            return torch.sqrt(-torch.nn.functional.logsigmoid(-logits_TE))


def _chosen(config: MoEConfig, choice_TE: torch.Tensor) -> torch.Tensor:
    """Mark the experts that fewer than k experts beat, among those of the best groups."""
    group_size = config.num_experts // config.n_group
    choice_TGM = choice_TE.reshape(-1, config.n_group, group_size)
    counted = 2 if config.group_score == "top2_sum" else 1
    counts_TGM = _beaten_by(choice_TGM, _standing(choice_TGM)) < counted
    group_TG = torch.where(counts_TGM, choice_TGM, 0.0).sum(dim=2)
    kept_TG = _beaten_by(group_TG, _standing(group_TG)) < config.topk_group
    kept_TE = kept_TG.repeat_interleave(group_size, dim=1)
    standing_TE = torch.where(kept_TE, _standing(choice_TE), -1)
    return _beaten_by(choice_TE, standing_TE) < config.num_experts_per_tok


def _standing(values: torch.Tensor) -> torch.Tensor:
    """2 for numbers above -inf, 1 for NaN, 0 for -inf."""
    return (values > -math.inf).int() * 2 + (values != values).int()  # noqa: PLR0124 - NaN alone


def _beaten_by(values: torch.Tensor, standing: torch.Tensor) -> torch.Tensor:
    """Count, per entry, those of its row that stand higher, or as high and are larger or before."""
    mine, other = values[..., :, None], values[..., None, :]
    position = torch.arange(values.shape[-1], device=values.device)
    earlier = position[None, :] < position[:, None]
    differs = (standing[..., None, :] - standing[..., :, None]).sign()
    behind = (other < mine) | (~(other > mine) & ~earlier)
    return ((differs > 0) | ((differs == 0) & ~behind)).sum(dim=-1)


def _expert(
    config: MoEConfig, x_TEH: torch.Tensor, w13_EFH: torch.Tensor, w2_EHI: torch.Tensor
) -> torch.Tensor:
    wide = config.accumulate_dtype
    gate_up = _rounded(config, torch.einsum("teh,efh->tef", x_TEH, w13_EFH.to(wide)))
    size = w2_EHI.shape[2]
    hidden = _activation(config.hidden_act, _limited(config, gate_up[..., :size], low=None))
    if config.gated:
        hidden = hidden * _limited(config, gate_up[..., size:], low=config.swiglu_limit)
    return _rounded(config, torch.einsum("tei,ehi->teh", _rounded(config, hidden), w2_EHI.to(wide)))


def _limited(config: MoEConfig, values: torch.Tensor, low: float | None) -> torch.Tensor:
    if config.swiglu_limit is None:
        return values
    values = torch.where(values > config.swiglu_limit, config.swiglu_limit, values)
    return values if low is None else torch.where(values < -low, -low, values)


def _activation(name: str, z: torch.Tensor) -> torch.Tensor:
    match name:
        case "silu":
            return z * torch.sigmoid(z)
        case "gelu":
            return z * 0.5 * torch.erfc(-z / math.sqrt(2))
        case "gelu_pytorch_tanh":
            return z * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        case "relu":
            return torch.where(z > 0, z, 0.0)
        case _:
            return torch.where(z > 0, z * z, 0.0)


def _rounded(config: MoEConfig, values: torch.Tensor) -> torch.Tensor:
    return values.to(config.dtype).to(config.accumulate_dtype)
