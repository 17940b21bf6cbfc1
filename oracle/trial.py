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
from twinmoe.oracle.diagnose import diagnosis_of
from twinmoe.oracle.relations import require_relation
from twinmoe.oracle.resources import held, left_since
from twinmoe.oracle.scenario import Change
from twinmoe.oracle.session import Session
from twinmoe.oracle.showing import Showing, judge_showings
from twinmoe.oracle.subject import SUBJECTS
from twinmoe.oracle.subject_spec import subject_factory
from twinmoe.oracle.torchrun import TorchrunWorld, open_world
from twinmoe.oracle.verdict import Finding, Verdict
from twinmoe.oracle.worker import RankContext
from twinmoe.oracle.world import World


def observe_case(
    context: RankContext, case: Case, subjects: Sequence[str], change: Change | None = None
) -> dict[str, Showing]:
    """Play the case with each subject on this rank, changed if so; all forwards are shown."""
    # Another task's buffers: every rank has answered since, so no peer reads them.
    for group in {context.group, None}:
        release_pools(group)
    showings = {}
    for name in subjects:
        start, held_before = len(breadcrumbs.journal), held()
        with faults.planted(case if name == "optimized" else replace(case, fault=""), context):
            session = Session(case, context, subject_factory(name), change)
            answers, journal = session.play(), tuple(breadcrumbs.journal[start:])
            session.close()
            showings[name] = Showing(tuple(answers), journal, tuple(left_since(held_before)))
    return showings


@dataclass
class Outcome:
    """The verdicts on one case, by subject, and what they cost in seconds.

    ``diagnosis`` names mistakes that explain a failure: see :meth:`Trial.diagnose`.
    """

    case: Case
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    run_seconds: float = 0.0
    judge_seconds: float = 0.0
    diagnosis: list[str] = field(default_factory=list)

    @property
    def equivalent(self) -> bool:
        """Every subject is inside its envelope around the same truth."""
        return all(verdict.equivalent for verdict in self.verdicts.values())

    @property
    def findings(self) -> list[Finding]:
        """What is wrong with any subject; an inconclusive verdict alone adds nothing."""
        return [finding for verdict in self.verdicts.values() for finding in verdict.findings]

    def explain(self) -> str:
        """The failing subjects' verdicts and the line that replays the case."""
        told = [
            f"{name}: {verdict}"
            for name, verdict in self.verdicts.items()
            if not verdict.equivalent
        ]
        told += [f"  this is what one gets if {mistake}" for mistake in self.diagnosis]
        plain = [name for name in self.verdicts if name not in SUBJECTS]
        asked = "".join(f" --subject {name}" for name in plain)
        return "\n".join([*told, f"  reproduce: twinmoe replay{asked} '{self.case}'"])


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

    def diagnose(self, outcome: Outcome) -> None:
        """Put into ``outcome`` the named mistakes that explain its failures, by one more run."""
        wrong = [name for name, verdict in outcome.verdicts.items() if not verdict.equivalent]
        if not wrong:
            return
        showings = self.observe(outcome.case, wrong)
        for name in wrong:
            outcome.diagnosis += diagnosis_of([showing[name] for showing in showings])

    def observe(
        self,
        case: Case,
        subjects: Sequence[str],
        change: Change | None = None,
        ep_size: int | None = None,
    ) -> list[dict[str, Showing]]:
        """Play ``case`` with each subject; return every rank's showings, unjudged.

        ``change`` is made to its history, with ``ep_size`` ranks where it asks for others.
        """
        world = self._world(ep_size or case.ep_size)
        return world.run(observe_case, case, tuple(subjects), change)

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
