"""Seeded weights drawn one expert at a time, for layers too large to hold.

DeepSeek-V3's 256 experts take 22 GB a layer in bf16 and 90 GB in fp64.  The truth looks
at one expert after another, once in a judgement, so it never needs more than one.
"""

from dataclasses import replace

from torch import Tensor

from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights


class SeededWeights:
    """The values of ``MoEWeights.random(config, seed)``, each expert drawn when asked for.

    The expert that was asked for last stays in memory.
    """

    def __init__(self, config: MoEConfig, seed: int) -> None:
        self._seed = seed
        self._last = MoEWeights.random(config, seed, experts=range(1))
        self.router_EH: Tensor = self._last.router_EH
        self.correction_bias_E: Tensor | None = self._last.correction_bias_E
        self.shared_w13_FH: Tensor | None = self._last.shared_w13_FH
        self.shared_w2_HI: Tensor | None = self._last.shared_w2_HI
        self.shared_gate_1H: Tensor | None = self._last.shared_gate_1H
        # every tensor has a generator of its own, so what is held already can be left out
        self._alone = replace(config, shared_expert_intermediate_size=0, shared_expert_gate=False)

    def expert(self, expert: int) -> tuple[Tensor, Tensor]:
        """(w13 [F, H], w2 [H, I]) of one expert, by its global id."""
        if self._last.experts.start != expert:
            only = range(expert, expert + 1)
            self._last = MoEWeights.random(self._alone, self._seed, experts=only)
        return self._last.expert(expert)
