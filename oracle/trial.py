"""One trial: a Case through the worlds of workers, to verdicts.

``observe_case`` runs on every rank; ``Trial`` owns the worlds and the judging.
"""

import gc
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from twinmoe.oracle import breadcrumbs, faults
from twinmoe.oracle.case import Case
from twinmoe.oracle.defects import JudgeDefectError, judging
from twinmoe.oracle.diagnose import diagnosis_of, telling
from twinmoe.oracle.failures import SetUpError, WorkerFailure, WorkerLost
from twinmoe.oracle.recurrence import Recurrence
from twinmoe.oracle.relations import require_relation
from twinmoe.oracle.resources import held, left_since
from twinmoe.oracle.scenario import Change
from twinmoe.oracle.session import Session
from twinmoe.oracle.showing import Showing, judge_showings
from twinmoe.oracle.subject import SUBJECTS
from twinmoe.oracle.subject_spec import load_layers, subject_factory
from twinmoe.oracle.torchrun import TorchrunWorld, open_world
from twinmoe.oracle.verdict import Finding, Verdict, earlier
from twinmoe.oracle.worker import RankContext
from twinmoe.oracle.world import World


def _open(context: RankContext, subjects: Sequence[str]) -> None:
    """Import the subjects on this rank; what a case needs of ours is imported with this module."""
    load_layers(context, subjects)
    gc.freeze()  # what is imported stays: a collection after a case need not look at it


def observe_case(
    context: RankContext,
    case: Case,
    subjects: Sequence[str],
    change: Change | None = None,
    in_step: bool = False,
) -> dict[str, Showing]:
    """Play the case with each subject on this rank, changed if so; all forwards are shown.

    ``in_step``: no rank starts a forward before all have looked at the one before.
    """
    # Another task's buffers: every rank has answered since, so no peer reads them.
    context.release_pools()
    showings = {}
    for name in subjects:
        start, held_before = len(breadcrumbs.journal), held()
        own = case if name == "optimized" else replace(case, fault="")
        with faults.planted(own, context) as seams:
            session = Session(case, context, subject_factory(name), change, in_step)
            answers, journal = session.play(), tuple(breadcrumbs.journal[start:])
            session.close()
            left, lacking = tuple(left_since(held_before)), frozenset(session.left_out)
            showings[name] = Showing(tuple(answers), journal, left, lacking, seams.met)
    return showings


@dataclass
class Outcome:
    """The verdicts on one case, by subject, and what they cost in seconds.

    ``diagnosis`` names mistakes that explain a failure: see :meth:`Trial.diagnose`.  ``before``
    are the cases that the same workers had played, and ``recurrence`` is how it fails again.
    ``left_out``: what the history asked of a layer that does not offer it.
    ``fault_met``: no fault was planted, or some rank met it; else its verdicts say nothing of it.
    ``printed``: what the ranks last printed in it.
    """

    case: Case
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    run_seconds: float = 0.0
    judge_seconds: float = 0.0
    diagnosis: list[str] = field(default_factory=list)
    left_out: frozenset[str] = frozenset()
    before: tuple[Case, ...] = ()
    recurrence: Recurrence = field(default_factory=Recurrence)
    fault_met: bool = True
    printed: str = ""

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
        told += [self.printed] if self.printed else []
        told += [f"  {self.recurrence.note}"] if self.recurrence.note else []
        again = self.recurrence.line(_asked(self.verdicts), self.case)
        return "\n".join([*told, f"  reproduce: {again}"])


def _asked(subjects: Iterable[str]) -> str:
    """Options that ask for anyone's layers among the subjects, a blank before each."""
    return "".join(f" --subject {name}" for name in subjects if name not in SUBJECTS)


