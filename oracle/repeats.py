"""The same question on the same path gets the same bits, whatever happened in between."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from twinmoe.oracle.bits import as_bits, same_bits
from twinmoe.oracle.digits import apart
from twinmoe.oracle.observation import PLAIN_PATH, RankObservation
from twinmoe.oracle.session import Answer
from twinmoe.oracle.subject import bucket_for
from twinmoe.oracle.verdict import Finding

#: What a rank owns of a forward, in the order of the data flow, with the stage that made it.
_OWN = (("ids_TK", "router"), ("weights_TK", "router"), ("routed_TH", "combine"))


def changed_answers(rounds: Sequence[Sequence[Answer]]) -> Iterator[Finding]:
    """Compare each forward (one answer a rank) with the first that was asked the same.

    Layer, weights, batch, contract and bucket make the question.  A contract that is not
    deterministic promises the bits of the routing alone.
    """
    first_asked: dict[object, Sequence[Answer]] = {}
    for answers in rounds:
        answer = answers[0]
        bucket = 0 if answer.call.path == "alltoall" else bucket_for(answer.call.max_tokens)
        # Filling new memory, torch may choose other kernels for anyone's operations.
        is_plain = answer.observation.path.startswith(PLAIN_PATH)
        question = (answer.scenario, answer.contract, bucket, is_plain and answer.call.poisoned)
        first = first_asked.setdefault(question, answers)
        if first is not answers:
            yield from _differences(first, answers)


def _differences(first: Sequence[Answer], again: Sequence[Answer]) -> Iterator[Finding]:
    promised = ("router", "combine", "output") if first[0].contract.deterministic else ("router",)
    for rank, (one, other) in enumerate(zip(first, again, strict=True)):
        for stage, before, after in _pairs(one.observation, other.observation):
            if stage not in promised or same_bits(before, after):
                continue
            token, dim, said = _difference(before, after)
            yield Finding(
                stage,
                rank,
                token,
                dim,
                f"{other.act} answers otherwise than {one.act}, which asked the same: {said} on "
                f"rank {rank}",
                relation="same bits again",
            )
            break


def _difference(before: Tensor, after: Tensor) -> tuple[int | None, int | None, str]:
    """Token, dim and words for the first place at which two answers to one question differ."""
    if before.dtype != after.dtype:
        return None, None, f"{before.dtype}, then {after.dtype}"
    wrong = as_bits(before) != as_bits(after)
    token, dim = wrong.nonzero()[0].tolist()
    was, now = apart(float(before[token, dim]), float(after[token, dim]))
    return (
        token,
        dim,
        f"{int(wrong.sum())} of {wrong.numel()} elements differ, first [token {token}, dim {dim}]: "
        f"{was}, then {now}",
    )


def _pairs(one: RankObservation, other: RankObservation) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name, stage in _OWN:
        before, after = getattr(one.taps, name), getattr(other.taps, name)
        if before is not None and after is not None:
            yield stage, before, after
    yield "output", one.output_TH, other.output_TH
