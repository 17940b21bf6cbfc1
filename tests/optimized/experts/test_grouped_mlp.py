"""InferenceGroupedMLP on small integers: every backend, bit for bit.

Legend: M rows, K experts per row, S dispatched rows, H hidden_size.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from tests.optimized.experts.inputs import (
    ROUNDS_ALL,
    Call,
    config_of,
    integer_call,
    integer_weights,
    poison_rows,
    poisoned_output,
    weighted_sum,
)
from twinmoe.optimized.experts import InferenceGroupedMLP
from twinmoe.optimized.experts.fused import TritonBackend
from twinmoe.optimized.experts.slots import plan_slots
from twinmoe.reference.config import ConfigError, MoEConfig
from twinmoe.reference.experts import SequentialMLP
from twinmoe.reference.placement import Placement
from twinmoe.reference.weights import MoEWeights

both_backends = pytest.mark.parametrize("backend", list(ROUNDS_ALL))


def build(
    config: MoEConfig, weights: MoEWeights, backend: str, ep_size: int = 1, rank: int = 0
) -> InferenceGroupedMLP:
    """Return one rank's experts."""
    placement = Placement(config.num_experts, ep_size)
    return InferenceGroupedMLP(config, weights.shard(placement, rank), placement, rank, backend)


def run(mlp: InferenceGroupedMLP, config: MoEConfig, call: Call, dtype: torch.dtype) -> Tensor:
    """Run one forward into a poisoned buffer."""
    out_MH = poisoned_output(call.x_MH.shape[0], config, dtype)
    mlp(call.x_MH, call.ids_MK, call.weights_MK, out_MH)
    return out_MH


@st.composite
def layers(draw: st.DrawFn, multiple: int) -> dict[str, Any]:
    """Draw the options that experts look at; sizes are multiples of ``multiple``.

    At most 40 features, and a square only without a gate, keep every sum within 24 bits.
    """
    num_experts = draw(st.sampled_from((1, 2, 3, 8, 12)))
    gated = draw(st.booleans())
    return {
        "hidden_size": multiple * draw(st.integers(1, 5)),
        "moe_intermediate_size": multiple * draw(st.integers(1, 5)),
        "num_experts": num_experts,
        "num_experts_per_tok": draw(st.integers(1, num_experts)),
        "hidden_act": "relu" if gated else draw(st.sampled_from(("relu", "relu2"))),
        "gated": gated,
        "dtype": draw(st.sampled_from((torch.bfloat16, torch.float16, torch.float32))),
    }


def check_exact(backend: str, settings: dict[str, Any], rows: int, ep: int, seed: int) -> None:
    """Compare the last of ``ep`` ranks, padding included, with the declared arithmetic."""
    config = config_of(**settings)
    ep_size = ep if config.num_experts % ep == 0 else 1
    weights = integer_weights(config, seed)
    call = poison_rows(
        integer_call(config, rows, seed), [row for row in range(rows) if row % 4 == 3]
    )
    mlp = build(config, weights, backend, ep_size, ep_size - 1)
    owned = Placement(config.num_experts, ep_size).experts_of(ep_size - 1)
    expected = weighted_sum(config, weights, call, owned, rounds_all=ROUNDS_ALL[backend])
    for dtype in {torch.float32, config.dtype}:
        assert torch.equal(run(mlp, config, call, dtype), expected.float().to(dtype))


@given(layers(multiple=8), st.integers(0, 9), st.sampled_from((1, 2, 4)), st.integers(0, 2**20))
@example({}, 0, 2, 0)
@example({}, 1, 2, 0)
def test_grouped_mm_computes_exactly_what_it_declares(settings, rows, ep, seed):
    """Gate/up, h and y round to the dtype, the sum once; padding leaks nothing."""
    check_exact("grouped_mm", settings, rows, ep, seed)


