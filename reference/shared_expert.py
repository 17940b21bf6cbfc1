"""The expert that every token visits.

Legend: T tokens, H hidden_size, F rows of w13, I intermediate size of the shared expert.
"""

import torch
from torch import nn

from twinmoe.reference.config import ConfigError, MoEConfig
from twinmoe.reference.experts import mlp
from twinmoe.reference.weights import MoEWeights


class SharedExpertMLP(nn.Module):
    """Runs on the rank that holds the token: its weights are the same on every rank.

    Raises ConfigError when the weights have no shared expert.
    """

    def __init__(self, config: MoEConfig, weights: MoEWeights) -> None:
        super().__init__()
        if weights.shared_w13_FH is None or weights.shared_w2_HI is None:
            raise ConfigError(
                "weights (shared_w13_FH, shared_w2_HI absent) have no shared expert: there is "
                "nothing to apply; set shared_expert_intermediate_size > 0 and make them anew"
            )
        self.config = config
        self.w13_FH = weights.shared_w13_FH
        self.w2_HI = weights.shared_w2_HI
        self.gate_1H = weights.shared_gate_1H

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Return [T, H], rounded to the config's dtype, then gated in the accumulate dtype."""
        wide = self.config.accumulate_dtype
        y_TH = mlp(self.config, x_TH, self.w13_FH, self.w2_HI).to(wide)
        if self.gate_1H is None:
            return y_TH
        return (x_TH.to(wide) @ self.gate_1H.to(wide).T).sigmoid() * y_TH
