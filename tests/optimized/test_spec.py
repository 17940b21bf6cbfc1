"""InferenceSpecProvider: each part of the layer can be replaced, and is then what runs."""

from dataclasses import fields

import pytest
import torch

from tests.optimized.exact import (
    exact_config,
    exact_tokens,
    exact_weights,
    graphed_forward,
    reference,
)
from twinmoe.optimized.graph import GraphRunner
from twinmoe.optimized.layer import MoELayer
from twinmoe.optimized.spec import InferenceSpecProvider

CONFIG = exact_config(shared_expert_intermediate_size=8)

#: What each part is called by, and on which paths it runs.
CALLS = {
    "eager_router": ("forward", {"eager"}),
    "eager_dispatcher": ("token_dispatch", {"eager"}),
    "router": ("forward", {"graphed"}),
    "dispatcher": ("token_dispatch", {"graphed"}),
    "shared_expert": ("forward", {"eager", "graphed"}),
}


def counted(part, method):
    """Return a subclass of ``part`` that counts calls of ``method``, and the list it counts in."""
    calls = []

    def count(self, *args):
        calls.append(args)
        return getattr(part, method)(self, *args)

    return type(f"Counted{part.__name__}", (part,), {method: count}), calls


def paths_of(layer, hidden_TH):
    """Run both paths."""
    return {"eager": layer(hidden_TH), "graphed": graphed_forward(layer, hidden_TH)}


@pytest.mark.parametrize("name", CALLS)
def test_a_replaced_part_is_used(name):
    """On its own path, once per forward; the answer stays the reference's."""
    method, paths = CALLS[name]
    part, calls = counted(getattr(InferenceSpecProvider(), name), method)
    layer = MoELayer(CONFIG, exact_weights(CONFIG), spec=InferenceSpecProvider(**{name: part}))
    hidden_TH = exact_tokens(CONFIG, 5)
    outputs = paths_of(layer, hidden_TH)
    assert len(calls) == len(paths)
    for output_TH in outputs.values():
        assert torch.equal(output_TH, reference(CONFIG)(hidden_TH))
    layer.set_kill_switch(True)
    graphed_forward(layer, hidden_TH)
    assert len(calls) == len(paths) + ("graphed" in paths), "a new transport keeps the part"


def test_replaced_experts_serve_both_paths():
    """One class computes dispatched rows and the routing map."""
    experts = InferenceSpecProvider().experts
    by_map, forwards = counted(experts, "forward")
    both, rows = counted(by_map, "expert_rows")
    layer = MoELayer(CONFIG, exact_weights(CONFIG), spec=InferenceSpecProvider(experts=both))
    paths_of(layer, exact_tokens(CONFIG, 5))
    assert (len(forwards), len(rows)) == (1, 1)


def test_a_replay_does_not_call_python():
    """A part of one's own takes part in the capture; replays repeat what it launched."""
    part, calls = counted(InferenceSpecProvider().router, "forward")
    layer = MoELayer(CONFIG, exact_weights(CONFIG), spec=InferenceSpecProvider(router=part))
    runner = GraphRunner(layer, (8,))
    runner.capture(8)
    seen = len(calls)
    hidden_TH = exact_tokens(CONFIG, 5)
    assert torch.equal(runner(hidden_TH), reference(CONFIG)(hidden_TH))
    assert len(calls) == seen


def test_every_part_is_tried_here():
    """A part that is added to the provider is added to these tests."""
    assert {field.name for field in fields(InferenceSpecProvider)} == {*CALLS, "experts"}
