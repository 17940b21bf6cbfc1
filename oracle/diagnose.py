"""After a failure: which named mistake, or which other contract, would make the answers right?

A name is given to what makes every judged element of several tokens right, and no other
explanation does with fewer flipped roundings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from twinmoe.oracle.case import Case
from twinmoe.oracle.contract import Ties
from twinmoe.oracle.emulation.remember import RememberingTruth
from twinmoe.oracle.evidence import Evidence
from twinmoe.oracle.hypotheses import Supposed, suppositions
from twinmoe.oracle.judgement import judge
from twinmoe.oracle.nearest import (
    Likeness,
    Moves,
    Sample,
    Search,
    as_code,
    likeness,
    made,
    moves_from,
)
from twinmoe.oracle.observation import RankObservation, Taps
from twinmoe.oracle.session import Answer
from twinmoe.oracle.showing import Showing, rounds_of
from twinmoe.oracle.truth import Truth
from twinmoe.oracle.verdict import Verdict

_TIES = (
    "exact ties do not go to the lowest expert id, as the contract promises: torch.topk leaves "
    "them open; declare ties=Ties.ANY if that is meant"
)

#: A mistake that fits the answers fits them, however few of them there are to print.
_MOST = 3

#: Forwards of one case that are explained together.
_FORWARDS = 4

#: What fits a single token may fit it by chance.
_TOKENS = 2

#: Share of elements outside the declared contract that no undeclared rounding was seen to cause.
_MISTAKEN = 0.9

#: Rows a rank of a case that is made to tell explanations apart.
_ROWS = 8


def telling(case: Case) -> Case:
    """A case of the same layer in which explanations differ: more tokens, ordinary values."""
    tokens = tuple(max(count, _ROWS) for count in case.tokens)
    alone = replace(case, history="", relation="", batches=())
    return replace(alone, tokens=tokens, values="normal", routing="free")


def diagnosis_of(*shown: Sequence[Showing]) -> list[str]:
    """Say under which mistakes, or which contract, all that was ``shown`` would be right.

    Each of ``shown`` holds all ranks' showings of one case.  Empty when no forward is wrong by
    its numbers, and when nothing known explains all of them.
    """
    forwards = [_Forward.of(answers) for showings in shown for answers in rounds_of(showings)]
    wrong = [forward for forward in forwards if forward.judged(forward.right).findings]
    if not wrong or any(forward.is_misshapen for forward in forwards):
        return []
    # what was right must stay so; the last case shown is the one made to tell
    rest = [forward for forward in reversed(forwards) if forward is not wrong[0]]
    chosen = [wrong[0], *rest][:_FORWARDS]
    told = _mistakes(chosen, _as_it_is) or _ties(chosen)
    return told or _mistakes(chosen, _open) or _contracts(chosen)


@dataclass(frozen=True)
class _Forward:
    """All ranks' answers to one forward, and what is true of it."""

    answers: Sequence[Answer]
    right: Supposed

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> "_Forward":
        first = answers[0]
        scenario = first.scenario
        ranks = len(scenario.hidden())
        return cls(answers, Supposed(scenario.config, scenario.weights(), first.contract, ranks))

    @property
    def is_misshapen(self) -> bool:
        """Whether something shown fits no layer."""
        return any(answer.observation.misshapen for answer in self.answers)

    def judged(self, supposed: Supposed) -> Verdict:
        """The verdict if the layer were as ``supposed``."""
        hidden_by_rank = self.answers[0].scenario.hidden()
        truth = supposed.truth(supposed.config, supposed.weights, hidden_by_rank)
        outputs = self.outputs(supposed.config.num_experts_per_tok)
        return judge(outputs, truth, supposed.contract)

    def outputs(self, experts_per_token: int) -> list[RankObservation]:
        """What was answered, with ids where there are as many, and no tap of other weights."""

        def ids(taps: Taps) -> Tensor | None:
            shown = taps.ids_TK
            return shown if shown is not None and shown.shape[1] == experts_per_token else None

        seen = [answer.observation for answer in self.answers]
        return [replace(each, taps=Taps(ids_TK=ids(each.taps))) for each in seen]

    def refutes(self, supposed: Supposed) -> bool:
        """Whether some element is outside at first sight: most suppositions cost no judgement."""
        return likeness(self.sample(supposed, supposed.truth), supposed.contract).outside > 0

    def sample(self, layer: Supposed, truth_type: type[Truth]) -> Sample:
        """The same as a search over contracts takes it."""
        hidden_by_rank = self.answers[0].scenario.hidden()
        truth = truth_type(layer.config, layer.weights, hidden_by_rank)
        return Sample(truth, Evidence.of(self.outputs(layer.config.num_experts_per_tok), truth))


