"""Whatever a layer shows is a finding about the layer: every field of an observation, fuzzed."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import fields, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.oracle.subjects import Graphed, layer, reference
from tests.reference.inputs import tokens
from twinmoe.oracle import RankObservation, RoundingContract, Taps, Truth, Verdict, judge, wire
from twinmoe.oracle.admission import admitted
from twinmoe.oracle.contracts import graphed_contract, reference_contract
from twinmoe.oracle.emulation.remember import RememberingTruth

Judged = tuple[tuple[RankObservation, ...], Truth, RoundingContract]


class Subclass(Tensor):
    """A tensor of somebody's own class."""


@cache
def judged(kind: str) -> Judged:
    """Observations of a graphed layer of two ranks, or of a plain one, that are equivalent."""
    config, weights = layer(hidden_size=8, moe_intermediate_size=4)
    if kind == "plain":
        x_TH = tokens(config, 5, 0)
        truth = RememberingTruth(config, weights, [x_TH])
        return (reference(config, weights, x_TH),), truth, reference_contract(config)
    hidden = [tokens(config, count, count) for count in (3, 2)]
    contract = graphed_contract(config, "grouped_mm", "p2p", torch.float32)
    seen = Graphed(config, weights, hidden).observe()
    return tuple(seen), RememberingTruth(config, weights, hidden), contract


def put(seen: RankObservation, name: str, value: Any) -> RankObservation:
    """``seen`` with another value of a field or of a tap."""
    if hasattr(seen, name):
        return replace(seen, **{name: value})
    return replace(seen, taps=replace(seen.taps, **{name: value}))


def shown(seen: RankObservation) -> list[str]:
    """The names of all fields and taps that hold a tensor."""
    taps = [field.name for field in fields(Taps) if getattr(seen.taps, field.name) is not None]
    return ["output_TH", *taps]


# --- what no correct layer shows ----------------------------------------------------------------

#: From a right tensor to something that is no right tensor, whatever stands in it.
MISSHAPEN = {
    "a list": lambda tensor: tensor.tolist(),
    "a number": lambda tensor: 1.5,
    "an array": lambda tensor: np.zeros(tuple(tensor.shape)),
    "a function": lambda tensor: lambda: tensor,
    "sparse": lambda tensor: tensor.to_sparse(),
    "meta": lambda tensor: tensor.to("meta"),
    "nested": lambda tensor: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "quantized": lambda tensor: torch.quantize_per_tensor(
        torch.zeros(tensor.shape), 0.1, 0, torch.qint8
    ),
    "complex": lambda tensor: tensor.to(torch.complex64).conj(),
    "bool": lambda tensor: tensor.bool(),
    "float8": lambda tensor: tensor.float().to(torch.float8_e4m3fn),
    "one row more": lambda tensor: torch.cat([tensor, tensor[:1]]),
    "one column more": lambda tensor: torch.cat([tensor, tensor[..., :1]], dim=-1),
    "one row less": lambda tensor: tensor[1:],
    "no columns": lambda tensor: tensor[..., :0],
    "flat": lambda tensor: tensor.flatten(),
    "one dimension more": lambda tensor: tensor[None],
    "a scalar": lambda tensor: tensor.flatten()[0],
}

#: From a right tensor to the same numbers in another manner, which any layer may show.
HARMLESS = {
    "strided": lambda tensor: torch.stack([tensor, tensor], dim=-1)[..., 0],
    "a subclass": lambda tensor: tensor.as_subclass(Subclass),
    "with gradient": lambda tensor: (
        tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor
    ),
    "for inference": torch.inference_mode()(lambda tensor: tensor.clone()),
}


@pytest.mark.parametrize("kind", ["graphed", "plain"])
@pytest.mark.parametrize("wrong", MISSHAPEN)
def test_a_misshapen_field_is_a_finding_that_names_it(kind: str, wrong: str) -> None:
    """Each field of the last rank in turn: field and rank are named, and nothing is raised."""
    seen, truth, contract = judged(kind)
    for name in shown(seen[-1]):
        right = getattr(seen[-1], name, None)
        right = getattr(seen[-1].taps, name) if right is None else right
        spoilt = (*seen[:-1], put(seen[-1], name, MISSHAPEN[wrong](right)))
        verdict = judge(spoilt, truth, contract)
        assert not verdict.equivalent
        messages = [finding.message for finding in verdict.findings]
        assert any(f"rank {len(seen) - 1}'s {name} " in message for message in messages), messages
        assert str(verdict)


@pytest.mark.parametrize("kind", ["graphed", "plain"])
@pytest.mark.parametrize("manner", HARMLESS)
def test_what_holds_the_same_numbers_is_as_good(kind: str, manner: str) -> None:
    """Layout in memory, class and gradients are nobody's affair."""
    seen, truth, contract = judged(kind)
    for name in shown(seen[-1]):
        right = getattr(seen[-1], name, None)
        right = getattr(seen[-1].taps, name) if right is None else right
        other = (*seen[:-1], put(seen[-1], name, HARMLESS[manner](right)))
        verdict = judge(other, truth, contract)
        assert verdict.equivalent, f"{name}: {verdict}"


