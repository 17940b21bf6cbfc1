"""Kill-switch validation: does switching the symmetric-memory kernels off really fall back?

The same inputs and weights go through every tier; the switch is set before construction,
between calls and between captures; set-ups fail on one rank; a rank decides alone.  Every
forward is judged by its truth, what ran is read off the launch counters of every rank, and
a switch that returns must return the first bits.

Legend: R ranks, T tokens of all ranks.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from twinmoe.oracle.bits import same_bits
from twinmoe.oracle.defects import JudgeDefectError, judging
from twinmoe.oracle.evidence import Evidence
from twinmoe.oracle.failures import WorkerFailure
from twinmoe.oracle.killswitch_checks import Check, Place, checks, plain_case
from twinmoe.oracle.killswitch_play import FAULTS, Played, best_transport, play
from twinmoe.oracle.session import Answer
from twinmoe.oracle.showing import judge_showings, rounds_of
from twinmoe.oracle.torchrun import TorchrunWorld
from twinmoe.oracle.verdict import Verdict
from twinmoe.oracle.world import World
from twinmoe.reference.config import ConfigError

_LAUNCHED = re.compile(r"\w+\[(.+)\]")


@dataclass(frozen=True)
class Result:
    """What became of a check.

    ``ran``: what each forward launched, on all ranks alike; ``same_bits``: whether the first
    question, asked again on the same transport, got the same bits (None: not asked); ``wrong``
    is empty for a check that holds, and ``ranks`` names who is to blame.  ``defect`` says why a
    check could not be judged.
    """

    check: str
    ran: tuple[str, ...] = ()
    verdict: Verdict | None = None
    same_bits: bool | None = None
    wrong: str = ""
    ranks: tuple[int, ...] = ()
    defect: str = ""

    @property
    def holds(self) -> bool:
        """It was judged, and nothing is wrong."""
        return not self.wrong and not self.defect


def validate(
    place: Place,
    world: World | TorchrunWorld,
    fault: str = "",
    progress: Callable[[Result], None] = lambda _: None,
    only: Sequence[Check] | None = None,
) -> list[Result]:
    """Run every check of ``place`` in ``world``, then compare what the tiers gathered.

    ``fault``: a switch that the last rank applies by half, see
    :data:`~twinmoe.oracle.killswitch_play.FAULTS`.  Raises ConfigError for an unknown one, or
    where a group of one has no rank to disagree.
    """
    _require_fault(fault, place)
    results: list[Result] = []
    gathered: dict[str, Sequence[Answer]] = {}
    multicast = place.device == "cuda" and world.run(best_transport)[0] == "nvls"
    for check in checks(place, multicast) if only is None else only:
        try:
            with judging(check.name):
                played = world.run(play, check.case, check.setup, fault)
                results.append(_result(check, played, place))
                if check.case.mode == "eager" and check.case.config == plain_case(place).config:
                    gathered |= dict(_by_label(played))
        except WorkerFailure as failure:
            results.append(_failed(check, failure))
        except JudgeDefectError as defect:
            results.append(Result(check.name, defect=str(defect)))
        progress(results[-1])
    return results + _same_gathers(gathered)


def _require_fault(fault: str, place: Place) -> None:
    if fault and fault not in FAULTS:
        raise ConfigError(
            f"fault ({fault!r}) is no half-applied switch: use one of {', '.join(FAULTS)}"
        )
    if fault and place.ep_size == 1:
        raise ConfigError(
            f"fault ({fault!r}) needs ranks that differ, and --ep 1 has one: use --ep 2 or more"
        )


# --- one check ----------------------------------------------------------------------------------


def _failed(check: Check, failure: WorkerFailure) -> Result:
    """A failure of workers is what a switch called by one rank alone must end in."""
    told = f"{type(failure).__name__}: {failure}"
    last = check.case.ep_size - 1
    if check.setup.alone == "calls" and last in failure.ranks:
        return Result(check.name, (f"reported as {told.splitlines()[0]}",))
    return Result(check.name, wrong=told, ranks=failure.ranks)


def _result(check: Check, played: Sequence[Played], place: Place) -> Result:
    rounds = rounds_of([one.showing for one in played])
    ran = tuple(_launched(answers) for answers in rounds)
    for wrong, ranks in (_of_own_mind(check, played), _other_transport(check, played)):
        if wrong:
            return Result(check.name, ran, wrong=wrong, ranks=ranks)
    if check.told:
        return Result(check.name, (*ran, "all ranks refuse, and name it"), same_bits=None)
    verdict = judge_showings(check.case, [one.showing for one in played])
    wrong, ranks = "", ()
    if not verdict.equivalent:
        wrong = str(verdict)
        ranks = tuple(sorted({finding.rank for finding in verdict.findings}))
    elif silent := [rank for rank, one in enumerate(played) if not _names(check, one, place)]:
        wrong, ranks = f"the report does not say {check.refusal!r}", tuple(silent)
    same = _same_again(check, rounds)
    if same is False and not wrong:
        wrong = "the first question, asked again on the same transport, got other bits"
    return Result(check.name, ran, verdict, same, wrong, ranks)


def _of_own_mind(check: Check, played: Sequence[Played]) -> tuple[str, tuple[int, ...]]:
    """Ranks whose layer asked for another switch than was set, and the agreed refusal."""
    refusals = {one.refusal for one in played}
    if check.told:
        fine = len(refusals) == 1 and check.told in refusals.pop()
        why = "" if fine else f"not all ranks refuse with {check.told!r}: {refusals}"
        return why, ()
    ordered = [check.setup.killed]
    ordered += [bool(step.number) for step in check.case.steps() if step.kind == "k"]
    astray = [rank for rank, one in enumerate(played) if one.asked != ordered[: len(one.asked)]]
    if astray:
        asked = played[astray[0]].asked
        place = next(i for i, flag in enumerate(asked) if flag != ordered[i])
        return f"was told {_word(ordered[place])} and asked for {_word(asked[place])}", tuple(
            astray
        )
    told = next(iter(refusals - {""}), "")
    return told, tuple(rank for rank, one in enumerate(played) if one.refusal)


def _word(killed: bool) -> str:
    return f"kill switch {'on' if killed else 'off'}"


def _other_transport(check: Check, played: Sequence[Played]) -> tuple[str, tuple[int, ...]]:
    """Ranks that hold another transport than the one that the switch leaves."""
    for place, (held, label) in enumerate(zip(played[0].held, check.labels, strict=False), start=1):
        astray = tuple(rank for rank, other in enumerate(held) if other != label)
        if astray:
            return f"forward {place} would run {held[astray[0]]} there, not {label}", astray
    return "", ()


def _launched(answers: Sequence[Answer]) -> str:
    """What all ranks' counters say that a forward launched; by rank where they differ."""
    by_rank = [
        "+".join(
            sorted(
                {
                    found[1]
                    for name in answer.observation.launches
                    if (found := _LAUNCHED.match(name))
                }
            )
        )
        for answer in answers
    ]
    if len(set(by_rank)) == 1:
        return by_rank[0]
    return "/".join(by_rank)


