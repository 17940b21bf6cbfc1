"""Published widths on GPUs: weights drawn where they are used, few tokens, every expert's truth.

Legend: H hidden_size, F rows of w13, L local experts, E experts.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from twinmoe.optimized import launch
from twinmoe.optimized.communication.eligibility import Tier
from twinmoe.optimized.communication.pool_setup import release_pools
from twinmoe.optimized.graph import GraphRunner
from twinmoe.optimized.layer import MoELayer
from twinmoe.optimized.options import InferenceOptions
from twinmoe.oracle.observation import RankObservation, Taps
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.config import DTYPES, MoEConfig
from twinmoe.reference.placement import Placement
from twinmoe.reference.published import published
from twinmoe.reference.weights import MoEWeights

#: Tokens of each rank in the judged batch, by expert-parallel size: unequal, and none on one.
TOKENS = {1: (5,), 2: (3, 0), 4: (2, 0, 1, 3), 8: (2, 0, 1, 3, 1, 0, 2, 1)}


@cache
def geometry(model: str, dtype: str) -> MoEConfig:
    """A published layer in ``dtype``."""
    return replace(published(model), dtype=DTYPES[dtype])


@dataclass(frozen=True)
class DrawnWeights:
    """Weights made on demand on one GPU: the truth needs a few experts, not all of them."""

    config: MoEConfig
    device: torch.device

    @property
    def router_EH(self) -> Tensor:
        """[E, H]."""
        return self._draw(1, (self.config.num_experts, self.config.hidden_size), 1.5)

    @property
    def correction_bias_E(self) -> Tensor | None:
        """fp32 [E]."""
        if not self.config.use_correction_bias:
            return None
        return self._draw(2, (self.config.num_experts,), 1.0).float() / 16

    @property
    def shared_w13_FH(self) -> Tensor | None:
        """[F, H]."""
        size = self.config.shared_expert_intermediate_size
        return self._draw(3, (2 * size, self.config.hidden_size), 1.4) if size else None

    @property
    def shared_w2_HI(self) -> Tensor | None:
        """[H, I]."""
        size = self.config.shared_expert_intermediate_size
        return self._draw(4, (self.config.hidden_size, size), 1.0) if size else None

    @property
    def shared_gate_1H(self) -> Tensor | None:
        """No published geometry here has one."""
        return None

    def expert(self, expert: int) -> tuple[Tensor, Tensor]:
        """(w13 [F, H], w2 [H, I]) of one expert."""
        config = self.config
        w13 = self._draw(2 * expert + 10, (config.w13_rows, config.hidden_size), 1.4)
        shape = config.hidden_size, config.moe_intermediate_size
        return w13, self._draw(2 * expert + 11, shape, 0.75 + expert / config.num_experts)

    def of(self, experts: range) -> MoEWeights:
        """A rank's shard."""
        pairs = [self.expert(expert) for expert in experts]
        return MoEWeights(
            router_EH=self.router_EH,
            correction_bias_E=self.correction_bias_E,
            w13_LFH=torch.stack([w13 for w13, _ in pairs]),
            w2_LHI=torch.stack([w2 for _, w2 in pairs]),
            shared_w13_FH=self.shared_w13_FH,
            shared_w2_HI=self.shared_w2_HI,
            shared_gate_1H=None,
            experts=experts,
        )

    def _draw(self, key: int, shape: tuple[int, ...], scale: float) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(key)
        values = torch.empty(shape, dtype=torch.float32, device=self.device)
        values.normal_(std=scale * shape[-1] ** -0.5, generator=generator)
        return values.to(self.config.dtype)


#: This rank's weights of the last geometry: drawn once for all paths.
_held: dict[tuple[str, str], MoEWeights] = {}


def observe(
    context: RankContext, model: str, dtype: str, path: tuple[str, str, str]
) -> RankObservation:
    """Run one path (transport, mode, backend) of the optimized layer on this rank."""
    config = geometry(model, dtype)
    if (model, dtype) not in _held:
        _held.clear()
        owned = Placement(config.num_experts, context.world_size).experts_of(context.rank)
        _held[model, dtype] = DrawnWeights(config, context.device).of(owned)
    release_pools(context.group)
    transport, mode, backend = path
    bucket = max(TOKENS[context.world_size])
    options = InferenceOptions(
        transport=Tier.P2P if transport == "p2p" else Tier.COLLECTIVE,
        experts_backend=backend,
        max_tokens_per_rank=bucket,
    )
    layer = MoELayer(config, _held[model, dtype], context.group, options)
    layer.taps = {}
    runner = GraphRunner(layer, (bucket,))
    if mode == "replayed":
        earlier = hidden(config, context.world_size, context.rank, 1)
        runner(earlier.to(context.device), bucket)
    hidden_TH = hidden(config, context.world_size, context.rank).to(context.device)
    before = launch.COUNTS.copy()
    if mode == "eager":
        padded_NH = torch.full(
            (bucket, config.hidden_size), torch.nan, dtype=config.dtype, device=context.device
        )
        padded_NH[: len(hidden_TH)] = hidden_TH
        num_valid = torch.tensor([len(hidden_TH)], dtype=torch.int32, device=context.device)
        with layer.graphed():
            output_TH = layer(padded_NH, num_valid)[: len(hidden_TH)]
        taps = layer.taps
    else:
        output_TH = runner(hidden_TH, bucket)
        taps = runner.capture(bucket).taps
    launches = launch.COUNTS - before
    with layer.graphed():
        claim = str(layer.path_report())
    return RankObservation(output_TH, _shown(taps, len(hidden_TH)), claim, launches)


def _shown(taps: dict[str, Tensor], tokens: int) -> Taps:
    return Taps(
        ids_TK=taps["ids"][:tokens],
        weights_TK=taps["weights"][:tokens],
        gathered_hidden=taps["gathered_hidden"],
        gathered_ids=taps["gathered_ids"],
        gathered_weights=taps["gathered_weights"],
        partial=taps["partial"],
        routed_TH=taps["routed"][:tokens],
    )


def hidden(config: MoEConfig, size: int, rank: int, earlier: int = 0) -> Tensor:
    """The rank's batch; ``earlier`` batches ago it had its neighbour's number of tokens."""
    tokens = TOKENS[size][(rank + earlier) % size]
    generator = torch.Generator().manual_seed(100 * earlier + rank)
    return torch.randn(tokens, config.hidden_size, generator=generator).to(config.dtype)
