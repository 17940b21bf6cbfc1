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
    2.1.2); without them this is the router of Mixtral (arXiv 2401.04088) and Qwen3-MoE.  On an
    exact tie the lowest expert id wins, among groups the lowest group.  A NaN score loses against
    every other one.
    """

    def __init__(self, config: MoEConfig, weights: MoEWeights) -> None:
        super().__init__()
        self.config = config
        self.weights = weights

    def forward(self, x_TH: torch.Tensor) -> Routing:
        """Route tokens [T, H] of the config's dtype."""
        dtype = self.config.router_dtype
        logits_TE = x_TH.to(dtype) @ self.weights.router_EH.to(dtype).T
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
        lowest = torch.finfo(choice_TE.dtype).min
        # a NaN, and an expert that a bias of -inf disables, lose to all others of their group
        choice_TE = choice_TE.masked_fill(choice_TE.isnan(), lowest).clamp(min=lowest)
        choice_TE = limit_to_groups(self.config, choice_TE)
        return best(choice_TE, self.config.num_experts_per_tok)


def score(config: MoEConfig, logits_TE: torch.Tensor) -> torch.Tensor:
    """Turn logits into scores, in the same dtype."""
    if config.scoring_func == "softmax":
        return logits_TE.softmax(dim=1)
    if config.scoring_func == "sigmoid":
        return logits_TE.sigmoid()
    # Not F.softplus: it is the identity above 20, which fp64 can tell from the function.
    return logits_TE.logaddexp(torch.zeros_like(logits_TE)).sqrt()


def limit_to_groups(config: MoEConfig, choice_TE: torch.Tensor) -> torch.Tensor:
    """Put every expert outside the ``topk_group`` best groups out of reach, at -inf."""
    group_size = config.num_experts // config.n_group
    choice_TGE = choice_TE.view(-1, config.n_group, group_size)
    ranked_TGE = choice_TGE.sort(dim=2, descending=True).values
    counted = 2 if config.group_score == "top2_sum" else 1
    groups_TG = best(ranked_TGE[:, :, :counted].sum(dim=2), config.topk_group)
    kept_TG = torch.zeros_like(choice_TGE[:, :, 0], dtype=torch.bool).scatter(1, groups_TG, True)
    return choice_TGE.masked_fill(~kept_TG.unsqueeze(2), -torch.inf).flatten(1)


def best(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return the indices of the ``count`` largest values per row, the lowest index on a tie."""
    # Not torch.topk: it leaves the order of equal values open.
    order = values.argsort(dim=1, descending=True, stable=True)
    return order[:, :count]
