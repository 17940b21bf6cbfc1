"""The verdict on one forward: equivalent or not, where not, and how sure."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from twinmoe.oracle.contract import RoundingContract
from twinmoe.oracle.visible import visible

#: In the order of the data flow: the first one at fault names the culprit.
STAGES = ("router", "dispatch", "experts", "combine", "output")

#: The stage whose work an operation is, by how its name begins; every other one is dispatch's.
_OPERATIONS = {
    "sort_slots": "experts",
    "expert_": "experts",
    "combine_slots": "experts",
    "cutlass_fused_moe": "experts",
    "reduce_scatter": "combine",
    "all_reduce": "combine",
}


def stage_of_operation(name: str) -> str:
    """The stage of the data flow that launches a kernel, or issues a collective, of this name."""
    found = (stage for begins, stage in _OPERATIONS.items() if name.startswith(begins))
    return next(found, "dispatch")


@dataclass(frozen=True)
class Finding:
    """One fault, at one place.  ``token`` and ``dim`` index that rank's rows.

    ``relation`` names the property that does not hold, empty for the envelope around truth.
    ``message`` may quote a layer: it is made :func:`visible`.
    """

    stage: str
    rank: int
    token: int | None
    dim: int | None
    message: str
    ratio: float = torch.inf
    proof: bool = False
    relation: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", visible(self.message))

    def __str__(self) -> str:
        return self.message


@dataclass
class Verdict:
    """Equivalent or not, why, and how close it was.

    ``worst_ratio`` is the largest error over allowed error at the output (<= 1 inside);
    ``flips`` of ``elements`` outputs differ from the rounded truth, ``signs`` is their mean
    direction in each token that has any, +1 away from zero; ``slots_visible`` of
    ``slots`` contributions are large enough to be seen if they went missing,
    ``slots_distinct`` if the best rival expert took their place;
    ``ambiguous`` tokens had more than one admissible set of experts.  ``ratios`` holds the
    worst ratio of each stage that showed what it made, restarted at what was observed before.
    """

    contract: RoundingContract
    path: str
    findings: list[Finding] = field(default_factory=list)
    worst_ratio: float = 0.0
    elements: int = 0
    flips: int = 0
    expected_flips: float = 0.0
    signs: list[float] = field(default_factory=list)
    tokens: int = 0
    ambiguous: int = 0
    slots: int = 0
    slots_visible: int = 0
    slots_distinct: int = 0
    conclusive: bool = True
    ratios: dict[str, float] = field(default_factory=dict)

    def note(self, stage: str, ratio: float) -> None:
        """Remember the worst ratio of a stage."""
        self.ratios[stage] = max(ratio, self.ratios.get(stage, 0.0))

    @property
    def equivalent(self) -> bool:
        """No finding, and the case was able to show one."""
        return not self.findings and self.conclusive

    @property
    def culprit(self) -> Finding | None:
        """The first cause: the earliest stage at fault, by whatever kind of finding.

        Numbers, padding, claims, journals, repeats and relations are all findings of the stage
        that they accuse; of one stage, the finding that was made first is named.
        """
        return min(self.findings, key=lambda one: STAGES.index(one.stage), default=None)

    def __str__(self) -> str:
        culprit = self.culprit
        if not self.conclusive and culprit is None:
            return (
                f"inconclusive under {self.contract.name}: {self.ambiguous} of {self.tokens} "
                "tokens have near-tied scores and the subject shows no expert ids; show them "
                "(Taps.ids_TK), or draw other inputs"
            )
        if culprit is None:
            return (
                f"equivalent under {self.contract.name}: worst ratio {self.worst_ratio:.2f}, "
                f"{self.flips} of {self.elements} elements flipped, "
                f"{self.slots_visible} of {self.slots} slots visible, "
                f"{self.slots_distinct} told from their rival"
            )
        others = sorted({f.stage for f in self.findings} - {culprit.stage}, key=STAGES.index)
        where = f"  path: {self.path}   stage: {culprit.stage}"
        if culprit.relation:
            where += f"   relation: {culprit.relation}"
        lines = [culprit.message, where]
        if others:
            lines.append(f"  also outside: {', '.join(others)}")
        return "\n".join(lines)


def merged(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict on several forwards of a layer: all findings, sums of counts, worst ratio.

    Contract and path are those of the forward that holds the culprit, or of the last one.
    """
    shown = min(reversed(verdicts), key=_place)
    others = (each for verdict in verdicts if verdict is not shown for each in verdict.findings)
    total = replace(
        shown,
        findings=[*shown.findings, *others],
        worst_ratio=max(verdict.worst_ratio for verdict in verdicts),
        conclusive=all(verdict.conclusive for verdict in verdicts),
        signs=[sign for verdict in verdicts for sign in verdict.signs],
        ratios={},
    )
    for verdict in verdicts:
        for stage, ratio in verdict.ratios.items():
            total.note(stage, ratio)
    for name in _COUNTS:
        setattr(total, name, sum(getattr(verdict, name) for verdict in verdicts))
    return total


def earlier(one: Verdict, other: Verdict) -> Verdict:
    """The verdict whose first fault is earlier in the data flow; in a draw ``one``."""
    return min(one, other, key=_place)


def _place(verdict: Verdict) -> int:
    """How early in the data flow the first fault is; behind every stage if there is none."""
    return STAGES.index(verdict.culprit.stage) if verdict.culprit else len(STAGES)


#: What adds up over forwards.
_COUNTS = (
    "elements",
    "flips",
    "expected_flips",
    "tokens",
    "ambiguous",
    "slots",
    "slots_visible",
    "slots_distinct",
)
