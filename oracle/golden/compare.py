"""Comparing: play a recording's cases again, here, and judge them by the same truth.

Whatever differs from the recording, machine, version, transport or number of ranks, the norm
is the truth's interval under the contract of the path that runs now.  What the file says of
weights, inputs, contract and truth must come out here again first, or it is no norm here.

Legend: T tokens of all ranks in rank order, H hidden_size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from twinmoe.oracle import doctor
from twinmoe.oracle.case import Case
from twinmoe.oracle.envelope import Enclosure
from twinmoe.oracle.failures import WorkerFailure
from twinmoe.oracle.faults import patch_named, require_fault
from twinmoe.oracle.golden.content import Figures, Forward, Golden, Recorded, environment
from twinmoe.oracle.golden.file import GoldenError
from twinmoe.oracle.golden.norm import declared, input_digests, interval, same_interval
from twinmoe.oracle.golden.record import SUBJECT, rounds_of, shown_tensors
from twinmoe.oracle.live_layer import as_bits
from twinmoe.oracle.scenario import Change, Scenario
from twinmoe.oracle.session import Answer
from twinmoe.oracle.showing import judge_showings
from twinmoe.oracle.strategies import usable_backends
from twinmoe.oracle.trial import Trial
from twinmoe.oracle.verdict import Verdict
from twinmoe.reference.config import ConfigError

#: The transport that stands in where a device does not have the recorded one.
_STAND_INS = {"cpu": {"nccl": "gloo"}, "cuda": {"gloo": "nccl", "nvls": "p2p"}}


@dataclass(frozen=True)
class Resplit(Change):
    """The same tokens in the same order, shared evenly by ``ep_size`` ranks."""

    ep_size: int

    def hidden(self, hidden_by_rank: list[Tensor]) -> list[Tensor]:
        """See `Change`."""
        return list(torch.cat(hidden_by_rank).tensor_split(self.ep_size))


@dataclass(frozen=True)
class Target:
    """Where to compare: None leaves a case's own transport or number of ranks.

    A transport that ``device`` has not is replaced by the nearest that it has, an expert backend
    by its first choice; the report says what ran.  ``fault`` is planted in the cases that it
    reaches.
    """

    device: str = "cpu"
    transport: str | None = None
    ep_size: int | None = None
    subject: str = SUBJECT
    fault: str = ""


@dataclass(frozen=True)
class Compared:
    """One case compared.

    ``verdict`` is None where a worker failed, as ``failure`` says then.  ``changed`` counts
    elements whose bits changed against the recording of the same path, of how many, by tensor;
    None where another path ran.
    """

    recorded: Recorded
    case: Case
    ep_size: int
    verdict: Verdict | None = None
    changed: dict[str, tuple[int, int]] | None = None
    failure: str = ""

    @property
    def equivalent(self) -> bool:
        """The case ran, and every element lies in its interval."""
        return self.verdict is not None and self.verdict.equivalent

    @property
    def figures(self) -> Figures:
        """How close it came; all zero where a worker failed."""
        return Figures() if self.verdict is None else Figures.of(self.verdict)

    @property
    def account(self) -> str:
        """What is wrong, with the line that shows it again; empty for an equivalent case."""
        if self.equivalent:
            return ""
        told = self.failure if self.verdict is None else str(self.verdict)
        again = f"  recorded case: '{self.recorded.case}'"
        if self.ep_size == self.case.ep_size:
            again = f"  reproduce: twinmoe replay '{self.case}'"
        return f"{told}\n{again}"


@dataclass(frozen=True)
class Comparison:
    """All cases of a golden file, compared."""

    golden: Golden
    target: Target
    cases: list[Compared] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def equivalent(self) -> bool:
        """Every case is."""
        return all(compared.equivalent for compared in self.cases)


def compare(
    golden: Golden,
    trial: Trial,
    target: Target | None = None,
    progress: Callable[[Compared], None] = lambda _: None,
) -> Comparison:
    """Play the cases of ``golden`` on ``target`` and judge them.

    ``trial`` must run on the target's device.  Raises ConfigError for a target that cannot run
    a case or a fault that reaches none, GoldenError where the file is no norm on this machine.
    """
    target = target or Target()
    asked = list(questions(golden, target))
    comparison = Comparison(golden, target, environment=environment(target.device))
    for recorded, case, ep_size in asked:
        comparison.cases.append(_compared(recorded, case, ep_size, trial, comparison))
        progress(comparison.cases[-1])
    return comparison


def questions(golden: Golden, target: Target) -> Iterator[tuple[Recorded, Case, int]]:
    """(recorded case, the case to play, ranks to play it on); refuses before anything runs."""
    require_fault(target.fault)
    fault, reached = patch_named(target.fault), 0
    for recorded in golden.cases:
        recorded_case = recorded.case
        stand_in = _STAND_INS[target.device].get(recorded_case.transport, recorded_case.transport)
        case = rerouted(recorded_case, target.transport or stand_in)
        if case.backend not in usable_backends(case.config, target.device):
            case = replace(case, backend="auto")
        ep_size = target.ep_size or case.ep_size
        case.config.check_ep_size(ep_size)
        spread = replace(case, tokens=_shared_evenly(case, ep_size))
        doctor.require_case(spread, target.device)
        if fault is not None and fault.reaches(spread):
            case, reached = replace(case, fault=fault.name), reached + 1
        yield recorded, case, ep_size
    if fault is not None and not reached:
        raise ConfigError(
            f"fault ({fault.name!r}) reaches none of the {len(golden.cases)} cases: nothing would "
            "be shown about it; record cases that take that way"
        )


def rerouted(case: Case, transport: str) -> Case:
    """``case`` on another transport, with the same forwards; AlltoAll has no graph."""
    if transport != "alltoall":
        return replace(case, transport=transport)
    history = ".".join(map(str, case.steps())) if case.mode == "replayed" else case.history
    return replace(case, transport=transport, mode="eager", history=history)


def _shared_evenly(case: Case, ep_size: int) -> tuple[int, ...]:
    if ep_size == case.ep_size:
        return case.tokens
    return tuple(len(part) for part in torch.empty(sum(case.tokens)).tensor_split(ep_size))


def _compared(
    recorded: Recorded, case: Case, ep_size: int, trial: Trial, comparison: Comparison
) -> Compared:
    change = None if ep_size == case.ep_size else Resplit(ep_size)
    subject, device = comparison.target.subject, comparison.golden.device
    try:
        showings = [
            showing[subject] for showing in trial.observe(case, (subject,), change, ep_size)
        ]
    except WorkerFailure as failure:
        return Compared(recorded, case, ep_size, failure=f"{type(failure).__name__}: {failure}")
    rounds = rounds_of(showings)
    for forward, answers in zip(recorded.forwards, rounds, strict=True):
        scenario = replace(answers[0].scenario, change=Change())
        require_norm(recorded.case, forward, scenario, device)
    verdict = judge_showings(case, showings)
    return Compared(recorded, case, ep_size, verdict, _changed(recorded, rounds))


def require_norm(case: Case, forward: Forward, scenario: Scenario, device: str) -> None:
    """Raise GoldenError unless inputs, contract and truth of ``forward`` come out here again.

    ``device``: the type of the one it was recorded on, which decides what its path declares.
    """
    for what, digest in input_digests(scenario).items():
        if digest != forward.digests.get(what):
            raise GoldenError(
                f"golden case '{case}': its {what} are drawn otherwise here (SHA-256 "
                f"{digest[:12]}, recorded {str(forward.digests.get(what))[:12]}): another torch or "
                "another kind of CPU makes other random numbers; record it again here"
            )
    try:
        contract = declared(case, forward.contract, device)
    except ValueError as error:
        raise GoldenError(
            f"golden case '{case}': its path {forward.contract!r} is gone from this version "
            f"({error}): nothing declares its roundings; record it again"
        ) from None
    points = dict(contract.rows())
    if points != forward.points:
        moved = [name for name in points if points[name] != forward.points.get(name)]
        raise GoldenError(
            f"golden case '{case}': contract {contract.name!r} now declares "
            f"{', '.join(f'{name} {points[name]}' for name in moved) or 'less than it did'}, "
            f"recorded as {', '.join(str(forward.points.get(name)) for name in moved) or 'more'}: "
            "a promise that changed needs a new recording"
        )
    stored = Enclosure(forward.tensors["value"], forward.tensors["radius"])
    same_TH = same_interval(stored, interval(scenario, contract, forward.tensors["ids"]))
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
