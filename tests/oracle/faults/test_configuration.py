"""Each planted fault of configuration changes what the layer decides."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracle.faults.at_functions import experts_of, planted, routed, share
from tests.oracle.faults.planting import assert_does_not_reach, assert_names_its_stage
from twinmoe.optimized.communication import pool_setup
from twinmoe.optimized.communication.pool import Capacity
from twinmoe.optimized.dispatcher import InferenceCUDAGraphTokenDispatcher
from twinmoe.optimized.layer import MoELayer
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults import FAULTS, configuration
from twinmoe.oracle.faults.seams import Seams
from twinmoe.oracle.inputs import weights_for
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.dispatch import MoEAlltoAllTokenDispatcher
from twinmoe.reference.placement import Placement

_LAYER = "H=96,I=40,E=6,k=3,dtype=bf16"


def test_every_rank_takes_all_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that was given a group and a shard ends up alone, with all experts."""
    case = Case.parse(f"T=3/2,{_LAYER}")
    shards = [weights_for(case, range(3)), weights_for(case, range(3, 6))]
    monkeypatch.setattr(configuration, "exchange", lambda *_: shards)
    group: Any = object()
    with Seams(RankContext(1, 2, group, torch.device("cpu")), case) as seams:
        FAULTS["parallelism_ignored"].plant(seams)
        layer = MoELayer(case.config, shards[1], group)
    assert layer.group is None
    assert torch.equal(layer.weights.w13_LFH, weights_for(case).w13_LFH)


def test_combine_takes_another_path() -> None:
    """From five rows a rank on, its own share comes back in place of the sum."""
    case = Case.parse(f"T=5/2,{_LAYER}")
    transport: Any = SimpleNamespace(world_size=2, rank=1, reduce_scatter=lambda _: "summed")
    dispatcher = InferenceCUDAGraphTokenDispatcher(transport, torch.float32)
    partial = torch.arange(16.0)[:, None]
    with planted("two_predicates", case, rank=1):
        assert dispatcher.token_combine(partial[:8]) == "summed"
        assert torch.equal(dispatcher.token_combine(partial), partial[8:])


def test_pool_does_not_grow() -> None:
    """A second layer's larger request is answered with what there is."""
    case = Case.parse(f"T=3,{_LAYER},history=f0.o0.f0")
    pool: Any = SimpleNamespace(capacity=Capacity(64, 64), num_ctas=1, captured=False)
    request = pool_setup.PoolRequest("ep", Capacity(128, 128), 1)
    assert pool_setup._agree_on_size(request, pool, None) == (request, True)
    with planted("sized_by_first_layer", case):
        wanted, grows = pool_setup._agree_on_size(request, pool, None)
    assert (wanted.capacity, grows) == (pool.capacity, False)


def test_second_gemm_takes_the_first_ones_grid() -> None:
    """Columns beyond the intermediate size are not computed."""
    case = Case.parse(f"T=3/2,{_LAYER},backend=triton")
    right = share(experts_of(case, 1), routed(case))
    with planted("plan_by_tokens_alone", case):
        wrong = share(experts_of(case, 1), routed(case))
    assert torch.allclose(wrong[:, :48], right[:, :48], atol=1e-4)
    assert right[:, 48:].any()
    assert not wrong[:, 48:].any()


def test_first_count_stands_for_all() -> None:
    """All ranks are expected to send what rank 0 sends."""
    case = Case.parse(f"T=3/2,{_LAYER},transport=alltoall")
    dispatcher = MoEAlltoAllTokenDispatcher(Placement(6, 1), None)

    def exchange(*_: object) -> Tensor:
        return torch.tensor([3, 1])

    dispatcher._exchange = exchange  # type: ignore[method-assign]
    with planted("first_count_for_all", case):
        assert dispatcher._counts_for_me(torch.tensor([2, 2])).tolist() == [3, 3]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("parallelism_ignored", f"T=3,{_LAYER}"),
        ("two_predicates", f"T=4/2,{_LAYER}"),
        ("sized_by_first_layer", "T=3,H=192,I=40,E=6,k=3,dtype=bf16,history=f0.o0.f0"),
        ("plan_by_tokens_alone", "T=3,H=16,I=40,E=6,k=3,dtype=bf16,backend=triton"),
        ("first_count_for_all", f"T=5/2,{_LAYER},mode=graphed"),
    ],
)
def test_equivalent_cases_are_not_reached(name: str, line: str) -> None:
    """Where the fault changes nothing, its trigger says so."""
    assert not FAULTS[name].reaches(Case.parse(line))


@pytest.mark.parametrize("name", ["always_normalised", "normalised_by_default"])
def test_weights_are_normalised_against_the_settings(name: str) -> None:
    """The router is named where the layer wants raw weights, and nothing is where it does not."""
    assert_names_its_stage(name, f"T=5,{_LAYER},norm_topk_prob=0")
    assert_does_not_reach(name, f"T=5,{_LAYER}")


def test_the_default_is_wrong_on_the_graphed_path_alone() -> None:
    """The eager router passes the option on."""
    assert_does_not_reach(
        "normalised_by_default", f"T=5,{_LAYER},norm_topk_prob=0,transport=alltoall"
    )
