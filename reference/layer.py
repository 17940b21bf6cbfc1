"""The Mixture-of-Experts layer: route, dispatch, compute, combine.

Legend: T tokens, H hidden_size, K experts per token, S slots on this rank.
"""

import torch
import torch.distributed as dist
from torch import nn

from twinmoe.reference.config import ConfigError, MoEConfig
from twinmoe.reference.dispatch import MoEAlltoAllTokenDispatcher
from twinmoe.reference.experts import SequentialMLP
from twinmoe.reference.placement import Placement
from twinmoe.reference.router import Routing, TopKRouter
from twinmoe.reference.shared_expert import SharedExpertMLP
from twinmoe.reference.weights import MoEWeights


class MoELayer(nn.Module):
    """One rank's part of the layer; ``weights`` are this rank's shard.

    ``group`` None means a single rank.  Every rank of the group calls ``forward`` (and
    ``backward``) the same number of times, with any number of tokens, also none.  Sums and
    activations are taken in ``config.accumulate_dtype``; what is stored between steps, and the
    output, is rounded to ``config.dtype``.  Gradients flow to the tensors in ``weights``.

    Raises ConfigError when config, weights and group do not belong together.
    """

    def __init__(
        self, config: MoEConfig, weights: MoEWeights, group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__()
        rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
        config.check_ep_size(ranks)
        placement = Placement(config.num_experts, ranks)
        weights.check(config, placement.experts_of(rank))
        self.config = config
        self.device = weights.router_EH.device
        self.router = TopKRouter(config, weights)
        self.dispatcher = MoEAlltoAllTokenDispatcher(placement, group)
        self.experts = SequentialMLP(config, weights)
        self.shared_expert = SharedExpertMLP(config, weights) if config.has_shared_expert else None

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Return [T, H] for tokens [T, H], both in ``config.dtype``.

        Raises ConfigError for other tokens, and then PeerError on the other ranks.
        """
        # every cast below is meant: autocast would add its own
        with torch.autocast(self.device.type, enabled=False):
            return self._forward(x_TH)

    def _forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        with self.dispatcher.told_to_peers(self.device):
            self._check_input(x_TH)
            routing = self.router(x_TH)
            rows_TKH, weights_TK = self._weigh(x_TH, routing)
        x_SH, local_expert_S, metadata = self.dispatcher.token_dispatch(rows_TKH, routing.ids_TK)
        y_SH = self.experts(x_SH, local_expert_S)
        y_TKH = self.dispatcher.token_combine(y_SH, metadata)
        out_TH = (weights_TK.unsqueeze(2) * y_TKH.to(self.config.accumulate_dtype)).sum(dim=1)
        if self.shared_expert is not None:
            out_TH = out_TH + self.shared_expert(x_TH)
        return out_TH.to(self.config.dtype)

    def _weigh(self, x_TH: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the row of each (token, expert) pair and the weight of the pair's output."""
        weights_TK = routing.weights_TK.to(self.config.accumulate_dtype)
        rows_TKH = x_TH.unsqueeze(1).expand(-1, self.config.num_experts_per_tok, -1)
        if not self.config.router_weight_on_input:
            return rows_TKH, weights_TK
        weighted_TKH = (weights_TK.unsqueeze(2) * rows_TKH.to(weights_TK.dtype)).to(x_TH.dtype)
        return weighted_TKH, torch.ones_like(weights_TK)

    def _check_input(self, x_TH: torch.Tensor) -> None:
        hidden_size, dtype = self.config.hidden_size, self.config.dtype
        shaped = x_TH.dim() == 2 and x_TH.shape[1] == hidden_size
        if not shaped or x_TH.dtype != dtype or x_TH.device != self.device:
            raise ConfigError(
                f"tokens are {list(x_TH.shape)} {x_TH.dtype} on {x_TH.device}, but the layer takes "
                f"[tokens, {hidden_size}] {dtype} on {self.device}: one row per token, stored as "
                "and where the weights are; reshape, cast or move them"
            )
