"""One trial: a Case through the worlds of workers, to verdicts.

``observe_case`` runs on every rank; ``Trial`` owns the worlds and the judging.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from twinmoe.optimized.communication.pool_setup import release_pools
from twinmoe.oracle import faults
from twinmoe.oracle.case import Case
from twinmoe.oracle.contract import RoundingContract
from twinmoe.oracle.inputs import hidden_for, weights_for
from twinmoe.oracle.judgement import judge
from twinmoe.oracle.observation import RankObservation
from twinmoe.oracle.subject import SUBJECTS
from twinmoe.oracle.truth import Truth
from twinmoe.oracle.verdict import Finding, Verdict
from twinmoe.oracle.worker import RankContext
from twinmoe.oracle.world import World
from twinmoe.reference.placement import Placement

#: Batches before the judged one, by mode.
_HISTORY = {"eager": (), "graphed": (), "replayed": (1,)}


@dataclass(frozen=True)
class Answer:
    """What one rank sends back about one subject."""

    contract: RoundingContract
    required: frozenset[str]
    observation: RankObservation


def observe_case(context: RankContext, case: Case, subjects: Sequence[str]) -> dict[str, Answer]:
    """Build each subject on this rank, run its history, and observe the judged forward.

    Only the last forward's taps are looked at: before that, a faster rank may already
    be writing the next batch into this rank's gather buffer, as it is allowed to.
    """
    # The last case's buffers: every rank has answered since, so no peer reads them.
    release_pools(context.group)
    placement = Placement(case.config.num_experts, context.world_size)
    weights = weights_for(case, placement.experts_of(context.rank)).to(context.device)
    answers = {}
    for name in subjects:
        with faults.planted(case.fault if name == "optimized" else "", context):
            subject = SUBJECTS[name](case, weights, context)
            for step in _HISTORY[case.mode]:
                subject.observe(hidden_for(case, context.rank, step).to(context.device))
            hidden_TH = hidden_for(case, context.rank).to(context.device)
            observation = subject.observe(hidden_TH)
        answers[name] = Answer(subject.contract, subject.required, observation)
    return answers


@dataclass
class Outcome:
    """The verdicts on one case, by subject, and what they cost in seconds."""

    case: Case
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    run_seconds: float = 0.0
    judge_seconds: float = 0.0

    @property
    def equivalent(self) -> bool:
        """Every subject is inside its envelope around the same truth."""
        return all(verdict.equivalent for verdict in self.verdicts.values())

    def explain(self) -> str:
        """The failing subjects' verdicts and the line that replays the case."""
        told = [
            f"{name}: {verdict}"
            for name, verdict in self.verdicts.items()
            if not verdict.equivalent
        ]
        return "\n".join([*told, f"  reproduce: twinmoe replay '{self.case}'"])


class Trial:
    """Runs cases, keeping one world of workers per expert-parallel size."""

    def __init__(
        self,
        device: str = "cpu",
        timeout_s: float = 15.0,
        subjects: Sequence[str] = tuple(SUBJECTS),
    ) -> None:
        self._device, self._timeout_s, self._subjects = device, timeout_s, tuple(subjects)
        self._worlds: dict[int, World] = {}

    def run(self, case: Case) -> Outcome:
        """Observe and judge ``case``.  Raises WorkerFailure when a rank fails or hangs."""
        outcome = Outcome(case)
        start = time.perf_counter()
        answers = self._world(case.ep_size).run(observe_case, case, self._subjects)
        observed = time.perf_counter()
        truth = Truth(
            case.config,
            weights_for(case),
            [hidden_for(case, rank) for rank in range(case.ep_size)],
        )
        for name in self._subjects:
            outcome.verdicts[name] = _judge([answer[name] for answer in answers], truth)
            outcome.paths[name] = answers[0][name].observation.path
        outcome.run_seconds = observed - start
        outcome.judge_seconds = time.perf_counter() - observed
        return outcome

    def close(self) -> None:
        """End all workers."""
        for world in self._worlds.values():
            world.close()
        self._worlds.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _world(self, ep_size: int) -> World:
        if ep_size not in self._worlds:
            self._worlds[ep_size] = World(ep_size, self._device, self._timeout_s)
        return self._worlds[ep_size]


def _judge(answers: Sequence[Answer], truth: Truth) -> Verdict:
    """Judge the numbers, and that all ranks took, and really ran, the claimed path."""
    verdict = judge([answer.observation for answer in answers], truth, answers[0].contract)
    for rank, answer in enumerate(answers):
        for complaint in _untrue_claims(rank, answer, answers[0].contract):
            verdict.findings.append(Finding("dispatch", rank, None, None, complaint))
    return verdict


def _untrue_claims(rank: int, answer: Answer, agreed: RoundingContract) -> Iterator[str]:
    if answer.contract != agreed:
        yield (
            f"rank {rank} runs {answer.contract.name}, rank 0 {agreed.name}: all ranks must take "
            "the same path"
        )
    launched = answer.observation.launches.keys()
    if missing := sorted(answer.required - launched):
        yield (
            f"rank {rank} claims {answer.observation.path!r}, but never launched "
            f"{', '.join(missing)}"
        )
    moved = {name for name in launched if name.startswith(("all_gather[", "reduce_scatter["))}
    if foreign := sorted(moved - answer.required):
        yield (
            f"rank {rank} claims {answer.observation.path!r}, but also launched "
            f"{', '.join(foreign)}"
        )
