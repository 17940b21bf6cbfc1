"""Hypothesis strategies for what happens around a forward: histories, relations, or nothing."""

from dataclasses import replace

from hypothesis import strategies as st

from twinmoe.oracle.case import Case
from twinmoe.oracle.history import HISTORIES
from twinmoe.oracle.relations import RELATIONS

#: Steps between two equal questions.
_BETWEEN = (
    *("f1", "f2", "f1", "f2", "g0", "a0", "c0", "c1", "o0", "o1"),
    *("k1", "k0", "w1", "w0", "l1", "l0", "n"),
    *("p", "p", "d0", "d1", "x0", "x1", "x2", "x3"),
)


@st.composite
def told(draw: st.DrawFn, case: Case) -> Case:
    """The case with a history, with a relation that applies to it, or as it is."""
    story = draw(st.sampled_from(("plain", "history", "history", "relation")))
    if story == "history":
        return replace(case, history=draw(histories()))
    if story == "relation":
        names = [relation.name for relation in RELATIONS.values() if relation.applies(case)]
        return replace(case, relation=draw(st.sampled_from(names)) if names else "")
    return case


def histories() -> st.SearchStrategy[str]:
    """One of the classic programs, or the same question before and after some steps."""
    between = st.lists(st.sampled_from(_BETWEEN), min_size=1, max_size=5)
    framed = between.map(lambda steps: ".".join(("f0", *steps, "f0")))
    return st.sampled_from(tuple(HISTORIES.values())) | framed
