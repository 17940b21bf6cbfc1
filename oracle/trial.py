"""One trial: a Case through the worlds of workers, to verdicts.

``observe_case`` runs on every rank; ``Trial`` owns the worlds and the judging.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from twinmoe.optimized.communication.pool_setup import release_pools
from twinmoe.oracle import breadcrumbs, faults
from twinmoe.oracle.case import Case
from twinmoe.oracle.relations import require_relation
from twinmoe.oracle.resources import held, left_since
from twinmoe.oracle.session import Session
from twinmoe.oracle.showing import Showing, judge_showings
from twinmoe.oracle.subject import SUBJECTS
from twinmoe.oracle.torchrun import TorchrunWorld, open_world
from twinmoe.oracle.verdict import Verdict
from twinmoe.oracle.worker import RankContext
from twinmoe.oracle.world import World


def observe_case(context: RankContext, case: Case, subjects: Sequence[str]) -> dict[str, Showing]:
    """Play the case with each subject on this rank; all forwards are shown."""
    # Another task's buffers: every rank has answered since, so no peer reads them.
    for group in {context.group, None}:
        release_pools(group)
    showings = {}
    for name in subjects:
        start, held_before = len(breadcrumbs.journal), held()
        with faults.planted(case if name == "optimized" else replace(case, fault=""), context):
            session = Session(case, context, SUBJECTS[name])
            answers, journal = session.play(), tuple(breadcrumbs.journal[start:])
            session.close()
            showings[name] = Showing(tuple(answers), journal, tuple(left_since(held_before)))
    return showings


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
        self._worlds: dict[int, World | TorchrunWorld] = {}

    def run(self, case: Case) -> Outcome:
        """Observe and judge ``case``.

        Raises WorkerFailure when a rank fails or hangs, and ConfigError for a relation that
        does not apply.
        """
        require_relation(case)
        outcome = Outcome(case)
        start = time.perf_counter()
        showings = self.observe(case, self._subjects)
        observed = time.perf_counter()
        for name in self._subjects:
            verdict = judge_showings(case, [showing[name] for showing in showings])
            outcome.verdicts[name], outcome.paths[name] = verdict, verdict.path
        outcome.run_seconds = observed - start
        outcome.judge_seconds = time.perf_counter() - observed
        return outcome

    def observe(self, case: Case, subjects: Sequence[str]) -> list[dict[str, Showing]]:
        """Play ``case`` with each subject; return every rank's showings, unjudged."""
        return self._world(case.ep_size).run(observe_case, case, tuple(subjects))

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

    def _world(self, ep_size: int) -> World | TorchrunWorld:
        if ep_size not in self._worlds:
            self._worlds[ep_size] = open_world(ep_size, self._device, self._timeout_s)
        return self._worlds[ep_size]