def _names(check: Check, played: Played, place: Place) -> bool:
    """Whether a rank's report gives the reason, and the rank where one rank alone has it."""
    if not check.refusal:
        return True
    if not check.setup.inject:
        return check.refusal in played.report
    numbers = re.findall(rf"ranks? ([\d, ]+): {check.refusal}", played.report)
    return any(str(place.ep_size - 1) in found.split(", ") for found in numbers)


def _same_again(check: Check, rounds: Sequence[Sequence[Answer]]) -> bool | None:
    """Whether the first forward's question, asked last on the same transport, got its bits."""
    first, last = rounds[0], rounds[-1]
    asked_again = len(rounds) > 1 and check.labels[0] == check.labels[-1]
    if not asked_again or first[0].scenario != last[0].scenario:
        return None
    return all(
        same_bits(one.observation.output_TH, other.observation.output_TH)
        for one, other in zip(first, last, strict=True)
    )


# --- between tiers ------------------------------------------------------------------------------


def _by_label(played: Sequence[Played]) -> Iterator[tuple[str, Sequence[Answer]]]:
    """The last forward, whose taps are whole, under the name of what it ran on."""
    rounds = rounds_of([one.showing for one in played])
    if rounds and len(rounds) == len(played[0].held):
        yield played[0].held[-1][0], rounds[-1]


def _same_gathers(gathered: dict[str, Sequence[Answer]]) -> list[Result]:
    """Whatever gathers it, a row is the same bits on every rank."""
    name = "gathers are the same bits on every tier"
    if len(gathered) < 2:
        return []
    (first, answers), *others = gathered.items()
    expected = _gathers(answers)
    for label, other in others:
        for what, tensor in _gathers(other).items():
            if not same_bits(tensor, expected[what]):
                wrong = f"gathered {what} differ between {first} and {label}"
                return [Result(name, tuple(gathered), wrong=wrong)]
    return [Result(name, tuple(gathered))]


def _gathers(answers: Sequence[Answer]) -> dict[str, torch.Tensor]:
    """What every rank received, without padding, by name: [R, T, ...]."""
    observations = [answer.observation for answer in answers]
    evidence = Evidence.of(observations, answers[0].scenario.truth())
    found = {
        "hidden states": evidence.gathered_hidden_RTH,
        "ids": evidence.gathered_ids_RTK,
        "weights": evidence.gathered_weights_RTK,
    }
    return {name: tensor for name, tensor in found.items() if tensor is not None}
