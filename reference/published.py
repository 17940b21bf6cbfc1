"""Geometries of published models, to try a layer at shapes that people run.

Sources: the ``config.json`` of mistralai/Mixtral-8x7B-v0.1, Qwen/Qwen3-30B-A3B and
deepseek-ai/DeepSeek-V3 on the Hugging Face hub.
"""

from dataclasses import replace

from twinmoe.reference.config import ConfigError, MoEConfig

#: The MoE layer of each model, by a short name.
PUBLISHED: dict[str, MoEConfig] = {
    "mixtral-8x7b": MoEConfig(
        hidden_size=4096,
        moe_intermediate_size=14336,
        num_experts=8,
        num_experts_per_tok=2,
    ),
    "qwen3-30b-a3b": MoEConfig(
        hidden_size=2048,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
    ),
    "deepseek-v3": MoEConfig(
        hidden_size=7168,
        moe_intermediate_size=2048,
        num_experts=256,
        num_experts_per_tok=8,
        scoring_func="sigmoid",
        routed_scaling_factor=2.5,
        n_group=8,
        topk_group=4,
        use_correction_bias=True,
        shared_expert_intermediate_size=2048,
    ),
}

#: Scaled sizes stay multiples of this, the width of a tensor-core tile.
SIZE_STEP = 16


def published(name: str) -> MoEConfig:
    """Return a published geometry; raises ConfigError naming the known ones."""
    if name not in PUBLISHED:
        raise ConfigError(
            f"model ({name}) is not a published geometry known here: choose one of "
            f"{', '.join(PUBLISHED)}"
        )
    return PUBLISHED[name]


def scaled(config: MoEConfig, scale: int) -> MoEConfig:
    """Divide the hidden and intermediate sizes by ``scale``; experts, k and groups stay.

    Sizes are rounded down to multiples of 16 and are at least 16.
    """
    if scale < 1:
        raise ConfigError(f"scale ({scale}) must be at least 1: it divides sizes; use 1 for none")

    def shrink(size: int) -> int:
        return max(SIZE_STEP, size // scale // SIZE_STEP * SIZE_STEP)

    return replace(
        config,
        hidden_size=shrink(config.hidden_size),
        moe_intermediate_size=shrink(config.moe_intermediate_size),
        shared_expert_intermediate_size=(
            shrink(config.shared_expert_intermediate_size) if config.has_shared_expert else 0
        ),
    )
