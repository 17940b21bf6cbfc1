"""Faults of routers and of their scaling: with which weights a token's experts count."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from twinmoe.optimized.layer import MoELayer
from twinmoe.optimized.shared_expert import InferenceSharedExpert
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults.fault import fault
from twinmoe.oracle.faults.misread import misread
from twinmoe.oracle.faults.seams import Seams, Wrong
from twinmoe.oracle.faults.triggers import (
    bucket_of,
    has_bias,
    has_shared,
    has_tokens,
    in_graph,
    scaled,
)
from twinmoe.oracle.faults.wrong_routers import (
    ROUTERS,
    StepwiseRouter,
    route_by,
    routes_otherwise,
)
from twinmoe.reference.config import MoEConfig

# --- the bias ---------------------------------------------------------------------------------


class _Biased(StepwiseRouter):
    def weighed_by(self, _logits_TE: Tensor, _scores_TE: Tensor, choice_TE: Tensor) -> Tensor:
        return choice_TE


@fault(
    "RT01",
    "vllm-project/vllm#12002",
    "the correction bias, meant for selection, also enters the weights",
    stage="router",
    when=routes_otherwise(_Biased),
)
def bias_in_weights(seams: Seams) -> None:
    """Weights are gathered from the biased score."""
    route_by(seams, _Biased)


class _BiasedShares(_Biased):
    def weighed_by(self, _logits_TE: Tensor, scores_TE: Tensor, choice_TE: Tensor) -> Tensor:
        return choice_TE if self.config.scoring_func == "softmax" else scores_TE


@fault(
    "RT24",
    "huggingface/transformers#39581",
    "bias-corrected probabilities of a softmax are used as weights",
    stage="router",
    when=lambda case: has_bias(case) and routes_otherwise(_BiasedShares)(case),
)
def biased_probabilities(seams: Seams) -> None:
    """As above, in a model that ranks probabilities: weights are the top-k's own values."""
    route_by(seams, _BiasedShares)


# --- normalisation ----------------------------------------------------------------------------


class _NoEpsilon(StepwiseRouter):
    def normalise(self, weights_TK: Tensor) -> Tensor:
        if not self.config.norm_topk_prob:
            return weights_TK
        return weights_TK / weights_TK.sum(dim=1, keepdim=True)


@fault(
    "RT06",
    "flashinfer-ai/flashinfer#3803, flashinfer-ai/flashinfer#3946",
    "weights are divided by their sum without the epsilon that keeps 0 / 0 finite",
    stage="router",
    when=routes_otherwise(_NoEpsilon),
)
def no_epsilon(seams: Seams) -> None:
    """Where all chosen scores vanish, the row is NaN, or normalised up from next to nothing."""
    route_by(seams, _NoEpsilon)


class _OverTokens(StepwiseRouter):
    def normalise(self, weights_TK: Tensor) -> Tensor:
        if self.config.num_experts_per_tok > 1 or not self.config.norm_topk_prob:
            return super().normalise(weights_TK)
        weights_T = weights_TK.squeeze(1)
        return (weights_T / weights_T.sum(dim=-1))[:, None]


def _several_rows_of_one(case: Case) -> bool:
    config = case.config
    rows = bucket_of(case) if in_graph(case) else max(case.tokens)
    one_normalised = config.num_experts_per_tok == 1 and config.norm_topk_prob
    return has_tokens(case) and one_normalised and rows > 1


@fault(
    "RT14",
    "databricks/megablocks#87",
    "with k = 1 the weights lose their last axis and are normalised over the batch",
    stage="router",
    when=_several_rows_of_one,
)
def normalised_over_tokens(seams: Seams) -> None:
    """A token's weight depends on its neighbours, padding rows included."""
    route_by(seams, _OverTokens)


class _RawLogits(StepwiseRouter):
    def weighed_by(self, logits_TE: Tensor, scores_TE: Tensor, _choice_TE: Tensor) -> Tensor:
        is_raw = self.config.scoring_func == "softmax" and not self.config.norm_topk_prob
        return logits_TE if is_raw else scores_TE


@fault(
    "RT12",
    "sgl-project/sglang#35160",
    "without normalisation the softmax is skipped too: weights are raw logits",
    stage="router",
    when=routes_otherwise(_RawLogits),
)
def raw_logits(seams: Seams) -> None:
    """The softmax stands inside the branch that normalises."""
    route_by(seams, _RawLogits)


# --- the scaling factor -----------------------------------------------------------------------


def _unscaled(config: MoEConfig) -> MoEConfig:
    return replace(config, routed_scaling_factor=1.0)


@fault(
    "RT08",
    "vllm-project/vllm#24119, vllm-project/vllm#45037",
    "the routed scaling factor, already in the weights, is applied again to the sum",
    stage="combine",
    when=scaled,
)
def scaled_twice(seams: Seams) -> None:
    """The model multiplies what its experts return, as it did before the top-k took over."""

    def scale(path: Wrong, layer: Any, *args: Any) -> Tensor:
        routed_TH: Tensor = path(layer, *args)
        factor: float = layer.config.routed_scaling_factor
        return routed_TH * factor

    seams.around(MoELayer, "_eager_path", scale)
    seams.around(MoELayer, "_graphed_path", scale)


@fault(
    "RT09",
    "sgl-project/sglang#8511",
    "experts spread over ranks never see the routed scaling factor",
    stage="router",
    when=lambda case: scaled(case) and case.ep_size > 1,
)
def unscaled_when_parallel(seams: Seams) -> None:
    """The factor is lost with more than one rank only."""
    if seams.context.world_size > 1:
        misread(seams, ROUTERS, _unscaled)


@fault(
    "RT11",
    "sgl-project/sglang-jax#1282",
    "the routed scaling factor is applied only where weights are normalised",
    stage="router",
    when=lambda case: scaled(case) and not case.config.norm_topk_prob,
)
def scaled_if_normalised(seams: Seams) -> None:
    """The multiplication slipped into the branch of the normalisation."""
    misread(seams, ROUTERS, lambda config: config if config.norm_topk_prob else _unscaled(config))


@fault(
    "RT22",
    "sgl-project/sglang#28237",
    "the shared expert is divided by the scaling factor, and nothing multiplies it back",
    stage="output",
    when=lambda case: has_shared(case) and scaled(case),
)
def shared_scaled_down(seams: Seams) -> None:
    """Right where a later step scales routed and shared together; here no step does."""

    def divide(forward: Wrong, shared: Any, x_TH: Tensor) -> Tensor:
        y_TH: Tensor = forward(shared, x_TH)
        factor: float = shared.config.routed_scaling_factor
        return y_TH / factor

    seams.around(InferenceSharedExpert, "forward", divide)
