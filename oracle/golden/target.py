"""Where to compare, and what of a recording can be asked there.

Legend: T tokens of this rank, H hidden_size.
"""

from collections import Counter
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from twinmoe.oracle import doctor
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults import patch_named, require_fault
from twinmoe.oracle.golden.content import Golden, Recorded
from twinmoe.oracle.golden.record import SUBJECT
from twinmoe.oracle.layer_space import SIZES, Narrow, fitted, narrow_of
from twinmoe.oracle.scenario import Change
from twinmoe.oracle.strategies import usable_backends
from twinmoe.oracle.subject import SUBJECTS
from twinmoe.oracle.subject_spec import load_factory
from twinmoe.reference.config import ConfigError

#: The transport that stands in where a device does not have the recorded one.
_STAND_INS = {"cpu": {"nccl": "gloo"}, "cuda": {"gloo": "nccl", "nvls": "p2p"}}


@dataclass(frozen=True)
class Target:
    """Where to compare: None leaves a case's own transport or number of ranks.

    A transport that ``device`` has not is replaced by the nearest that it has, an expert backend
    by its first choice; the report says what ran.  ``fault`` is planted in the cases that it
    reaches.  ``subject`` is a twin's name, or ``package.module:factory`` of anyone's layer, which
    has one path and is run by one rank unless ``ep_size`` says otherwise.
    """

    device: str = "cpu"
    transport: str | None = None
    ep_size: int | None = None
    subject: str = SUBJECT
    fault: str = ""

    @property
    def is_own(self) -> bool:
        """Whether one of our twins is compared."""
        return self.subject in SUBJECTS

    def check(self) -> None:
        """Raise ConfigError for a layer that cannot be imported, or wishes that it cannot have."""
        require_fault(self.fault)
        if self.fault and self.subject != SUBJECT:
            raise ConfigError(
                f"fault ({self.fault!r}) cannot be planted in {self.subject}: faults are changes "
                f"of the {SUBJECT} twin; drop --fault or --subject"
            )
        if self.transport is not None and self.subject != SUBJECT:
            raise ConfigError(
                f"--transport ({self.transport}) chooses between paths of the {SUBJECT} twin, of "
                f"which {self.subject} has none: drop --transport or --subject"
            )
        if not self.is_own:
            load_factory(self.subject)


@dataclass(frozen=True)
class Question:
    """A recorded case as ``subject`` plays it: ``case``, its tokens shared by ``ep_size`` ranks.

    ``number`` is its place in the file.
    """

    number: int
    recorded: Recorded
    case: Case
    ep_size: int
    subject: str

    @property
    def replay(self) -> str:
        """The command that asks it again; empty where the ranks are not the case's own."""
        if self.ep_size != self.case.ep_size:
            return ""
        subject = "" if self.subject in SUBJECTS else f" --subject {self.subject}"
        return f"twinmoe replay{subject} '{self.case}'"


@dataclass(frozen=True)
class NotRun:
    """A recorded case that the compared layer cannot be asked.

    ``why`` names what of it the layer does not declare to run, as ``setting=value``.
    """

    number: int
    recorded: Recorded
    why: tuple[str, ...]


@dataclass(frozen=True)
class Resplit(Change):
    """The same tokens in the same order, shared evenly by ``ep_size`` ranks."""

    ep_size: int

    def hidden(self, hidden_by_rank: list[Tensor]) -> list[Tensor]:
        """See `Change`."""
        return list(torch.cat(hidden_by_rank).tensor_split(self.ep_size))


def questions(golden: Golden, target: Target) -> tuple[list[Question], list[NotRun]]:
    """What to play on ``target``, and what its layer cannot run.

    Raises ConfigError, before anything runs, for a target that cannot run a case, a fault that
    reaches none, and a layer that can run none.
    """
    target.check()
    return _of_twin(golden, target) if target.is_own else _of_layer(golden, target)


