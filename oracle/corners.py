"""Corners: one pinned case for each kind of trouble that must be in every check.

A check's cells of one expert-parallel size share them out (:mod:`twinmoe.oracle.check`).
"""

from collections.abc import Callable
from dataclasses import fields, replace

from twinmoe.oracle.case import Case
from twinmoe.oracle.counts import BESIDE, NARROW
from twinmoe.oracle.history import HISTORIES
from twinmoe.oracle.published_routings import KIMI_K3, ROUTINGS_OF_MODELS
from twinmoe.oracle.strategies import Cell
from twinmoe.reference.config import MoEConfig


def _case(cell: Cell, tokens: tuple[int, ...] | None = None, **changes: object) -> Case:
    """A dense, non-neutral case of ``cell``, with ``changes`` to the case or its config."""
    own = {field.name for field in fields(Case)} - {"config", "tokens", "transport", "mode"}
    config = MoEConfig(
        **{
            "hidden_size": 96,
            "moe_intermediate_size": 40,
            "num_experts": cell.ep_size * 3,
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 2.5,
            "dtype": cell.dtype,
            **{name: value for name, value in changes.items() if name not in own},
        }  # type: ignore[arg-type]
    )
    ragged = tuple((5 * rank + 4) % 7 for rank in range(cell.ep_size))
    return Case(
        config=config,
        tokens=ragged if tokens is None else tokens,
        transport=cell.transport,
        mode=cell.mode,
        **{name: value for name, value in changes.items() if name in own},  # type: ignore[arg-type]
    )


def _published(cell: Cell, routing: MoEConfig, most: int) -> Case:
    """A published model's routing at the narrowest widths; few tokens visit many experts."""
    case = _case(cell)
    few = tuple(min(tokens, most) for tokens in case.tokens)
    return replace(case, tokens=few, config=replace(routing, dtype=cell.dtype))


def _sweep(cell: Cell, counts: tuple[int, ...], **changes: object) -> Case:
    """One batch of each count on a narrow layer, each on one rank, another one with each batch.

    Of R ranks each takes its part of a batch's cost, so they get one of R counts.
    """
    counts = counts[:: cell.ep_size]
    settings: dict[str, object] = {
        "hidden_size": NARROW[0],
        "moe_intermediate_size": NARROW[0],
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "history": ".".join(f"f{number}" for number in range(len(counts))),
        "batches": counts[1:],
    }
    return _case(cell, (counts[0],) + (0,) * (cell.ep_size - 1), **(settings | changes))


Corner = Callable[[Cell], Case]

#: Each kind of trouble that must be in every check, by name.
CORNERS: dict[str, Corner] = {
    "empty ranks": lambda c: _case(
        c, tuple(3 if r == c.ep_size - 1 else 0 for r in range(c.ep_size))
    ),
    "no tokens at all": lambda c: _case(c, (0,) * c.ep_size),
    "one token": lambda c: _case(c, (1,) + (0,) * (c.ep_size - 1)),
    # Every count is of one rank's rows, of gathered rows and of what the experts get.  The sweeps
    # share the edges out: above and below a tile where one expert has them all, its exact
    # multiples where it has not.
    "counts beside tiles, to one expert": lambda c: _sweep(
        c, BESIDE[:6], num_experts_per_tok=1, routing="one_expert", backend="triton"
    ),
    "large counts, to one expert": lambda c: _sweep(
        # more experts, beside many rows, than a warp has lanes
        c,
        (*BESIDE[6:], 1024),
        num_experts=40,
        num_experts_per_tok=1,
        routing="one_expert",
    ),
    "counts spread over the experts": lambda c: _sweep(c, (18, 32, 64, 100, 128, 200)),
    "counts, to one rank": lambda c: _sweep(c, (33, 256, 512), routing="one_rank"),
    "all tokens on one rank": lambda c: _case(
        c, (9,) + (0,) * (c.ep_size - 1), shared_expert_intermediate_size=24
    ),
    "all tokens to one expert": lambda c: _case(c, num_experts_per_tok=1, routing="one_expert"),
    "all tokens to one rank": lambda c: _case(c, routing="one_rank", values="recorded"),
    "k = 1, unnormalised": lambda c: _case(
        c, num_experts_per_tok=1, norm_topk_prob=False, scoring_func="sigmoid"
    ),
    "k = E": lambda c: _case(
        c, num_experts=max(12, c.ep_size * 3), num_experts_per_tok=max(12, c.ep_size * 3)
    ),
    # Ids that fit no byte, and experts that nobody visits; the last ones are visited.
    "more experts than a byte can name": lambda c: _published(c, KIMI_K3, most=1),
    "128 experts, 8 of them chosen": lambda c: _published(c, ROUTINGS_OF_MODELS["Qwen3-MoE"], 2),
    # Where widths coincide, no shape tells which axis is which: w2, the router and the batch are
    # square in the first, w13, ids and the shared expert in the second.
    "all widths the same": lambda c: _case(
        c,
        tuple(16 - rank for rank in range(c.ep_size)),
        hidden_size=16,
        moe_intermediate_size=16,
        num_experts=16,
        num_experts_per_tok=max(2, c.ep_size),
        shared_expert_intermediate_size=16,
    ),
    "twice the intermediate width is the hidden one": lambda c: _case(
        c,
        (4,) * c.ep_size,
        hidden_size=16,
        moe_intermediate_size=8,
        num_experts=max(8, 4 * c.ep_size),
        num_experts_per_tok=4,
        shared_expert_intermediate_size=8,
    ),
    "one expert a rank": lambda c: _case(
        c, num_experts=c.ep_size, num_experts_per_tok=min(c.ep_size, 2)
    ),
    "sizes beside every tile": lambda c: _case(c, hidden_size=33, moe_intermediate_size=17),
    "exact ties": lambda c: _case(c, routing="ties", num_experts=c.ep_size * 4),
    "all scores equal": lambda c: _case(c, routing="equal"),
    # Exponentials of -60 and -120, which only a shifted softmax survives; sums of such sigmoids
    # lie far below the normalisation's epsilon.
    "vanishing exponentials": lambda c: _case(c, routing="silent"),
    "vanishing sigmoids": lambda c: _case(c, routing="silent", scoring_func="sigmoid"),
    # Biases that decide, and differ by less than 16 bits can hold.
    "finely graded biases": lambda c: _case(
        c,
        routing="equal",
        num_experts=c.ep_size * 4,
        scoring_func="sigmoid",
        use_correction_bias=True,
        bias="fine",
    ),
    # Fewer finite scores than experts to choose, and a NaN among what remains.
    "disabled experts": lambda c: _case(
        c,
        num_experts=c.ep_size * 4,
        scoring_func="sigmoid",
        use_correction_bias=True,
        bias="disabled_nan",
        seed=1,
    ),
    "a poisoned token": lambda c: _case(
        c,
        tuple(2 + r % 2 for r in range(c.ep_size)),
        shared_expert_intermediate_size=24,
        relation="poisoned_token",
    ),
    "near ties": lambda c: _case(c, routing="near_ties", num_experts=c.ep_size * 4),
    "groups, negative bias": lambda c: _case(
        c,
        num_experts=max(8, c.ep_size * 4),  # groups of one cannot be ranked wrongly
        n_group=4,
        topk_group=2,
        num_experts_per_tok=min(2, c.ep_size * 2),
        scoring_func="sigmoid",
        use_correction_bias=True,
        bias="negative",
        shared_expert_intermediate_size=24,
    ),
    "recorded outliers, poisoned padding": lambda c: _case(
        c, hidden_size=384, values="recorded", padding="nan", layout="strided", wire=_wire(c)
    ),
}

