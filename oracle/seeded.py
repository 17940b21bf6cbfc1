"""Seeded weights drawn one expert at a time, for layers too large to hold.

DeepSeek-V3's 256 experts take 22 GB a layer in bf16 and 90 GB in fp64.  The truth looks
at one expert after another, once in a judgement, so it never needs more than one.
"""

from torch import Tensor

from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights


class SeededWeights:
    """The values of ``MoEWeights.random(config, seed)``, each expert drawn when asked for.

    The expert that was asked for last stays in memory.
    """

    def __init__(self, config: MoEConfig, seed: int) -> None:
        self._config, self._seed = config, seed
        self._last = self._draw(0)
        self.router_EH: Tensor = self._last.router_EH
        self.correction_bias_E: Tensor | None = self._last.correction_bias_E
        self.shared_w13_FH: Tensor | None = self._last.shared_w13_FH
        self.shared_w2_HI: Tensor | None = self._last.shared_w2_HI
        self.shared_gate_1H: Tensor | None = self._last.shared_gate_1H

    def expert(self, expert: int) -> tuple[Tensor, Tensor]:
        """(w13 [F, H], w2 [H, I]) of one expert, by its global id."""
        if self._last.experts.start != expert:
            self._last = self._draw(expert)
        return self._last.expert(expert)

    def _draw(self, expert: int) -> MoEWeights:
        return MoEWeights.random(self._config, self._seed, experts=range(expert, expert + 1))