def _of_twin(golden: Golden, target: Target) -> tuple[list[Question], list[NotRun]]:
    fault, reached, asked = patch_named(target.fault), 0, []
    for number, recorded in enumerate(golden.cases):
        case = on_device(recorded.case, target.device, target.transport)
        ep_size = target.ep_size or case.ep_size
        spread = shared_evenly(case, ep_size)
        doctor.require_case(spread, target.device)
        if fault is not None and fault.reaches(spread):
            case, reached = replace(case, fault=fault.name), reached + 1
        asked.append(Question(number, recorded, case, ep_size, target.subject))
    if fault is not None and not reached:
        raise ConfigError(
            f"fault ({fault.name!r}) reaches none of the {len(golden.cases)} cases: nothing would "
            "be shown about it; record cases that take that way"
        )
    return asked, []


def _of_layer(golden: Golden, target: Target) -> tuple[list[Question], list[NotRun]]:
    narrow, ep_size = narrow_of(load_factory(target.subject)), target.ep_size or 1
    asked, not_run = [], []
    for number, recorded in enumerate(golden.cases):
        case = fitted(rerouted(recorded.case, "alltoall"), narrow)
        if why := _unlike(recorded.case, case, narrow):
            not_run.append(NotRun(number, recorded, why))
        else:
            recorded.case.config.check_ep_size(ep_size)
            asked.append(Question(number, recorded, case, ep_size, target.subject))
    if not asked:
        raise ConfigError(
            f"subject ({target.subject}) runs none of the {len(golden.cases)} cases: it does not "
            f"declare their {counted(not_run)}, so nothing would be shown about it; record cases "
            "of layers that it runs, or declare more with @runs"
        )
    return asked, not_run


def _unlike(recorded: Case, fit: Case, narrow: Narrow) -> tuple[str, ...]:
    """What of a recorded case a layer cannot be asked."""
    wanted, config = recorded.config, narrow(recorded.config)
    apart = [f.name for f in fields(wanted) if getattr(wanted, f.name) != getattr(config, f.name)]
    if apart:
        # sizes are made to fit other settings, so they are the reason only where nothing else is
        apart = [name for name in apart if name not in SIZES] or apart
        return tuple(f"{name}={getattr(wanted, name)}" for name in apart)
    if fit.bias != recorded.bias:
        return (f"bias={recorded.bias}",)
    reloaded = any(step.kind in "wl" for step in recorded.steps())
    if reloaded or _forwards(recorded) != _forwards(fit):
        return (f"history={recorded.history}",)
    return ()


def _forwards(case: Case) -> list[tuple[bool, int]]:
    """Which layer each forward asks, and which batch: paths differ, questions do not."""
    return [(step.kind == "o", step.number) for step in case.steps() if step.is_forward]


def counted(not_run: list[NotRun]) -> str:
    """The settings that are not run, the most frequent first, and in how many cases."""
    names = Counter(part.partition("=")[0] for one in not_run for part in one.why)
    return ", ".join(f"{name} ({count})" for name, count in names.most_common())


# --- a case elsewhere -------------------------------------------------------------------------


def on_device(case: Case, device: str, transport: str | None = None) -> Case:
    """``case`` as ``device`` can run it, on ``transport`` if one is given."""
    stand_in = _STAND_INS[device].get(case.transport, case.transport)
    case = rerouted(case, transport or stand_in)
    if case.backend not in usable_backends(case.config, device):
        case = replace(case, backend="auto")
    return case


def rerouted(case: Case, transport: str) -> Case:
    """``case`` on another transport, with the same forwards; AlltoAll has no graph."""
    if transport != "alltoall":
        return replace(case, transport=transport)
    history = ".".join(map(str, case.steps())) if case.mode == "replayed" else case.history
    return replace(case, transport=transport, mode="eager", history=history)


def shared_evenly(case: Case, ep_size: int) -> Case:
    """``case`` with as many tokens, shared evenly by ``ep_size`` ranks; its own share stays.

    Raises ConfigError for ranks that cannot share its experts.
    """
    if ep_size == case.ep_size:
        return case
    case.config.check_ep_size(ep_size)
    parts = torch.empty(sum(case.tokens)).tensor_split(ep_size)
    return replace(case, tokens=tuple(map(len, parts)))