#: By how many experts, and of what kind: neighbours, so that cells of three dtypes get one each.
_KINDS_OF_EXPERTS: dict[str, dict[str, object]] = {
    "one a token": {"num_experts_per_tok": 1},
    "one a token, sharply": {"num_experts_per_tok": 1, "hidden_act": "relu2"},
    "one a token, ungated": {"num_experts_per_tok": 1, "gated": False},
}

CORNERS |= {
    f"{magnitude.replace('_', ' ')}: {kind}": lambda c, magnitude=magnitude, changes=changes: (  # type: ignore[misc]
        _extreme(c, magnitude, **changes)
    )
    for magnitude in ("fp16_ends", "own_ends")
    for kind, changes in _KINDS_OF_EXPERTS.items()
}

CORNERS |= {
    "large input": lambda c: _extreme(c, "large_input"),
    "small input": lambda c: _extreme(c, "small_input"),
    "large logits": lambda c: _extreme(c, "large_logits", num_experts_per_tok=1),
}


#: Histories that others contain: calls in turn, and weights loaded twice in place.
_CONTAINED = ("A, B, A", "large, small, large", "load twice")

CORNERS |= {
    f"history: {name}": lambda c, program=program: _history_case(c, program)  # type: ignore[misc]
    for name, program in HISTORIES.items()
    if name not in _CONTAINED
}
# Tile maps and counts of our own kernels, whatever backend is the first choice.
CORNERS["busy, then idle experts"] = lambda c: replace(
    _history_case(c, "f0.f1.f0.f2.f0"), backend="triton"
)


def _history_case(cell: Cell, program: str) -> Case:
    """More experts than a token visits, which batches keep busy and leave idle in turn."""
    return _case(
        cell,
        num_experts=max(8, 3 * cell.ep_size),
        hidden_size=48,
        moe_intermediate_size=16,
        routing="alternating",
        shared_expert_intermediate_size=24,
        history=program,
    )


def _extreme(cell: Cell, magnitude: str, **changes: object) -> Case:
    """Tokens enough to visit an expert of every stage, at sizes that cost little."""
    settings = {
        "num_experts": 6 * max(1, cell.ep_size // 2),
        "hidden_size": 48,
        "moe_intermediate_size": 16,
        "routed_scaling_factor": 10.0,  # sums overflow that no expert's output alone does
        **changes,
    }
    tokens = (-(-24 // cell.ep_size),) * cell.ep_size
    return _case(cell, tokens, magnitude=magnitude, wire=_wire(cell), **settings)


def _wire(cell: Cell) -> str:
    return "fp32" if cell.transport == "alltoall" else "model"
