"""Counts of tokens at which kernels change what they do, and strategies that draw them.

A count is of rows of a rank; it becomes rows that are gathered, rows of an expert and rows that
a rank's experts get.  Code breaks where any of these ends a tile, a bucket or a capacity, so
narrow layers get counts that wide ones could not afford.
"""

from dataclasses import replace

from hypothesis import strategies as st

from twinmoe.oracle.case import Case

#: At and beside the edges of tiles and buckets.
EDGES = (31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 512, 1024)

#: Those that are no whole number of tiles.
BESIDE = (31, 33, 63, 65, 127, 129, 255, 257)

#: Hidden and intermediate sizes of layers that take many tokens.
NARROW = (16, 24)

#: Slots (tokens by experts per token) of all ranks, and experts, that a drawn case may cost.
_MOST_SLOTS, _MOST_EXPERTS = 3072, 64

#: Many tokens: more than other cases have.
_FEWEST = 18

#: One drawn case of so many has many tokens.
_ONE_OF = 4


@st.composite
def crowded(draw: st.DrawFn, case: Case) -> Case:
    """The case as it is, or a narrow one with many tokens."""
    config = case.config
    if draw(st.integers(0, _ONE_OF - 1)) != _ONE_OF - 1 or config.num_experts > _MOST_EXPERTS:
        return case
    narrow = replace(
        config,
        hidden_size=draw(st.sampled_from(NARROW)),
        moe_intermediate_size=draw(st.sampled_from(NARROW)),
    )
    own, fullest = draw(_counts(case)), max(1, *case.tokens)
    tokens = tuple(-(-count * own // fullest) for count in case.tokens)
    return replace(case, config=narrow, tokens=tokens)


def sized(case: Case) -> st.SearchStrategy[Case]:
    """The case; where its own batch has many tokens, each other batch has a count of its own."""
    if max(case.tokens) < _FEWEST:
        return st.just(case)
    sizes = st.tuples(*[_counts(case)] * case.last_batch)
    return sizes.map(lambda counts: replace(case, batches=counts))


def _counts(case: Case) -> st.SearchStrategy[int]:
    """Edges as often as what lies between them, as far as all ranks' slots can be paid for."""
    most = _MOST_SLOTS // (case.ep_size * case.config.num_experts_per_tok)
    edges = [count for count in EDGES if count <= max(most, EDGES[0])]
    return st.sampled_from(edges) | st.integers(_FEWEST, max(_FEWEST, min(most, EDGES[-1])))
