"""After a failure: which named mistake, if it were the rule, would make the answer right?"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from twinmoe.oracle.contract import Ties
from twinmoe.oracle.hypotheses import Supposed, suppositions
from twinmoe.oracle.judgement import judge
from twinmoe.oracle.session import Answer
from twinmoe.oracle.showing import Showing
from twinmoe.oracle.verdict import Verdict

_TIES = (
    "exact ties do not go to the lowest expert id, as the contract promises: torch.topk leaves "
    "them open; declare ties=Ties.ANY if that is meant"
)

#: A mistake that fits the answer fits it, however few of them there are to print.
_MOST = 3


def diagnosis_of(showings: Sequence[Showing]) -> list[str]:
    """Name the mistakes under which the first wrong forward would be equivalent.

    Empty when no forward is wrong by its numbers, and when no known mistake explains it.
    """
    for answers in zip(*(showing.answers for showing in showings), strict=True):
        present = [answer for answer in answers if answer is not None]
        right = _right(present)
        try:
            if _judged(present, right).findings:
                return _explaining(present, right)
        except ValueError:  # shapes that fit no layer
            return []
    return []


def _right(answers: Sequence[Answer]) -> Supposed:
    first = answers[0]
    scenario = first.scenario
    ranks = len(scenario.hidden())
    return Supposed(scenario.config, scenario.weights(), first.contract, ranks)


def _explaining(answers: Sequence[Answer], right: Supposed) -> list[str]:
    fitting = (
        sentence for sentence, supposed in suppositions(right).items() if _fits(answers, supposed)
    )
    found = list(islice(fitting, _MOST))
    if found or right.contract.ties is Ties.ANY:
        return found
    # Without ids such an answer can only be undecided, not right.
    open_ties = replace(right, contract=replace(right.contract, ties=Ties.ANY))
    return [] if _judged(answers, open_ties).findings else [_TIES]


def _fits(answers: Sequence[Answer], supposed: Supposed) -> bool:
    return _judged(answers, supposed).equivalent


def _judged(answers: Sequence[Answer], supposed: Supposed) -> Verdict:
    hidden_by_rank = answers[0].scenario.hidden()
    truth = supposed.truth(supposed.config, supposed.weights, hidden_by_rank)
    observations = [answer.observation for answer in answers]
    return judge(observations, truth, supposed.contract)
