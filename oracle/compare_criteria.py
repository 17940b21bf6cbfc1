"""Criteria side by side: which of them sees which mistake, and which cries wolf.

Legend: T tokens, H hidden_size, I moe_intermediate_size, E experts, K experts per token.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from twinmoe.oracle.criteria import CRITERIA, Exhibit
from twinmoe.oracle.emulation import MISTAKES, PATHS, Emulation, draw_inputs
from twinmoe.oracle.emulation.gemm import blocked
from twinmoe.reference.config import MoEConfig

#: (T, H, I, E, K, ranks) of the layers: softmax, renormalised, no bias, no shared expert.
SIZES = {"small": (16, 64, 40, 8, 2, 2), "large": (64, 2048, 768, 16, 8, 8)}

#: The path whose implementations are compared: it stores every stage in bf16.
PATH = PATHS["p2p grouped_mm, fp32 wire"]

#: The subject without a mistake.
CORRECT = "correct"
SUBJECTS = (CORRECT, *(name for name in MISTAKES if not MISTAKES[name].needs_bias))


@dataclass
class CriteriaTable:
    """How often each criterion called each subject wrong, in ``draws`` layers."""

    size: str
    draws: int
    seed: int
    flagged: dict[str, dict[str, int]] = field(default_factory=dict)

    def share(self, criterion: str, subject: str) -> float:
        """Share of the draws in which ``criterion`` flagged ``subject``."""
        return self.flagged[criterion][subject] / self.draws


def compare_criteria(
    draws: int,
    size: str,
    seed: int = 0,
    *,
    loosen: float = 1.0,
    advance: Callable[[], None] = lambda: None,
) -> CriteriaTable:
    """Show each criterion the same subjects: ``draws`` layers, with each mistake in turn.

    bf16 data, outputs only.  The correct subject, and the partner that tolerances compare
    with, are drawn among correct implementations.  ``advance`` is called after a subject.
    """
    flagged = {name: dict.fromkeys(SUBJECTS, 0) for name in CRITERIA}
    for draw in range(draws):
        for subject, exhibit in exhibits(size, seed + draw, loosen):
            for name, finds_wrong in CRITERIA.items():
                flagged[name][subject] += finds_wrong(exhibit)
            advance()
    return CriteriaTable(size, draws, seed, flagged)


def exhibits(size: str, seed: int, loosen: float = 1.0) -> Iterator[tuple[str, Exhibit]]:
    """One layer's correct subject, then one with each mistake."""
    tokens, hidden, intermediate, experts, k, ranks = SIZES[size]
    config = MoEConfig(
        hidden_size=hidden,
        moe_intermediate_size=intermediate,
        num_experts=experts,
        num_experts_per_tok=k,
    )
    inputs = draw_inputs("normal", config, (tokens // ranks,) * ranks, seed)
    truth, contract = inputs.truth(), PATH.contract(config)
    generator = torch.Generator().manual_seed(seed)
    partner = PATH.draw(generator).observe(contract, inputs, tapped=False)
    partner_TH = torch.cat([observation.output_TH for observation in partner])
    # mistakes are made in the correct implementation that runs fastest
    base = Emulation(logits=blocked, gate_up=blocked, down=blocked)
    for subject in SUBJECTS:
        how = PATH.draw(generator) if subject == CORRECT else MISTAKES[subject].into(base)
        seen = how.observe(contract, inputs, tapped=False)
        yield subject, Exhibit(seen, partner_TH, truth, contract, loosen)