# --- what would explain them ------------------------------------------------------------------


def _mistakes(forwards: Sequence[_Forward], first: Callable[[Supposed], Supposed]) -> list[str]:
    """The mistakes that explain every forward, those with the fewest flipped roundings."""
    supposed = [suppositions(first(forward.right)) for forward in forwards]
    flips = {}
    for sentence in supposed[0]:
        seen = _explained(forwards, [each.get(sentence) for each in supposed])
        if seen is not None:
            flips[sentence] = seen
    fewest = min(flips.values(), default=0)
    return [sentence for sentence, count in flips.items() if count == fewest][:_MOST]


def _ties(forwards: Sequence[_Forward]) -> list[str]:
    if forwards[0].right.contract.ties is Ties.ANY:
        return []
    opened = [_open(forward.right) for forward in forwards]
    return [] if _explained(forwards, opened, least=0) is None else [_TIES]


def _as_it_is(right: Supposed) -> Supposed:
    return right


def _open(right: Supposed) -> Supposed:
    return replace(right, contract=replace(right.contract, ties=Ties.ANY))


def _contracts(forwards: Sequence[_Forward]) -> list[str]:
    """The contract one or two points away that explains most, as code to paste."""
    right = forwards[0].right
    samples = [forward.sample(forward.right, RememberingTruth) for forward in forwards]
    declared = sum((likeness(sample, right.contract) for sample in samples), Likeness())
    if declared.share_outside > _MISTAKEN:
        return []
    moves = moves_from(right.contract, right.config, right.ranks)
    search = Search(right.contract, moves, samples)
    for found in search.around(most=2):
        under = [
            replace(forward.right, contract=made(forward.right.contract, found))
            for forward in forwards
        ]
        if not search.found[found].outside and _explained(forwards, under) is not None:
            return [_declaring(found, right)]
    return []


def _declaring(moves: Moves, right: Supposed) -> str:
    says = " and ".join(sorted(move.says for move in moves))
    code = as_code(moves, right.config, narrow="FORMATS[config.dtype]")
    return (
        f"{says}, which the contract does not say; if that is meant, declare "
        f"replace(contract, {code})"
    )


def _explained(
    forwards: Sequence[_Forward], supposed: Sequence[Supposed | None], least: int = _TOKENS
) -> int | None:
    """Flipped roundings if nothing is outside in any forward, as supposed of it; else None.

    Without ids a near-tied answer can only be undecided: ``least`` tokens must be decided.
    """
    flips, decided = 0, 0
    for forward, one in zip(forwards, supposed, strict=True):
        if one is None or forward.refutes(one):
            return None
        verdict = forward.judged(one)
        if verdict.findings or _foretells_nothing(one, verdict):
            return None
        flips += verdict.flips
        decided += verdict.tokens - (0 if verdict.conclusive else verdict.ambiguous)
    return flips if decided >= least else None


def _foretells_nothing(supposed: Supposed, verdict: Verdict) -> bool:
    """Whether a mistaken layer is allowed anything, as where it divides by next to nothing.

    In 16 bits, few elements differ from the value that is foretold; in 32, most do.
    """
    return supposed.config.dtype.itemsize == 2 and 2 * verdict.flips > verdict.elements
