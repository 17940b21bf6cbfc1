"""What one judgement costs: seconds and memory, at a small size and at a production size.

Legend: T tokens, H hidden_size, K experts per token.
"""

import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from twinmoe.oracle.contracts import reference_contract
from twinmoe.oracle.judgement import judge
from twinmoe.oracle.observation import RankObservation, Taps
from twinmoe.oracle.seeded import SeededWeights
from twinmoe.oracle.truth import Truth
from twinmoe.oracle.verdict import Verdict
from twinmoe.reference import draws
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.experts import mlp
from twinmoe.reference.published import published
from twinmoe.reference.router import TopKRouter
from twinmoe.reference.shared_expert import SharedExpertMLP

#: Tokens that are judged: a sample, of the same size whatever the batch was.  Time and memory
#: grow with them, time as long as they choose other experts.
TOKENS = 4

#: By name.
SIZES = {
    "small": MoEConfig(
        hidden_size=64, moe_intermediate_size=48, num_experts=8, num_experts_per_tok=2
    ),
    "DeepSeek-V3": published("deepseek-v3"),
}


@dataclass(frozen=True)
class Cost:
    """Of judging ``TOKENS`` tokens with all their experts, made one after another.

    ``seconds`` in all, of which ``making`` went into drawing the experts' weights;
    ``peak_mib`` the process's largest resident memory until then.
    """

    size: str
    seconds: float
    making: float
    peak_mib: float
    verdict: Verdict


class _TimedWeights(SeededWeights):
    """Seeded weights that know how long they took to draw."""

    seconds = 0.0

    def expert(self, expert: int) -> tuple[Tensor, Tensor]:
        """See :meth:`SeededWeights.expert`."""
        started = time.perf_counter()
        matrices = super().expert(expert)
        self.seconds += time.perf_counter() - started
        return matrices


def measure_costs(seed: int = 0, advance: Callable[[], None] = lambda: None) -> Iterator[Cost]:
    """Judge the reference's arithmetic on bf16 at each of ``SIZES``; a minute or two in all."""
    for size, config in SIZES.items():
        weights = _TimedWeights(config, seed)
        x_TH = draws.normal((TOKENS, config.hidden_size), config.dtype, seed, "hidden")
        observed = _reference(config, weights, x_TH)
        weights.seconds, started = 0.0, time.perf_counter()
        verdict = judge([observed], Truth(config, weights, [x_TH]), reference_contract(config))
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        yield Cost(size, seconds, weights.seconds, peak, verdict)
        advance()


def _reference(config: MoEConfig, weights: SeededWeights, x_TH: Tensor) -> RankObservation:
    """The reference layer, with one expert in memory at a time."""
    routing = TopKRouter(config, weights)(x_TH)  # type: ignore[arg-type]
    terms_TKH = torch.zeros(*routing.ids_TK.shape, config.hidden_size)
    for expert in routing.ids_TK.unique().tolist():
        token, slot = (routing.ids_TK == expert).nonzero(as_tuple=True)
        y_SH = mlp(config, x_TH[token], *weights.expert(expert)).float()
        terms_TKH[token, slot] = routing.weights_TK[token, slot][:, None] * y_SH
    out_TH = terms_TKH.sum(dim=1)
    if config.has_shared_expert:
        out_TH = out_TH + SharedExpertMLP(config, weights)(x_TH)  # type: ignore[arg-type]
    taps = Taps(ids_TK=routing.ids_TK, weights_TK=routing.weights_TK)
    return RankObservation(out_TH.to(config.dtype), taps, path="reference, expert by expert")