#: What may be wrong, if nothing is once no rank goes ahead.
_RAN_AHEAD = (
    "a rank runs into what another has not finished (with all ranks in step, it was right once)"
)


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
        #: Cases in which something ended a rank from outside, and what.
        self.cut_off: list[tuple[Case, str]] = []
        #: The cases that the workers of each world have played since their start.
        self._played: dict[int, list[Case]] = {}

    def run(self, case: Case) -> Outcome:
        """Observe and judge ``case``.

        Raises WorkerFailure when a rank fails or hangs, ConfigError for a relation that does not
        apply, and JudgeDefectError where the judge itself does not get through.
        """
        require_relation(case)
        outcome = Outcome(case, before=tuple(self._played.get(case.ep_size, ())))
        start = time.perf_counter()
        showings = self.observe(case, self._subjects)
        observed, outcome.printed = time.perf_counter(), self.printed(case.ep_size)
        outcome.run_seconds = observed - start
        with self._judging(case):
            self._judge(outcome, showings)
            outcome.judge_seconds = time.perf_counter() - observed
            self._look_closer(outcome)
        return outcome

    def _judge(self, outcome: Outcome, showings: Sequence[dict[str, Showing]]) -> None:
        case = outcome.case
        for name in self._subjects:
            verdict = judge_showings(case, [showing[name] for showing in showings])
            outcome.verdicts[name], outcome.paths[name] = verdict, verdict.path
            outcome.left_out = outcome.left_out.union(*(one[name].left_out for one in showings))
        met = sum(one.met for showing in showings for one in showing.values())
        outcome.fault_met = not case.fault or met > 0

    def _judging(self, case: Case) -> AbstractContextManager[None]:
        """Whatever goes wrong here unexpectedly is a defect in judging ``case``."""
        return judging(case, Recurrence().line(_asked(self._subjects), case))

    def fails_again(self, cases: Sequence[Case]) -> bool:
        """Play ``cases``, of equally many ranks, in a fresh world; whether the last one fails.

        Where an earlier one fails so that its workers end, nothing is left that could matter.
        """
        *earlier, last = cases
        if (world := self._worlds.pop(last.ep_size, None)) is not None:
            world.close()
        try:
            for case in earlier:
                self.observe(case, self._subjects)
        except (WorkerFailure, JudgeDefectError):
            return False
        try:
            return bool(self.run(last).findings)
        except WorkerFailure:
            return True
        except JudgeDefectError:  # whether it fails is then not known
            return False

    def printed(self, ep_size: int) -> str:
        """What the ranks of a world last printed in its last task, as text; empty if nothing."""
        world = self._worlds.get(ep_size)
        return "" if world is None else world.printed

    def require_alive(self, ep_size: int) -> None:
        """Raise WorkerLost, with the case at fault, if a worker ended since its last answer.

        What ended it from outside is kept in ``cut_off`` instead.
        """
        world = self._worlds.get(ep_size)
        if not isinstance(world, World):
            return
        try:
            with self._remembered(ep_size):
                world.require_alive()
        except WorkerLost as lost:
            if lost.outside is None:
                raise
            self.cut_off.append((lost.case, str(lost)))

    @contextmanager
    def _remembered(self, ep_size: int) -> Iterator[None]:
        """Give a failure the history of its workers, which ends with it."""
        try:
            yield
        except WorkerFailure as failure:
            *before, last = self._played.pop(ep_size)
            # The last case is the one that was asked, or after which a worker was lost.
            failure.case, failure.before = last, tuple(before)
            raise
        except JudgeDefectError:  # an answer that cannot be read has ended the workers
            self._played.pop(ep_size)
            raise

    def require_subjects_own(self, case: Case, failure: WorkerFailure) -> None:
        """Raise SetUpError where anyone's layer has no part in ``failure``.

        What was raised outside the layer, in code of ours, may yet be its doing.  The readable
        twin decides: it fails alike where it is not.
        """
        if failure.is_in_layer or all(name in SUBJECTS for name in self._subjects):
            return
        try:
            self.observe(case, ("reference",))
        except WorkerFailure:
            raise SetUpError(failure) from failure

    def diagnose(self, outcome: Outcome) -> None:
        """Put into ``outcome`` what explains its failures, by a run of it and of a telling case."""
        wrong = [name for name, verdict in outcome.verdicts.items() if not verdict.equivalent]
        if not wrong:
            return
        with self._judging(outcome.case):
            shown = [self.observe(outcome.case, wrong)]
            with suppress(WorkerFailure):  # a layer may be unable to run another case
                shown.append(self.observe(telling(outcome.case), wrong))
            for name in wrong:
                outcome.diagnosis += diagnosis_of(
                    *([showing[name] for showing in showings] for showings in shown)
                )

    def _look_closer(self, outcome: Outcome) -> None:
        """Name the stage of what only outputs have shown, by one more run with all ranks in step.

        Where ranks run ahead, a forward's padded buffers can be shown of the last one alone.
        """
        blurred = [
            name
            for name, verdict in outcome.verdicts.items()
            if verdict.culprit is not None and verdict.culprit.stage in ("combine", "output")
        ]
        case = outcome.case
        if not blurred or case.ep_size == 1 or not (case.history or case.relation):
            return
        with suppress(WorkerFailure):  # what was found stands without a closer look
            showings = self.observe(case, blurred, in_step=True)
            for name in blurred:
                verdict = judge_showings(case, [showing[name] for showing in showings])
                if verdict.findings:
                    outcome.verdicts[name] = earlier(outcome.verdicts[name], verdict)
                else:
                    outcome.diagnosis.append(_RAN_AHEAD)

    def observe(
        self,
        case: Case,
        subjects: Sequence[str],
        change: Change | None = None,
        ep_size: int | None = None,
        in_step: bool = False,
    ) -> list[dict[str, Showing]]:
        """Play ``case`` with each subject; return every rank's showings, unjudged.

        What was ended from outside is kept in ``cut_off``, and asked once more of fresh workers:
        an end of the layer's own comes again.  Raises WorkerFailure.  ``change`` is made to its
        history, with ``ep_size`` ranks where it asks for others.  ``in_step``: no rank starts a
        forward before all have looked at the one before.
        """
        size = ep_size or case.ep_size
        self.require_alive(size)
        asked = case, tuple(subjects), change, in_step
        try:
            return self._play(size, *asked)
        except WorkerFailure as failure:
            if failure.outside is None:
                raise
            first = str(failure)
        try:
            showings = self._play(size, *asked)
        except WorkerFailure as again:
            if again.outside is not None and again.outside.proven:
                self.cut_off.append((case, str(again)))
            else:
                again.outside = None  # it has come again: the layer's own
            raise
        self.cut_off.append((case, first))
        return showings

    def _play(
        self,
        size: int,
        case: Case,
        subjects: tuple[str, ...],
        change: Change | None,
        in_step: bool,
    ) -> list[dict[str, Showing]]:
        world = self._world(size)
        played = self._played.setdefault(size, [])
        if case not in played[-1:]:
            played.append(case)
        with self._remembered(size), self._judging(case):
            return world.run(observe_case, case, subjects, change, in_step)

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
            self._played.pop(ep_size, None)
            opening = _open, (self._subjects,)
            self._worlds[ep_size] = open_world(ep_size, self._device, self._timeout_s, opening)
        return self._worlds[ep_size]
