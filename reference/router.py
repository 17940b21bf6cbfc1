"""The router: which experts a token visits, and with which weights.

Legend: T tokens, H hidden_size, E experts, K experts per token, G expert groups.
"""

from dataclasses import dataclass

import torch
from torch import nn

from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights

#: Keeps the normalisation of all-zero scores finite, as published models do.
NORM_EPSILON = 1e-20


@dataclass(frozen=True, eq=False)
class Routing:
    """Chosen experts, best first, and their weights.

    ``ids_TK`` int64, k distinct global expert ids per token; ``weights_TK`` in the router dtype.
    """

    ids_TK: torch.Tensor
    weights_TK: torch.Tensor


class TopKRouter(nn.Module):
    """Scores all experts, chooses by biased score within the best groups, weighs by plain score.

    The correction bias and the limit to groups are DeepSeek-V3's (arXiv 2412.19437, section
    2.1.2); without them this is the router of Mixtral (arXiv 2401.04088) and Qwen3-MoE.

    Experts are ranked by one total order, and groups by the same one on their scores, which are
    IEEE sums (so inf - inf is NaN): numbers by value, +inf first; then NaN; then -inf, the bias of
    an expert that is disabled; last what lies outside the kept groups.  Within each of these the
    lowest index wins a tie.  See docs/equivalence.md for why.
    """

    def __init__(self, config: MoEConfig, weights: MoEWeights) -> None:
        super().__init__()
        self.config = config
        self.weights = weights

    def forward(self, x_TH: torch.Tensor) -> Routing:
        """Route tokens [T, H] of the config's dtype."""
        dtype = self.config.router_dtype
        return self.choose(x_TH.to(dtype) @ self.weights.router_EH.to(dtype).T)

    def choose(self, logits_TE: torch.Tensor) -> Routing:
        """Route tokens of these logits [T, E]."""
        scores_TE = score(self.config, logits_TE)
        ids_TK = self.select(scores_TE.detach())
        weights_TK = scores_TE.gather(1, ids_TK)
        if self.config.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(dim=1, keepdim=True) + NORM_EPSILON)
        return Routing(ids_TK, weights_TK * self.config.routed_scaling_factor)

    def select(self, scores_TE: torch.Tensor) -> torch.Tensor:
        """Choose k distinct experts per token from unbiased scores [T, E]."""
        choice_TE = scores_TE
        if self.weights.correction_bias_E is not None:
            choice_TE = choice_TE + self.weights.correction_bias_E.detach().to(scores_TE.dtype)
        kept_TE = kept_experts(self.config, choice_TE)
        return best(choice_TE, self.config.num_experts_per_tok, among=kept_TE)


def score(config: MoEConfig, logits_TE: torch.Tensor) -> torch.Tensor:
    """Turn logits into scores, in the same dtype."""
    if config.scoring_func == "softmax":
        return logits_TE.softmax(dim=1)
    if config.scoring_func == "sigmoid":
        return logits_TE.sigmoid()
    # Not F.softplus: it is the identity above 20, which fp64 can tell from the function.
    return logits_TE.logaddexp(torch.zeros_like(logits_TE)).sqrt()


def kept_experts(config: MoEConfig, choice_TE: torch.Tensor) -> torch.Tensor:
    """Bool [T, E]: the experts of the ``topk_group`` best groups."""
    group_size = config.num_experts // config.n_group
    choice_TGE = choice_TE.view(-1, config.n_group, group_size)
    counted = 2 if config.group_score == "top2_sum" else 1
    top_TGC = choice_TGE.gather(2, best(choice_TGE, counted))
    groups_TG = best(top_TGC.sum(dim=2), config.topk_group)
    kept_TG = torch.zeros_like(choice_TGE[:, :, 0], dtype=torch.bool).scatter(1, groups_TG, True)
    return kept_TG.repeat_interleave(group_size, dim=1)


def best(values: torch.Tensor, count: int, among: torch.Tensor | None = None) -> torch.Tensor:
    """Indices of the ``count`` first along the last dimension, in the order of ``TopKRouter``.

    ``among`` (bool, as ``values``) marks those that come before all others.
    """
    # Not torch.topk: it leaves the order of equal values open, and ranks NaN first.
    order = values.masked_fill(values.isnan(), -torch.inf).argsort(
        dim=-1, descending=True, stable=True
    )
    kind = torch.where(values.isnan(), 1, torch.where(values == -torch.inf, 0, 2))
    if among is not None:
        kind = kind.masked_fill(~among, -1)
    by_kind = kind.gather(-1, order).argsort(dim=-1, descending=True, stable=True)
    return order.gather(-1, by_kind)[..., :count]