@pytest.mark.parametrize(
    ("name", "value"),
    [("path", None), ("path", 3), ("launches", None), ("launches", {"a": "b"}), ("taps", None)],
)
def test_words_and_counts_are_held_to_their_types(name: str, value: object) -> None:
    """What is neither text, nor counts by name, nor taps."""
    seen, truth, contract = judged("plain")
    verdict = judge([replace(seen[0], **{name: value})], truth, contract)
    assert not verdict.equivalent
    assert f"rank 0's {name} is {type(value).__name__}" in verdict.findings[0].message


def test_a_router_of_one_choice_too_many_is_named() -> None:
    """Ids and weights of k + 1 columns: the router is at fault, with both shapes."""
    seen, truth, contract = judged("plain")
    taps = seen[0].taps
    assert taps.ids_TK is not None
    assert taps.weights_TK is not None
    wider = replace(
        taps,
        ids_TK=torch.cat([taps.ids_TK, taps.ids_TK[:, :1]], dim=1),
        weights_TK=torch.cat([taps.weights_TK, taps.weights_TK[:, :1]], dim=1),
    )
    culprit = judge([replace(seen[0], taps=wider)], truth, contract).culprit
    assert culprit is not None
    assert (culprit.stage, culprit.rank) == ("router", 0)
    assert culprit.message == (
        "rank 0's ids_TK has shape (5, 4), expected (5, 3): tokens of the rank by experts per token"
    )


def test_what_is_admitted_can_be_sent_and_is_admitted_again() -> None:
    """A misshapen observation crosses to another process with what was found in it."""
    seen, truth, contract = judged("plain")
    lost = replace(seen[0], output_TH=torch.zeros(5, 8).to_sparse(), launches=lambda: None)  # type: ignore[arg-type]
    entered = admitted(lost, 0, truth.tokens_by_rank, truth.config, contract)
    arrived = pickle.loads(wire.dumps(entered))
    assert len(arrived.misshapen) == 2
    assert [str(f) for f in judge([arrived], truth, contract).findings] == [
        str(finding) for finding in entered.misshapen
    ]


# --- every field at once --------------------------------------------------------------------------

DTYPES = (torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64, torch.bool)
VALUES = (0.0, -0.0, 1.0, float("nan"), float("inf"), -float("inf"), 1e30, -1.0, 2.0**62)


@st.composite
def tensors(draw: st.DrawFn, right: Tensor) -> Tensor:
    """A tensor like ``right`` or unlike it, of any numbers, in any manner."""
    alike = draw(st.integers(0, 3))
    shape = tuple(right.shape) if alike else tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    dtype = right.dtype if alike > 1 else draw(st.sampled_from(DTYPES))
    filled = torch.full(shape, 0.5)
    flat = filled.view(-1)
    for place, value in draw(
        st.dictionaries(st.integers(0, 50), st.sampled_from(VALUES), max_size=4)
    ).items():
        flat[place : place + 1] = value
    made = filled.to(dtype)
    if alike == 3:  # mostly right numbers
        made = torch.where(filled == 0.5, right, made)
    if draw(st.integers(0, 4)) == 0:
        return draw(st.sampled_from(list((MISSHAPEN | HARMLESS).values())[4:10]))(made)  # type: ignore[no-any-return]
    return made


@st.composite
def observations(draw: st.DrawFn, seen: RankObservation) -> RankObservation:
    """``seen`` with some fields replaced by anything."""
    for name in draw(st.lists(st.sampled_from([*shown(seen), "path", "launches"]), max_size=3)):
        if name in ("path", "launches"):
            value = draw(st.sampled_from([None, "x", 3, Counter(a=1), {"b": 2}, [], {1: 2}]))
        else:
            before = getattr(seen, name, None)
            before = getattr(seen.taps, name) if before is None else before
            anything = st.sampled_from([None, [1], "text", 2.5, object()])
            value = draw(
                st.one_of(tensors(before), anything) if isinstance(before, Tensor) else anything
            )
        seen = put(seen, name, value)
    return seen


@pytest.mark.parametrize("kind", ["graphed", "plain"])
@settings(max_examples=max(1, settings().max_examples // 2))
@given(data=st.data())
def test_whatever_is_shown_gets_a_verdict(kind: str, data: st.DataObject) -> None:
    """Nothing is raised; nothing misshapen is called equivalent; the verdict can be printed."""
    seen, truth, contract = judged(kind)
    spoilt = [data.draw(observations(one)) for one in seen]
    verdict = judge(spoilt, truth, contract)
    assert isinstance(verdict, Verdict)
    assert str(verdict)
    entered = [
        admitted(one, rank, truth.tokens_by_rank, truth.config, contract)
        for rank, one in enumerate(spoilt)
    ]
    if any(one.misshapen for one in entered):
        assert not verdict.equivalent
        assert verdict.culprit is not None
