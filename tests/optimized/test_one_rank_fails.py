"""A bad batch or an honest error on one rank: it raises, and its peers do not wait for it.

Legend: T tokens, H hidden_size.
"""

from contextlib import nullcontext
from itertools import count
from unittest import mock

import pytest
import torch

from tests.optimized.exact import (
    error_of,
    exact_config,
    exact_tokens,
    graphed_forward,
    optimized,
    reference,
)
from tests.spmd import run_spmd
from twinmoe.optimized.communication.agreement import all_or_none
from twinmoe.optimized.communication.eligibility import Tier
from twinmoe.optimized.communication.order import Collective
from twinmoe.optimized.experts import InferenceGroupedMLP
from twinmoe.optimized.graph import GraphRunner
from twinmoe.optimized.router import InferenceTopKRouter
from twinmoe.optimized.shared_expert import InferenceSharedExpert

CONFIG = exact_config(shared_expert_intermediate_size=8)

#: What a layer of 16 bf16 features cannot take.
MISFITS = {
    "width": torch.ones(3, 15, dtype=torch.bfloat16),
    "dtype": torch.ones(3, 16),
    "shape": torch.ones(16, dtype=torch.bfloat16),
    "device": torch.ones(3, 16, dtype=torch.bfloat16, device="meta"),
}


def tokens_of(rank):
    """A fitting batch, of another size on each rank."""
    return exact_tokens(CONFIG, rank + 1, seed=rank)


def check_still_equal(call, rank, group):
    """The next forward is as if nothing had been."""
    assert torch.equal(call(tokens_of(rank)), reference(CONFIG, group)(tokens_of(rank)))


def check_told(call, rank, group, *, error="ValueError: hidden states"):
    """Give the last rank what does not fit: it says so, and so does everybody else, of it."""
    bad = group.size() - 1
    for name, misfit in MISFITS.items():
        message = error_of(lambda misfit=misfit: call(misfit if rank == bad else tokens_of(rank)))
        if rank == bad:
            assert message.startswith(error), (name, message)
        else:
            assert message.startswith("PeerError: "), (name, message)
            assert f"rank {bad} ({error}" in message, (name, message)
    check_still_equal(call, rank, group)


def check_eager(rank, group):
    """Both twins' AlltoAll paths."""
    check_told(optimized(CONFIG, group), rank, group)
    check_told(reference(CONFIG, group), rank, group, error="ConfigError: tokens are")


def check_experts(rank, group):
    """The last rank's experts fail after the dispatch: what peers asked of them is NaN, no wait."""
    bad = group.size() - 1
    for backend in ("grouped_mm", "triton"):
        layer = optimized(CONFIG, group, experts_backend=backend)
        failing = mock.patch.object(
            InferenceGroupedMLP, "expert_rows", failing_once(InferenceGroupedMLP, "expert_rows")
        )
        hidden_TH = exact_tokens(CONFIG, 6, seed=rank)
        outcome = {}

        def call(layer=layer, hidden_TH=hidden_TH, outcome=outcome):
            outcome["rows"] = layer(hidden_TH)

        with failing if rank == bad else nullcontext():
            message = error_of(call)
        if rank == bad:
            assert message == "OSError: no luck with expert_rows"
        else:
            assert not message
            ids_TK = layer.eager_router(hidden_TH).ids_TK
            asked_T = (ids_TK >= layer.placement.experts_of(bad).start).any(dim=1)
            assert torch.equal(outcome["rows"].isnan().any(dim=1), asked_T)
            assert asked_T.any()
        check_still_equal(layer, rank, group)


def check_asked(rank, group):
    """A runner that asks for the largest batch hears of the rank that has none."""
    runner, bad = GraphRunner(optimized(CONFIG, group), (4, 8)), group.size() - 1
    check_told(runner, rank, group)
    message = error_of(lambda: runner(None if rank == bad else tokens_of(rank)))
    assert message.startswith("AttributeError" if rank == bad else "PeerError"), message


