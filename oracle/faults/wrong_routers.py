"""Routers with one step wrong, planted on either path, and when that step matters.

Legend: T tokens, H hidden_size, E experts, K experts per token.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from twinmoe.optimized import router as fused
from twinmoe.optimized.router import InferenceTopKRouter
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults.fault import Reaches
from twinmoe.oracle.faults.seams import Seams, Wrong
from twinmoe.oracle.faults.triggers import has_tokens
from twinmoe.oracle.inputs import hidden_for, weights_for
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.router import NORM_EPSILON, Routing, TopKRouter, best, kept_experts, score

#: The graphed path's router and the eager one's.
ROUTERS = (InferenceTopKRouter, TopKRouter)

#: Answers that differ by less are the same up to rounding.
_ROUNDING = 1e-4


class StepwiseRouter(TopKRouter):
    """The routing of record, cut into steps so that a fault replaces one."""

    #: Padding rows of a graph's bucket name no expert.
    masks_padding: ClassVar[bool] = True

    def forward(self, x_TH: Tensor) -> Routing:
        """Route tokens [T, H]; a slot without an expert (id -1) has no weight either."""
        logits_TE = self.logits(x_TH)
        scores_TE = score(self.config, logits_TE)
        choice_TE = self.choice(scores_TE)
        ids_TK = self.pick(self.limit(choice_TE))
        taken_TK = ids_TK.clamp(0, self.config.num_experts - 1)
        weights_TK = self.weighed_by(logits_TE, scores_TE, choice_TE).gather(1, taken_TK)
        weights_TK = weights_TK.masked_fill(ids_TK < 0, 0.0)
        return Routing(ids_TK, self.scale(self.normalise(weights_TK)))

    def logits(self, x_TH: Tensor) -> Tensor:
        """One logit for each expert."""
        dtype = self.config.router_dtype
        return x_TH.to(dtype) @ self.weights.router_EH.to(dtype).T

    def choice(self, scores_TE: Tensor) -> Tensor:
        """What experts are ranked by: biased scores."""
        return self.biased(scores_TE)

    def biased(self, scores_TE: Tensor) -> Tensor:
        """Scores plus the correction bias, if there is one."""
        bias_E = self.weights.correction_bias_E
        return scores_TE if bias_E is None else scores_TE + bias_E

    def limit(self, choice_TE: Tensor) -> Tensor:
        """Numbers in the order of experts, those of the groups that are out at -inf."""
        kept_TE = kept_experts(self.config, choice_TE)
        return self.ordered(choice_TE).masked_fill(~kept_TE, -torch.inf)

    def ordered(self, choice_TE: Tensor) -> Tensor:
        """Numbers in fp64 that stand in the order of ``TopKRouter``: NaN low, -inf lower."""
        return choice_TE.double().nan_to_num(nan=-1e300, posinf=torch.inf, neginf=-1e301)

    def pick(self, limited_TE: Tensor) -> Tensor:
        """The ids of the chosen experts, best first."""
        return best(limited_TE, self.config.num_experts_per_tok)

    def weighed_by(self, _logits_TE: Tensor, scores_TE: Tensor, _choice_TE: Tensor) -> Tensor:
        """What the chosen experts' weights are read from."""
        return scores_TE

    def normalise(self, weights_TK: Tensor) -> Tensor:
        """Weights that sum to one, where the layer asks for them."""
        if not self.config.norm_topk_prob:
            return weights_TK
        return weights_TK / (weights_TK.sum(dim=1, keepdim=True) + NORM_EPSILON)

    def scale(self, weights_TK: Tensor) -> Tensor:
        """Weights times the routed scaling factor."""
        return weights_TK * self.config.routed_scaling_factor


def route_by(seams: Seams, wrong: type[StepwiseRouter], routers: Sequence[type] = ROUTERS) -> None:
    """Let ``routers`` answer what ``wrong`` does."""

    def eager(_forward: Wrong, router: Any, x_TH: Tensor) -> Routing:
        return wrong(router.config, router.weights)(x_TH)  # type: ignore[no-any-return]

    def graphed(
        _forward: Wrong, router: Any, x_TH: Tensor, num_valid: Tensor | None = None
    ) -> fused.Routing:
        routing = eager(_forward, router, x_TH)
        ids_TK, weights_TK = routing.ids_TK.int(), routing.weights_TK
        if num_valid is not None and wrong.masks_padding:
            is_padding = (torch.arange(len(x_TH), device=x_TH.device) >= num_valid)[:, None]
            ids_TK = ids_TK.masked_fill(is_padding, -1)
            weights_TK = weights_TK.masked_fill(is_padding, 0.0)
        return fused.Routing(ids_TK.contiguous(), weights_TK.contiguous())

    for router in routers:
        seams.around(router, "forward", eager if issubclass(router, TopKRouter) else graphed)


# --- when it matters --------------------------------------------------------------------------


def routes_otherwise(
    wrong: type[TopKRouter],
    changed: Callable[[MoEConfig], MoEConfig] | None = None,
    by: float = _ROUNDING,
) -> Reaches:
    """Whether ``wrong``, on the ``changed`` settings, answers otherwise on the case's tokens.

    Otherwise: other experts, or weights that differ ``by`` more than that share of them.
    """

    def differs(case: Case) -> bool:
        if not has_tokens(case):
            return False
        config = changed(case.config) if changed else case.config
        weights = weights_for(case, range(1))
        x_TH = torch.cat([hidden_for(case, rank) for rank in range(case.ep_size)])
        right = _by_expert(TopKRouter(case.config, weights)(x_TH), config.num_experts)
        other = _by_expert(wrong(config, weights)(x_TH), config.num_experts)
        return not torch.allclose(right, other, rtol=by, atol=0, equal_nan=True)

    return differs


def _by_expert(routing: Routing, experts: int) -> Tensor:
    """How often each token visits each expert, and with which weight: [T, E + 1, 2].

    The last column is for ids that are no expert's.
    """
    is_expert = (routing.ids_TK >= 0) & (routing.ids_TK < experts)
    ids_TK = routing.ids_TK.where(is_expert, experts)
    visits_TK = torch.stack([torch.ones_like(routing.weights_TK), routing.weights_TK], dim=-1)
    empty = visits_TK.new_zeros(len(ids_TK), experts + 1, 2)
    return empty.scatter_add(1, ids_TK[..., None].expand(-1, -1, 2), visits_TK)
