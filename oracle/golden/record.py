"""Recording: play cases on a path that is equivalent now, and keep the truth and what it showed.

Legend: T tokens of all ranks in rank order.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from twinmoe.oracle.case import Case
from twinmoe.oracle.golden.content import Figures, Forward, Golden, Recorded, environment
from twinmoe.oracle.golden.norm import Drawn
from twinmoe.oracle.session import Answer
from twinmoe.oracle.showing import judge_showings, rounds_of
from twinmoe.oracle.trial import Trial
from twinmoe.oracle.verdict import Verdict
from twinmoe.reference.config import ConfigError

SUBJECT = "optimized"


class NotEquivalentError(Exception):
    """A case that must not become a norm: the path that showed it is not equivalent now."""

    def __init__(self, case: Case, verdict: Verdict) -> None:
        super().__init__(
            f"not recorded, since the path is not equivalent to its own truth: {verdict}\n"
            f"  reproduce: twinmoe replay '{case}'"
        )


def record(
    cases: Sequence[Case],
    trial: Trial,
    device: str = "cpu",
    progress: Callable[[Case], None] = lambda _: None,
) -> Golden:
    """Play ``cases`` on the optimized twin and keep what a comparison needs.

    Raises ConfigError for a case that is no question to one layer, NotEquivalentError for an
    answer outside its truth's interval, and WorkerFailure as ``Trial.run`` does.
    """
    recorded = []
    for case in cases:
        check_recordable(case)
        showings = [showing[SUBJECT] for showing in trial.observe(case, (SUBJECT,))]
        verdict = judge_showings(case, showings)
        if not verdict.equivalent:
            raise NotEquivalentError(case, verdict)
        forwards = tuple(_forward(answers) for answers in rounds_of(showings))
        recorded.append(Recorded(case, forwards, Figures.of(verdict)))
        progress(case)
    return Golden(tuple(recorded), environment(device), device)


def check_recordable(case: Case) -> None:
    """Raise ConfigError for a case whose answers are no norm."""
    if case.fault:
        raise ConfigError(
            f"fault ({case.fault!r}) is planted in the case: a fault is no norm; leave it out, and "
            "plant it when comparing"
        )
    if case.relation:
        raise ConfigError(
            f"relation ({case.relation!r}) asks several layers one question: a golden case is one "
            "layer's answers to its own; leave it out"
        )


def shown_tensors(answers: Sequence[Answer]) -> dict[str, Tensor]:
    """What the ranks showed of one forward, in token order, by the names of a golden file."""
    seen = [answer.observation for answer in answers]
    parts: dict[str, list[Tensor | None]] = {
        "ids": [one.taps.ids_TK for one in seen],
        "weights": [one.taps.weights_TK for one in seen],
        "routed": [one.taps.routed_TH for one in seen],
        "output": [one.output_TH for one in seen],
    }
    return {
        name: torch.cat([tensor for tensor in tensors if tensor is not None]).cpu()
        for name, tensors in parts.items()
        if all(tensor is not None for tensor in tensors)
    }


def _forward(answers: Sequence[Answer]) -> Forward:
    first = answers[0]
    shown = shown_tensors(answers)
    drawn = Drawn(first.scenario)
    norm = drawn.interval(first.contract, shown["ids"])
    return Forward(
        path=first.observation.path,
        contract=first.contract.name,
        points=dict(first.contract.rows()),
        tokens=tuple(len(answer.observation.output_TH) for answer in answers),
        digests=drawn.digests(),
        tensors={"value": norm.value, "radius": norm.radius, **shown},
    )