@given(layers(multiple=1), st.integers(0, 9), st.sampled_from((1, 2, 4)), st.integers(0, 2**20))
@example({}, 0, 2, 0)
@example({}, 1, 2, 0)
@example({"hidden_size": 1, "moe_intermediate_size": 1}, 3, 1, 0)
@example({"hidden_size": 1025, "moe_intermediate_size": 3}, 5, 1, 0)
@example({"hidden_size": 3, "moe_intermediate_size": 515}, 5, 1, 0)
def test_triton_computes_exactly_what_it_declares(settings, rows, ep, seed):
    """Only h and the sum round, for sizes that fit no tile; padding leaks nothing."""
    check_exact("triton", settings, rows, ep, seed)


@both_backends
def test_weight_on_input_scales_and_rounds_each_slot_s_row(backend):
    """round(w * x) enters the expert and its output is summed as it is."""
    config = config_of(router_weight_on_input=True, gated=False, num_experts_per_tok=3)
    weights = integer_weights(config, 12)
    call = poison_rows(integer_call(config, 9, 12), [2, 3])
    out_MH = run(build(config, weights, backend), config, call, torch.float32)
    expected = weighted_sum(config, weights, call, range(8), rounds_all=ROUNDS_ALL[backend])
    assert torch.equal(out_MH, expected.float())


@both_backends
@pytest.mark.parametrize("expert", [0, 5, 7])
def test_all_rows_to_one_expert(backend, expert):
    """More rows than one tile holds, all for the same expert."""
    config = config_of(num_experts_per_tok=1)
    weights = integer_weights(config, 1)
    call = integer_call(config, 150, 1)
    call.ids_MK.fill_(expert)
    out_MH = run(build(config, weights, backend), config, call, torch.float32)
    expected = weighted_sum(config, weights, call, range(8), rounds_all=ROUNDS_ALL[backend])
    assert torch.equal(out_MH, expected.float())


def test_row_tiles_may_be_computed_in_any_order():
    """A GPU runs tiles at once: none may write another's rows, so their order is free."""
    config = config_of(num_experts_per_tok=3)
    weights = integer_weights(config, 13)
    call = integer_call(config, 40, 13)
    backend = TritonBackend(config, weights, 0)
    plan = plan_slots(call.ids_MK, 0, 8)
    backwards = replace(
        plan, tile_expert_X=plan.tile_expert_X.flip(0), tile_first_X=plan.tile_first_X.flip(0)
    )
    in_order = backend.sorted_rows(call.x_MH, None, plan)
    assert torch.equal(backend.sorted_rows(call.x_MH, None, backwards), in_order)


@both_backends
def test_rank_without_any_slot_writes_zeros(backend):
    """Nothing routed here: the poisoned output becomes exact zeros, never NaN."""
    config = config_of()
    call = integer_call(config, 6, 2)
    call.ids_MK.remainder_(4)  # experts 0 .. 3 live on rank 0
    out_MH = run(
        build(config, integer_weights(config, 2), backend, 2, 1), config, call, config.dtype
    )
    assert torch.equal(out_MH, torch.zeros_like(out_MH))


@both_backends
def test_only_padding_writes_zeros(backend):
    """A step in which every row of every rank is padding."""
    config = config_of()
    call = poison_rows(integer_call(config, 6, 3), list(range(6)))
    out_MH = run(build(config, integer_weights(config, 3), backend), config, call, torch.float32)
    assert torch.equal(out_MH, torch.zeros_like(out_MH))


@both_backends
def test_unused_experts_may_hold_anything(backend):
    """NaN in the weights of an expert that no row visits reaches no output."""
    config = config_of()
    weights = integer_weights(config, 4)
    call = integer_call(config, 9, 4)
    call.ids_MK[call.ids_MK == 3] = -1
    clean = run(build(config, weights, backend), config, call, torch.float32)
    weights.w13_LFH[3] = torch.nan
    weights.w2_LHI[3] = torch.inf
    assert torch.equal(run(build(config, weights, backend), config, call, torch.float32), clean)


@both_backends
def test_a_nan_token_spoils_its_own_row_only(backend):
    """Every other row stays bitwise the same, in whatever tile it shares."""
    config = config_of(hidden_act="silu")
    mlp = build(config, integer_weights(config, 5), backend)
    call = integer_call(config, 12, 5)
    clean = run(mlp, config, call, torch.float32)
    call.x_MH[4] = torch.nan
    spoiled = run(mlp, config, call, torch.float32)
    others = [row for row in range(12) if row != 4]
    assert spoiled[4].isnan().all()
    assert torch.equal(spoiled[others], clean[others])


