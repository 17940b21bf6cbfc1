"""Comparing: play a recording's cases again, here, and judge them by the same truth.

Whatever differs from the recording, machine, version, transport or number of ranks, the norm
is the truth's interval under the contract of the path that runs now.  What the file says of
weights, inputs, contract and truth must come out here again first, or it is no norm here.

Legend: T tokens of all ranks in rank order, H hidden_size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from twinmoe.oracle.bits import as_bits
from twinmoe.oracle.case import Case
from twinmoe.oracle.contract import default_rows
from twinmoe.oracle.defects import JudgeDefectError, judging
from twinmoe.oracle.diagnose import diagnosis_of
from twinmoe.oracle.envelope import Enclosure
from twinmoe.oracle.failures import WorkerFailure
from twinmoe.oracle.golden.content import Figures, Forward, Golden, Recorded, environment
from twinmoe.oracle.golden.file import GoldenError
from twinmoe.oracle.golden.norm import Drawn, declared, same_interval
from twinmoe.oracle.golden.record import shown_tensors
from twinmoe.oracle.golden.target import NotRun, Question, Resplit, Target, questions
from twinmoe.oracle.scenario import Change, Scenario
from twinmoe.oracle.session import Answer
from twinmoe.oracle.showing import judge_showings, rounds_of
from twinmoe.oracle.trial import Trial
from twinmoe.oracle.verdict import Verdict

#: So many failed cases are searched for a mistake that explains them: seconds each.
_EXPLAINED = 3


@dataclass(frozen=True)
class Compared:
    """One case compared.

    ``verdict`` is None where a worker failed, as ``failure`` says then, and where the judge
    itself did, as ``defect`` says.  ``changed`` counts
    elements whose bits changed against the recording of the same path, of how many, by tensor;
    None where another path ran.  ``mistakes`` name what would explain anyone's layer that is
    wrong, and ``printed`` is what the ranks last printed.
    """

    question: Question
    verdict: Verdict | None = None
    changed: dict[str, tuple[int, int]] | None = None
    mistakes: tuple[str, ...] = ()
    failure: str = ""
    defect: str = ""
    printed: str = ""

    @property
    def equivalent(self) -> bool:
        """The case ran, and every element lies in its interval."""
        return self.verdict is not None and self.verdict.equivalent

    @property
    def judged(self) -> bool:
        """The judge got through it, whatever became of the layer."""
        return self.verdict is not None or not self.defect

    @property
    def undecided(self) -> bool:
        """Nothing is wrong, but scores nearly tie and the layer shows no expert ids."""
        verdict = self.verdict
        return verdict is not None and not verdict.conclusive and not verdict.findings

    @property
    def proven(self) -> bool:
        """An error no rounding can make: outside the worst case, not only outside the likely."""
        return self.verdict is not None and any(f.proof for f in self.verdict.findings)

    @property
    def figures(self) -> Figures:
        """How close it came; all zero where a worker failed."""
        return Figures() if self.verdict is None else Figures.of(self.verdict)

    @property
    def account(self) -> str:
        """What is wrong, and the line to ask again; empty for an equivalent case."""
        if self.equivalent:
            return ""
        if not self.judged:
            return self.defect
        told = [self.failure if self.verdict is None else str(self.verdict)]
        told += [f"  this is what one gets if {mistake}" for mistake in self.mistakes]
        told += [f"  no diagnosis: {self.defect}"] if self.defect else []
        told += [self.printed] if self.printed else []
        again = self.question.replay
        line = f"  recorded case: '{self.question.recorded.case}'"
        return "\n".join([*told, f"  reproduce: {again}" if again else line])


@dataclass(frozen=True)
class Comparison:
    """All cases of a golden file: those that were compared, those that its layer cannot run."""

    golden: Golden
    target: Target
    cases: list[Compared] = field(default_factory=list)
    not_run: list[NotRun] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> list[Compared]:
        """The cases that are wrong, or that no worker answered."""
        left = (one for one in self.cases if not one.equivalent and not one.undecided)
        return [one for one in left if one.judged]

    @property
    def not_judged(self) -> list[Compared]:
        """The cases that the judge itself could not get through."""
        return [one for one in self.cases if not one.judged]

    @property
    def decided(self) -> bool:
        """Some case shows something, of which an undecided one shows nothing."""
        return any(one.judged and not one.undecided for one in self.cases)

    @property
    def equivalent(self) -> bool:
        """Every case that could be decided is, some could, and the judge got through all."""
        return self.decided and not self.failed and not self.not_judged


def compare(
    golden: Golden,
    trial: Trial,
    target: Target | None = None,
    progress: Callable[[Recorded], None] = lambda _: None,
) -> Comparison:
    """Play the cases of ``golden`` on ``target`` and judge them.

    ``trial`` must run on the target's device.  Raises ConfigError for a target that cannot run
    a case, a fault that reaches none and a layer that can run none, GoldenError where the file is
    no norm on this machine.
    """
    target = target or Target()
    asked, not_run = questions(golden, target)
    comparison = Comparison(golden, target, not_run=not_run, environment=environment(target.device))
    for one in not_run:
        progress(one.recorded)
    for question in asked:
        try:
            comparison.cases.append(_compared(question, trial, comparison))
        except JudgeDefectError as defect:
            comparison.cases.append(Compared(question, defect=str(defect)))
        progress(question.recorded)
    return comparison


def _compared(question: Question, trial: Trial, comparison: Comparison) -> Compared:
    recorded, case, ep_size = question.recorded, question.case, question.ep_size
    change = None if ep_size == case.ep_size else Resplit(ep_size)
    target, device = comparison.target, comparison.golden.device
    try:
        shown = trial.observe(case, (target.subject,), change, ep_size)
    except WorkerFailure as failure:
        return Compared(question, failure=f"{type(failure).__name__}: {failure}")
    output = trial.printed(ep_size)
    # Where one of our twins is wrong a replay says more; in anyone's layer it may be the adapter.
    explain = not target.is_own and len(comparison.failed) < _EXPLAINED
    with judging(case, question.replay, meant=(GoldenError,)):
        showings = [showing[target.subject] for showing in shown]
        rounds = rounds_of(showings)
        for forward, answers in zip(recorded.forwards, rounds, strict=True):
            require_norm(recorded.case, forward, answers[0].scenario, device)
        verdict = judge_showings(case, showings)
        changed = _changed(recorded, rounds)
    if not explain or not verdict.findings:
        return Compared(question, verdict, changed, printed=output)
    try:
        with judging(case):
            mistakes = tuple(diagnosis_of(showings))
            return Compared(question, verdict, changed, mistakes, printed=output)
    except JudgeDefectError as defect:  # what was found stands
        return Compared(question, verdict, changed, defect=str(defect), printed=output)


def require_norm(case: Case, forward: Forward, asked: Scenario, device: str) -> None:
    """Raise GoldenError unless inputs, contract and truth of ``forward`` come out here again.

    ``case`` is the recorded one, ``asked`` what was played of it now, and ``device`` the type of
    the one it was recorded on: both decide what its path declares.
    """
    # as recorded: on the case's own ranks, and for the layer that this forward went through
    scenario = replace(asked, change=Change())
    drawn = Drawn(scenario)
    for what, digest in drawn.digests().items():
        if digest != forward.digests.get(what):
            raise GoldenError(
                f"golden case '{case}': its {what} are drawn otherwise here (SHA-256 "
                f"{digest[:12]}, recorded {str(forward.digests.get(what))[:12]}): a version that "
                "drew other numbers has recorded it; record it again with this one"
            )
    try:
        contract = declared(replace(case, config=scenario.config), forward.contract, device)
    except ValueError as error:
        raise GoldenError(
            f"golden case '{case}': its path {forward.contract!r} is gone from this version "
            f"({error}): nothing declares its roundings; record it again"
        ) from None
    points = dict(contract.rows())
    # a point that the file's version did not know was as where it is left out
    recorded = {name: default_rows().get(name, "") for name in points} | forward.points
    if points != recorded:
        moved = [name for name in points if points[name] != recorded[name]]
        raise GoldenError(
            f"golden case '{case}': contract {contract.name!r} now declares "
            f"{', '.join(f'{name} {points[name]}' for name in moved) or 'less than it did'}, "
            f"recorded as {', '.join(recorded[name] for name in moved) or 'more'}: "
            "a promise that changed needs a new recording"
        )
    stored = Enclosure(forward.tensors["value"], forward.tensors["radius"])
    same_TH = same_interval(stored, drawn.interval(contract, forward.tensors["ids"]))
    if not same_TH.all():
        raise GoldenError(
            f"golden case '{case}': {int((~same_TH).sum())} of {same_TH.numel()} elements of its "
            "truth come out otherwise here: this version judges by another mathematics; find out "
            "which is right before recording again"
        )


def _changed(recorded: Recorded, rounds: list[list[Answer]]) -> dict[str, tuple[int, int]] | None:
    """Elements whose bits changed, if every forward took the recorded path."""
    changed: dict[str, tuple[int, int]] = {}
    for forward, answers in zip(recorded.forwards, rounds, strict=True):
        first = answers[0]
        tokens = tuple(len(answer.observation.output_TH) for answer in answers)
        taken = (first.observation.path, first.contract.name, tokens)
        if taken != (forward.path, forward.contract, forward.tokens):
            return None
        for name, now in shown_tensors(answers).items():
            before = forward.tensors.get(name)
            if before is not None and before.dtype == now.dtype:
                count, total = changed.get(name, (0, 0))
                other = int((as_bits(before) != as_bits(now)).sum())
                changed[name] = count + other, total + now.numel()
    return changed