def check_believed(rank, group):
    """Where nobody may ask, the bad rank takes part without tokens; the others' answers stand."""
    first = 0
    expected = reference(CONFIG, group)
    for tier in (Tier.P2P, Tier.COLLECTIVE):
        layer = optimized(CONFIG, group, transport=tier)
        runner = GraphRunner(layer, (4, 8))
        calls = {
            "runner": lambda hidden_TH, runner=runner: runner(hidden_TH, max_tokens=4),
            "graphed": lambda hidden_TH, layer=layer: graphed_forward(layer, hidden_TH, rows=4),
        }
        misfits = [MISFITS["width"][:, :15], MISFITS["dtype"].new_ones(4, 16)]
        for misfit in (*misfits, exact_tokens(CONFIG, 5)):
            for name, call in calls.items():
                if name == "graphed" and len(misfit) > 4:
                    continue
                batch = misfit if rank == first else tokens_of(rank)
                # the reference's other ranks are asked for the same tokens, the first for none
                expected_TH = expected(tokens_of(rank) if rank != first else tokens_of(rank)[:0])
                if rank == first:
                    assert error_of(lambda c=call, b=batch: c(b)).startswith("ValueError: "), name
                else:
                    assert torch.equal(call(batch), expected_TH), name
        check_still_equal(calls["runner"], rank, group)


def failing_once(owner, name):
    """Stand in for ``owner.name``, whose first call fails."""
    whole, calls = getattr(owner, name), count()

    def call(*args, **kwargs):
        if next(calls) == 0:
            raise OSError(f"no luck with {name}")
        return whole(*args, **kwargs)

    return call


def check_capture(rank, group):
    """Let one thing after another fail while the last rank captures: before, and in between."""
    bad = group.size() - 1
    for owner, name in (
        (torch, "zeros"),
        (InferenceSharedExpert, "forward"),
        (InferenceTopKRouter, "__call__"),
        (InferenceGroupedMLP, "forward"),
    ):
        runner = GraphRunner(optimized(CONFIG, group), (4,))
        failing = mock.patch.object(owner, name, failing_once(owner, name))
        with failing if rank == bad else nullcontext():
            message = error_of(lambda runner=runner: runner(tokens_of(rank), max_tokens=4))
        if rank == bad:
            assert message == f"OSError: no luck with {name}"
        else:
            assert message.startswith(f"PeerError: rank {bad} (OSError: no luck with {name})")
        check_still_equal(runner, rank, group)


def check_broken_capture(rank, group):
    """The last rank's capture breaks between its collectives, so that ranks remember another last.

    What follows starts with a barrier on all ranks, or the epochs would differ for ever.
    """
    bad = group.size() - 1

    def broken(*_args, **_kwargs):
        raise OSError("capture invalidated")

    layer = optimized(CONFIG, group, transport=Tier.P2P)
    runner = GraphRunner(layer, (4,))
    failing = (
        mock.patch.object(InferenceGroupedMLP, "forward", broken),
        mock.patch.object(type(layer.transport), "reduce_scatter", only_with_peers(rank, bad)),
    )
    with failing[0] if rank == bad else nullcontext(), failing[1]:
        message = error_of(lambda: runner(tokens_of(rank), max_tokens=4))
    assert "capture invalidated" in message, message
    for _ in range(2):
        check_still_equal(lambda x: graphed_forward(layer, x, rows=4), rank, group)
    check_still_equal(runner, rank, group)


def only_with_peers(rank, bad):
    """A reduce-scatter that is only noted, as in a capture; on the bad rank it fails unnoted."""

    def call(transport, partial):
        if rank == bad:
            raise OSError("capture invalidated")
        transport._launched(Collective.REDUCE_SCATTER)
        return torch.zeros(len(partial) // transport.world_size, partial.shape[1])

    return call


def check_different_buckets(rank, group):
    """Ranks that capture for different maxima are told so, before they meet in a collective."""
    runner = GraphRunner(optimized(CONFIG, group), (4, 8))
    message = error_of(lambda: runner(tokens_of(0), max_tokens=8 if rank == 0 else 4))
    assert message.startswith("ValueError: rank 0 wants to capture a graph of 8 rows, rank 1 to")
    check_still_equal(runner, rank, group)


def check_all(rank, group):
    """Every check, in one world."""
    check_eager(rank, group)
    check_experts(rank, group)
    check_asked(rank, group)
    check_believed(rank, group)
    check_capture(rank, group)
    check_broken_capture(rank, group)
    check_different_buckets(rank, group)


@pytest.mark.parametrize("world_size", [2, 4])
def test_peers_do_not_wait_for_a_rank_that_fails(world_size, tmp_path):
    """Bad batches on every path, and failed captures: all in seconds, and all go on afterwards."""
    run_spmd(check_all, world_size, tmp_path, timeout=120)


def test_a_single_rank_raises_what_it_stumbled_over():
    """Without a group there is nobody to be told."""
    with pytest.raises(OSError, match="mine"), all_or_none("to try", None):
        raise OSError("mine")
    for call in (optimized(CONFIG), GraphRunner(optimized(CONFIG), (4,))):
        message = error_of(lambda call=call: call(MISFITS["shape"]))
        assert message.startswith("ValueError: hidden states of shape (16,)")
