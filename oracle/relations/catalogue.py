"""The relations, by name: each is one property that any layer must have.

Permutation, relabelling, linearity and batch relations are classic metamorphic
relations (Chen, Cheung, Yiu: Metamorphic testing, 1998); here each one names the rounding
under which it is exact, and is compared inside the envelope where it is not.
"""

from collections.abc import Iterator, Sequence

import torch

from twinmoe.oracle.case import Case
from twinmoe.oracle.digits import apart
from twinmoe.oracle.relations import changes
from twinmoe.oracle.relations.relation import (
    Complaint,
    Mapped,
    Relation,
    Shown,
    rows_of,
    tapped,
)
from twinmoe.reference.config import ConfigError

#: Powers of two, so that scaling is exact.
_FACTOR, _SHIFT = 0.5, 4.0


def _is_free(case: Case) -> bool:
    """Scores are not built to tie, so an expert's id decides nothing."""
    untied = ("free", "one_expert", "one_rank", "alternating")
    return case.routing in untied and case.config.num_experts > 1


def _sums_regardless_of_ranks(case: Case) -> bool:
    """Ranks' shares are not rounded one by one, so it makes no difference who adds what."""
    return case.wire == "fp32" or case.config.dtype is torch.float32


def _same_rows(_case: Case, _plain: Shown, changed: Sequence[Shown]) -> Iterator[Mapped]:
    yield from (Mapped(rows_of(shown)) for shown in changed)


def _rows_moved_back(case: Case, _plain: Shown, changed: Sequence[Shown]) -> Iterator[Mapped]:
    yield Mapped(changes.PermutedTokens(case.seed).undo(rows_of(changed[0])))


def _halves_joined(case: Case, plain: Shown, changed: Sequence[Shown]) -> Iterator[Mapped]:
    first, second = changed
    pairs = zip(first, second, strict=True)
    yield Mapped(torch.cat([torch.cat([a.output_TH, b.output_TH]) for a, b in pairs]))


def _all_but_the_poisoned(case: Case, plain: Shown, changed: Sequence[Shown]) -> Iterator[Mapped]:
    rows_TH, before_TH = rows_of(changed[0]).clone(), rows_of(plain)
    token = changes.PoisonedToken(case.seed).token(len(rows_TH))
    rows_TH[token] = before_TH[token]
    yield Mapped(rows_TH)


def _same_routing(_case: Case, plain: Shown, changed: Sequence[Shown]) -> Iterator[Complaint]:
    """Ids and weights, bit for bit: the bias is exact and cancels in the comparison."""
    for name in ("ids_TK", "weights_TK"):
        before, after = tapped(plain, name), tapped(changed[0], name)
        if before is not None and after is not None and not torch.equal(before, after):
            token = int((before != after).any(dim=1).nonzero()[0])
            yield Complaint(
                "router",
                f"a bias that grows by {_SHIFT} for all experts changed {name} of token {token} "
                f"from {before[token].tolist()} to {after[token].tolist()}",
            )


def _routed_scales(_case: Case, plain: Shown, changed: Sequence[Shown]) -> Iterator[Complaint]:
    before, after = tapped(plain, "routed_TH"), tapped(changed[0], "routed_TH")
    if before is None or after is None:
        return
    expected = before * _FACTOR
    # Below the normal range halving rounds, and a flush to zero starts somewhere else.
    wrong = (after != expected) & (expected.abs() > 2.0**-100)
    if wrong.any():
        token, dim = wrong.nonzero()[0].tolist()
        old, new, right = apart(*(float(x[token, dim]) for x in (before, after, expected)))
        yield Complaint(
            "combine",
            f"with {_FACTOR} times the scale, the routed sum[token {token}, dim {dim}] went from "
            f"{old} to {new}, not to {right}",
        )


def _scales_exactly(case: Case) -> bool:
    """No end of an exponent range between the scaled tensor and the tapped sum."""
    wide = case.config.dtype is not torch.float16 and case.magnitude != "own_ends"
    return wide and not case.config.router_weight_on_input


_ALL = (
    Relation(
        "permuted_tokens",
        "tokens that change places, also between ranks, keep their answers",
        lambda case: sum(case.tokens) > 1,
        lambda case: (changes.PermutedTokens(case.seed),),
        _rows_moved_back,
    ),
    Relation(
        "relabelled_experts",
        "experts that change ids together with router, bias and weights change no answer",
        lambda case: _is_free(case) and _sums_regardless_of_ranks(case),
        lambda case: (changes.RelabelledExperts(case.seed),),
        _same_rows,
        new_ids=True,
    ),
    Relation(
        "shifted_bias",
        "one constant added to every correction bias changes neither ids nor weights",
        lambda case: case.config.use_correction_bias and case.bias == "mixed" and _is_free(case),
        lambda _: (changes.ShiftedBias(_SHIFT),),
        _same_routing,
    ),
    Relation(
        "scaled_down_projection",
        "the routed sum is linear in w2, exactly so for a power of two",
        _scales_exactly,
        lambda _: (changes.ScaledDown(_FACTOR),),
        _routed_scales,
    ),
    Relation(
        "scaled_routing",
        "the routed sum is linear in routed_scaling_factor, exactly so for a power of two",
        _scales_exactly,
        lambda _: (changes.ScaledRouting(_FACTOR),),
        _routed_scales,
    ),
    Relation(
        "silenced_experts",
        "with experts that answer zero, the shared expert is left, once",
        lambda case: case.config.has_shared_expert,
        lambda _: (changes.SilencedExperts(),),
        lambda *_: iter(()),
    ),
    Relation(
        "tracers",
        "with experts that answer their own integers, every slot is hit exactly once",
        lambda case: not case.config.router_weight_on_input,
        lambda _: (changes.Tracers(),),
        lambda *_: iter(()),
    ),
    Relation(
        "poisoned_token",
        "a token that is NaN is its own affair: no other token's answer changes",
        lambda case: sum(case.tokens) > 1,
        lambda case: (changes.PoisonedToken(case.seed),),
        _all_but_the_poisoned,
    ),
    Relation(
        "alone",
        "expert parallelism changes no answer: one rank alone gives the same",
        lambda case: case.ep_size > 1 and _sums_regardless_of_ranks(case),
        lambda _: (changes.Alone(),),
        _same_rows,
    ),
    Relation(
        "on_one_rank",
        "a token's answer does not depend on which rank owns it, nor on empty ranks",
        lambda case: case.ep_size > 1,
        lambda _: (changes.OnOneRank(),),
        _same_rows,
    ),
    Relation(
        "halves",
        "a batch in two halves, one of them perhaps empty, gets the answers of the whole",
        lambda case: sum(case.tokens) > 0,
        lambda _: (changes.Half(second=False), changes.Half(second=True)),
        _halves_joined,
    ),
)

#: Every relation by name.
RELATIONS: dict[str, Relation] = {relation.name: relation for relation in _ALL}


def require_relation(case: Case) -> None:
    """Raise ConfigError unless the case's relation, if it names one, exists and applies to it."""
    if not case.relation:
        return
    if case.relation not in RELATIONS:
        raise ConfigError(
            f"relation ({case.relation!r}) is unknown: use one of {', '.join(RELATIONS)}"
        )
    if not RELATIONS[case.relation].applies(case):
        raise ConfigError(
            f"relation ({case.relation!r}) says nothing about this case: "
            f"{RELATIONS[case.relation].says}; use a case that has what it speaks of"
        )