@both_backends
def test_ids_may_be_int64(backend):
    """The reference's ids are int64, the inference router's int32: same result."""
    config = config_of()
    mlp = build(config, integer_weights(config, 6), backend)
    call = integer_call(config, 5, 6)
    wide = Call(call.x_MH, call.ids_MK.long(), call.weights_MK)
    assert torch.equal(run(mlp, config, wide, torch.float32), run(mlp, config, call, torch.float32))


@both_backends
def test_partials_of_all_ranks_add_up_to_the_whole(backend):
    """Each expert is computed by exactly one rank."""
    config = config_of(num_experts_per_tok=5)
    weights = integer_weights(config, 7)
    call = integer_call(config, 7, 7)
    whole = run(build(config, weights, backend), config, call, torch.float32)
    parts = [
        run(build(config, weights, backend, 4, r), config, call, torch.float32) for r in range(4)
    ]
    assert torch.equal(torch.stack(parts).sum(dim=0), whole)


@both_backends
def test_weights_reloaded_in_place_take_effect_after_refresh(backend):
    """The same object, the same storage, the new weights."""
    config = config_of()
    weights, replacement = integer_weights(config, 8), integer_weights(config, 9)
    call = integer_call(config, 6, 8)
    mlp = build(config, weights, backend)
    run(mlp, config, call, torch.float32)
    weights.copy_(replacement)
    mlp.refresh()
    expected = run(build(config, replacement, backend), config, call, torch.float32)
    assert torch.equal(run(mlp, config, call, torch.float32), expected)


@both_backends
@pytest.mark.parametrize("num_rows", [0, 1, 19])
def test_expert_rows_equal_the_reference_on_dispatched_rows(backend, num_rows):
    """The eager path's experts: unweighted, in row order, wherever nothing but y rounds."""
    config = config_of(dtype=torch.float32)
    weights = integer_weights(config, 10)
    placement = Placement(config.num_experts, 2)
    local = weights.shard(placement, 1)
    generator = torch.Generator().manual_seed(10)
    local_expert_S = torch.randint(0, 4, (num_rows,), generator=generator)
    x_SH = integer_call(config, num_rows, 10).x_MH
    y_SH = InferenceGroupedMLP(config, local, placement, 1, backend).expert_rows(
        x_SH, local_expert_S
    )
    assert torch.equal(y_SH, SequentialMLP(config, local)(x_SH, local_expert_S))


def test_expert_rows_dtype_is_the_backend_s_declared_one():
    """grouped_mm rounds y to the model dtype, triton keeps it in fp32."""
    config = config_of()
    weights = integer_weights(config, 11)
    x_SH = integer_call(config, 3, 11).x_MH
    experts = torch.tensor([0, 7, 7])
    rows = {name: build(config, weights, name).expert_rows(x_SH, experts) for name in ROUNDS_ALL}
    assert {name: y.dtype for name, y in rows.items()} == {
        "grouped_mm": torch.bfloat16,
        "triton": torch.float32,
    }


def test_weights_of_another_rank_are_refused():
    """The message names the rank, what it owns and how to get it."""
    config = config_of()
    placement = Placement(8, 2)
    others = integer_weights(config, 0).shard(placement, 0)
    with pytest.raises(ConfigError, match=r"rank 1: it owns range\(4, 8\); pass weights.shard"):
        InferenceGroupedMLP(config, others, placement, 1)


def test_strided_arguments_are_refused():
    """Kernels index rows themselves, so a transposed input must not pass silently."""
    config = config_of(hidden_size=8)
    mlp = build(config, integer_weights(config, 0), "triton")
    call = integer_call(config, 8, 0)
    with pytest.raises(ValueError, match=r"x with strides \(1, 8\) must be contiguous"):
        mlp(call.x_MH.T, call.ids_MK, call.weights_MK, torch.empty(8, 8))
