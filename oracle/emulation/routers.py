"""Ways to turn logits into experts and weights, and ways that are wrong.

A Route takes logits [T, E] in fp32 and the correction bias [E] or None, and returns
(ids [T, K] int64 best first, weights [T, K] fp32).

Legend: T tokens, E experts, K experts per token.
"""

from collections.abc import Callable

from torch import Tensor

from twinmoe.oracle.emulation.casts import to_bf16
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.router import NORM_EPSILON, best, kept_experts, score

Route = Callable[[MoEConfig, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def score_then_select(
    config: MoEConfig, logits_TE: Tensor, bias_E: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Score all experts, choose, divide by the sum of the chosen scores."""
    ids_TK, weights_TK = _chosen(config, logits_TE, bias_E)
    if config.norm_topk_prob:
        weights_TK = weights_TK / (weights_TK.sum(dim=1, keepdim=True) + NORM_EPSILON)
    return ids_TK, weights_TK * config.routed_scaling_factor


def reciprocal(
    config: MoEConfig, logits_TE: Tensor, bias_E: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same, multiplying by the rounded reciprocal: one rounding more."""
    ids_TK, weights_TK = _chosen(config, logits_TE, bias_E)
    if config.norm_topk_prob:
        weights_TK = weights_TK * (1 / (weights_TK.sum(dim=1, keepdim=True) + NORM_EPSILON))
    return ids_TK, weights_TK * config.routed_scaling_factor


def select_then_score(
    config: MoEConfig, logits_TE: Tensor, bias_E: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Choose by logits, then softmax over the chosen ones alone.

    The same function as long as scores are renormalised softmax and nothing but them
    decides; any other layer is routed the ordinary way.
    """
    plain = bias_E is None and config.n_group == 1 and config.norm_topk_prob
    if not plain or config.scoring_func != "softmax":
        return score_then_select(config, logits_TE, bias_E)
    ids_TK = best(logits_TE, config.num_experts_per_tok)
    return ids_TK, logits_TE.gather(1, ids_TK).softmax(dim=1) * config.routed_scaling_factor


def bias_in_weights(
    config: MoEConfig, logits_TE: Tensor, bias_E: Tensor | None
) -> tuple[Tensor, Tensor]:
    """WRONG: weights gathered from the biased scores, which are for choosing only."""
    ids_TK, _ = _chosen(config, logits_TE, bias_E)
    scores_TE = score(config, logits_TE)
    weights_TK = (scores_TE if bias_E is None else scores_TE + bias_E).gather(1, ids_TK)
    if config.norm_topk_prob:
        weights_TK = weights_TK / (weights_TK.sum(dim=1, keepdim=True) + NORM_EPSILON)
    return ids_TK, weights_TK * config.routed_scaling_factor


def bf16_weights(
    config: MoEConfig, logits_TE: Tensor, bias_E: Tensor | None
) -> tuple[Tensor, Tensor]:
    """WRONG: weights cast to bf16, as to the dtype of the activations they multiply."""
    ids_TK, weights_TK = score_then_select(config, logits_TE, bias_E)
    return ids_TK, to_bf16(weights_TK)


def bf16_logits(
    config: MoEConfig, logits_TE: Tensor, bias_E: Tensor | None
) -> tuple[Tensor, Tensor]:
    """WRONG: the router's GEMM stores its result in bf16."""
    return score_then_select(config, to_bf16(logits_TE), bias_E)


def _chosen(config: MoEConfig, logits_TE: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    scores_TE = score(config, logits_TE)
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    ids_TK = best(choice_TE, config.num_experts_per_tok, among=kept_experts(config, choice_TE))
    return ids_TK, scores_TE.gather(1, ids_TK)
