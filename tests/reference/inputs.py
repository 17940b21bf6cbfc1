"""Configs, weights and tokens for the tests of the reference.

Legend: T tokens, H hidden_size.
"""

from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st

from twinmoe.reference.config import MoEConfig
from twinmoe.reference.config_checks import GROUP_SCORES, HIDDEN_ACTS, SCORING_FUNCS
from twinmoe.reference.weights import MoEWeights

#: A layer with every option that changes the result switched away from its neutral value.
EVERYTHING: dict[str, Any] = {
    "hidden_size": 24,
    "moe_intermediate_size": 20,
    "num_experts": 16,
    "num_experts_per_tok": 3,
    "scoring_func": "sigmoid",
    "routed_scaling_factor": 2.5,
    "n_group": 4,
    "topk_group": 2,
    "use_correction_bias": True,
    "swiglu_limit": 1.5,
    "shared_expert_intermediate_size": 12,
    "shared_expert_gate": True,
}

#: The same for the options that exclude some of those above.
PLAIN: dict[str, Any] = {
    "hidden_size": 17,
    "moe_intermediate_size": 9,
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": False,
    "hidden_act": "relu2",
    "gated": False,
    "router_weight_on_input": True,
}


def at_least(examples: int) -> settings:
    """Return the profile's settings with this many examples, or more where the profile asks."""
    return settings(max_examples=max(examples, settings().max_examples))


def fp64_config(**options: Any) -> MoEConfig:
    """Return a config that computes everything in fp64."""
    return MoEConfig(**(options | {"dtype": torch.float64, "router_dtype": torch.float64}))


def tokens(config: MoEConfig, count: int, seed: int) -> torch.Tensor:
    """Draw tokens [T, H] of unit variance in the config's dtype."""
    generator = torch.Generator().manual_seed(seed)
    x_TH = torch.randn(count, config.hidden_size, generator=generator, dtype=torch.float64)
    return x_TH.to(config.dtype)


@st.composite
def fp64_configs(draw: st.DrawFn) -> MoEConfig:
    """Draw any small fp64 config: every option, and every relation between k, experts, groups."""
    n_group = draw(st.integers(1, 4))
    group_size = draw(st.integers(1, 5))
    topk_group = draw(st.integers(1, n_group))
    gated = draw(st.booleans())
    shared = draw(st.sampled_from([0, 1, 5]))
    return fp64_config(
        hidden_size=draw(st.integers(1, 20)),
        moe_intermediate_size=draw(st.integers(1, 20)),
        num_experts=n_group * group_size,
        num_experts_per_tok=draw(st.integers(1, topk_group * group_size)),
        scoring_func=draw(st.sampled_from(SCORING_FUNCS)),
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([0.0, 1.0, 2.5])),
        n_group=n_group,
        topk_group=topk_group,
        group_score=draw(st.sampled_from(GROUP_SCORES)),
        use_correction_bias=draw(st.booleans()),
        hidden_act=draw(st.sampled_from(HIDDEN_ACTS)),
        gated=gated,
        swiglu_limit=draw(st.sampled_from([None, 0.5, 7.0])) if gated else None,
        shared_expert_intermediate_size=shared,
        shared_expert_gate=draw(st.booleans()) if shared else False,
        router_weight_on_input=draw(st.booleans()),
    )


def assert_close_per_token(actual: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    """Require every element within ``relative`` of its token's largest magnitude."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    scale = expected.abs().amax(dim=-1, keepdim=True)
    excess = (actual - expected).abs() - relative * scale
    assert not (excess > 0).any(), (
        f"{int((excess > 0).sum())} of {excess.numel()} elements differ by more than {relative} of "
        f"their token's largest magnitude; worst {float((actual - expected).abs().max()):.3e}"
    )


def assert_same_weights(one: MoEWeights, other: MoEWeights) -> None:
    """Require the same tensors, bit for bit."""
    assert one.experts == other.experts
    assert one.tensors().keys() == other.tensors().keys()
    for name, tensor in one.tensors().items():
        torch.testing.assert_close(other.tensors()[name], tensor, rtol=0, atol=0)
