"""Correct variations of the router: other formulations of the same function.

Legend: T tokens, H hidden_size, E experts, K experts per token.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from twinmoe.oracle.case import Case
from twinmoe.oracle.faults.fault import variant
from twinmoe.oracle.faults.seams import Seams, Wrong
from twinmoe.oracle.faults.triggers import has_tokens, several_experts
from twinmoe.oracle.faults.wrong_routers import ROUTERS, StepwiseRouter, route_by
from twinmoe.oracle.inputs import weights_for
from twinmoe.reference.router import NORM_EPSILON


def _scores_by(function: str) -> Any:
    return lambda case: has_tokens(case) and case.config.scoring_func == function


@variant("the router is plain PyTorch instead of two kernels", when=has_tokens)
def unfused_router(seams: Seams) -> None:
    """The steps of record, one by one."""
    route_by(seams, StepwiseRouter)


class _SplitLogits(StepwiseRouter):
    def logits(self, x_TH: Tensor) -> Tensor:
        middle = max(1, x_TH.shape[1] // 3)
        router_EH = self.weights.router_EH.float()
        head = x_TH[:, :middle].float() @ router_EH[:, :middle].T
        return x_TH[:, middle:].float() @ router_EH[:, middle:].T + head


@variant("logits are summed in two parts, the later one first", when=has_tokens)
def split_logits(seams: Seams) -> None:
    """Split-K, as libraries choose it for long sums."""
    route_by(seams, _SplitLogits)


class _WideLogits(StepwiseRouter):
    def logits(self, x_TH: Tensor) -> Tensor:
        return (x_TH.double() @ self.weights.router_EH.double().T).float()


@variant("logits are summed in fp64 and rounded once", when=has_tokens)
def wide_logits(seams: Seams) -> None:
    """More precise than promised."""
    route_by(seams, _WideLogits)


class _ReciprocalNorm(StepwiseRouter):
    def normalise(self, weights_TK: Tensor) -> Tensor:
        if not self.config.norm_topk_prob:
            return weights_TK
        return weights_TK * (1 / (weights_TK.sum(dim=1, keepdim=True) + NORM_EPSILON))


@variant(
    "weights are multiplied by the reciprocal of their sum",
    when=lambda case: has_tokens(case) and case.config.norm_topk_prob,
)
def reciprocal_norm(seams: Seams) -> None:
    """One more rounding in fp32, an ulp of the weight."""
    route_by(seams, _ReciprocalNorm)


class _LateSoftmax(StepwiseRouter):
    def weighed_by(self, logits_TE: Tensor, _scores_TE: Tensor, _choice_TE: Tensor) -> Tensor:
        return logits_TE

    def normalise(self, weights_TK: Tensor) -> Tensor:
        return weights_TK.softmax(dim=1)


@variant(
    "softmax is taken over the chosen logits alone, which renormalises it",
    when=lambda case: _scores_by("softmax")(case) and case.config.norm_topk_prob,
)
def softmax_after_choice(seams: Seams) -> None:
    """The same function as softmax, choice, renormalisation."""
    route_by(seams, _LateSoftmax)


class _BinarySigmoid(StepwiseRouter):
    def weighed_by(self, logits_TE: Tensor, _scores_TE: Tensor, _choice_TE: Tensor) -> Tensor:
        return 1 / (1 + torch.exp2(logits_TE * -math.log2(math.e)))


@variant("weights are computed through powers of two", when=_scores_by("sigmoid"))
def binary_sigmoid(seams: Seams) -> None:
    """As GPUs compute exp."""
    route_by(seams, _BinarySigmoid)


def _has_finite_bias(case: Case) -> bool:
    bias_E = weights_for(case).correction_bias_E
    return bias_E is None or bool(bias_E.isfinite().all())


class _LowMask(StepwiseRouter):
    def limit(self, choice_TE: Tensor) -> Tensor:
        limited_TE = super().limit(choice_TE)
        return limited_TE.masked_fill(limited_TE == -torch.inf, torch.finfo(torch.float32).min)


@variant(
    "experts of refused groups are masked by the lowest number instead of -inf",
    when=lambda case: has_tokens(case) and case.config.n_group > 1 and _has_finite_bias(case),
)
def lowest_mask(seams: Seams) -> None:
    """Below every score that is a number."""
    route_by(seams, _LowMask)


@variant("a token's slots are in the order of expert ids, not of scores", when=several_experts)
def slots_by_id(seams: Seams) -> None:
    """The set of experts is the answer; its order is nobody's business."""

    def sort(forward: Wrong, router: Any, *args: Any) -> Any:
        routing = forward(router, *args)
        ids_TK, order = routing.ids_TK.sort(dim=1, stable=True)
        weights_TK = routing.weights_TK.gather(1, order)
        return replace(routing, ids_TK=ids_TK.contiguous(), weights_TK=weights_TK.contiguous())

    for router in ROUTERS:
        seams.around(router, "forward", sort)


def _never_ties(case: Case) -> bool:
    return has_tokens(case) and case.routing == "free"


class _HighestFirst(StepwiseRouter):
    def pick(self, limited_TE: Tensor) -> Tensor:
        return limited_TE.topk(self.config.num_experts_per_tok, dim=1).indices


@variant("experts are chosen by topk, which leaves the order of ties open", when=_never_ties)
def unstable_topk(seams: Seams) -> None:
    """Right wherever scores differ."""
    route_by(seams, _HighestFirst)
