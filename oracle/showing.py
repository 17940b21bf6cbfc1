"""From all ranks' showings of one case to one verdict.

Every forward is judged against its own truth; then the forwards are compared with each
other: by the case's relation, by the bits of equal questions, by the ranks' journals.

Legend: T tokens of all ranks in rank order, H hidden_size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from twinmoe.oracle import resources
from twinmoe.oracle.agreement import collective_mismatches, missing_exchanges
from twinmoe.oracle.breadcrumbs import Issued
from twinmoe.oracle.case import Case
from twinmoe.oracle.contract import Order, RoundingContract, Wire
from twinmoe.oracle.judgement import judge
from twinmoe.oracle.observation import PLAIN_PATH, RankObservation
from twinmoe.oracle.padding import leaks
from twinmoe.oracle.relations import RELATIONS, Mapped
from twinmoe.oracle.repeats import changed_answers
from twinmoe.oracle.session import Answer
from twinmoe.oracle.truth import Truth
from twinmoe.oracle.verdict import Finding, Verdict, merged, stage_of_operation

#: All ranks' answers to one forward.
Round = Sequence[Answer]


@dataclass(frozen=True)
class Showing:
    """What one rank sends back about one subject: its forwards, collectives and remains.

    An answer is None where the rank had no part in the forward.  ``left`` says what the rank
    still held after everything was released, ``left_out`` what the layer does not offer, ``met``
    how often a planted fault was met.
    """

    answers: tuple[Answer | None, ...]
    journal: tuple[Issued, ...]
    left: tuple[str, ...] = ()
    left_out: frozenset[str] = frozenset()
    met: int = 0


def rounds_of(showings: Sequence[Showing]) -> list[list[Answer]]:
    """The answers of all ranks to each forward."""
    answers = zip(*(showing.answers for showing in showings), strict=True)
    return [[answer for answer in of_all if answer is not None] for of_all in answers]


def judge_showings(case: Case, showings: Sequence[Showing]) -> Verdict:
    """Judge every forward of a subject on all ranks, and what must hold between them."""
    rounds = rounds_of(showings)
    verdict = merged([_judge_forward(answers) for answers in rounds])
    if verdict.conclusive:  # else there are forwards that nothing can be compared with
        verdict.findings += changed_answers(rounds)
        if case.relation:
            verdict.findings += _related(case, rounds)
    journals = [showing.journal for showing in showings]
    exchanges = any(len(answers) > 1 and _claims_alltoall(answers[0]) for answers in rounds)
    verdict.findings += (
        Finding(found.stage, 0, None, None, found.message, relation="collective contract")
        for found in (
            *collective_mismatches(journals),
            *(missing_exchanges(journals) if exchanges else ()),
        )
    )
    verdict.findings += (
        Finding("output", rank, None, None, f"rank {rank}: {text}", relation=resources.RELATION)
        for rank, showing in enumerate(showings)
        for text in showing.left
    )
    return verdict


def _claims_alltoall(answer: Answer) -> bool:
    is_plain = answer.observation.path.startswith(PLAIN_PATH)
    return answer.call.path == "alltoall" and not is_plain


# --- one forward ------------------------------------------------------------------------------


def _judge_forward(answers: Round) -> Verdict:
    """Judge the numbers, and that all ranks took, and really ran, the claimed path."""
    first = answers[0]
    observations = [answer.observation for answer in answers]
    verdict = judge(observations, first.scenario.truth(), first.contract)
    for rank, answer in enumerate(answers):
        tokens = [len(other.observation.output_TH) for other in answers]
        verdict.findings += _untrue_claims(rank, answer, first.contract)
        verdict.findings += (
            Finding("output", rank, None, None, text) for text in answer.complaints
        )
        verdict.findings += leaks(rank, answer.observation.taps, tokens)
    if first.act:
        verdict.findings = [
            replace(finding, message=f"{first.act}: {finding.message}")
            for finding in verdict.findings
        ]
    return verdict


def _untrue_claims(rank: int, answer: Answer, agreed: RoundingContract) -> Iterator[Finding]:
    """What a rank did not run, or ran besides, of the path that it claims."""
    if answer.contract != agreed:
        yield Finding(
            "dispatch",
            rank,
            None,
            None,
            f"rank {rank} runs {answer.contract.name}, rank 0 {agreed.name}: all ranks must take "
            "the same path",
        )
    launched = answer.observation.launches.keys()
    moved = {name for name in launched if name.startswith(("all_gather[", "reduce_scatter["))}
    for said, names in (
        ("never", answer.required - launched),
        ("also", moved - answer.required),
    ):
        by_stage: dict[str, list[str]] = {}
        for name in sorted(names):
            by_stage.setdefault(stage_of_operation(name), []).append(name)
        for stage, of_stage in by_stage.items():
            text = (
                f"rank {rank} claims {answer.observation.path!r}, but {said} launched "
                f"{', '.join(of_stage)}"
            )
            yield Finding(stage, rank, None, None, text)


# --- relations --------------------------------------------------------------------------------


def _related(case: Case, rounds: Sequence[Round]) -> Iterator[Finding]:
    relation = RELATIONS[case.relation]
    shown = [[answer.observation for answer in answers] for answers in rounds]
    truth = rounds[0][0].scenario.truth()
    contract = _in_any_order(rounds[0][0].contract, relation.new_ids)
    for statement in relation.holds(case, shown[0], shown[1:]):
        if not isinstance(statement, Mapped):
            yield Finding(statement.stage, 0, None, None, statement.message, relation=relation.name)
            continue
        for finding in _outside(statement.rows_TH, truth, contract):
            yield replace(
                finding,
                message=f"{relation.says}, yet {finding.message}",
                relation=relation.name,
            )


def _outside(rows_TH: Tensor, truth: Truth, contract: RoundingContract) -> list[Finding]:
    """What is wrong with a changed case's outputs as answers to the unchanged one."""
    observations = [RankObservation(rows) for rows in rows_TH.split(truth.tokens_by_rank)]
    return judge(observations, truth, contract).findings


def _in_any_order(contract: RoundingContract, new_ids: bool) -> RoundingContract:
    """The contract without its promises on order: of ranks, and of experts that change ids."""
    wire = Wire.ANY_ORDER if contract.wire is Wire.RANK_ORDER else contract.wire
    by_id = contract.combine_order is Order.EXPERT_ID
    return replace(
        contract,
        wire=wire,
        combine_order=Order.ANY if by_id and new_ids else contract.combine_order,
    )
