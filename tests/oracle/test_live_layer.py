"""A live layer: what a forward may not touch, and weights that change under it."""

from collections.abc import Iterator

import pytest
import torch

from twinmoe.optimized.communication.pool_setup import release_pools
from twinmoe.oracle.bits import same_bits
from twinmoe.oracle.case import Case
from twinmoe.oracle.live_layer import LiveLayer
from twinmoe.oracle.observation import RankObservation
from twinmoe.oracle.scenario import Scenario
from twinmoe.oracle.subject import Call, OptimizedSubject, ReferenceSubject
from twinmoe.oracle.worker import RankContext

CASE = Case.parse("T=4,H=32,I=16,E=4,k=2,rsf=2.5,dtype=bf16,seed=7")
ALONE = RankContext(0, 1, None, torch.device("cpu"))
CALL = Call("alltoall", max_tokens=4)


@pytest.fixture(autouse=True)
def own_pools() -> Iterator[None]:
    """Leave no pool, nor what a test did to it."""
    yield
    release_pools(None)


def live(factory: type = OptimizedSubject) -> LiveLayer:
    """Return a layer of CASE on a single rank."""
    return LiveLayer(Scenario(CASE), ALONE, factory)


def hidden() -> torch.Tensor:
    """Return CASE's batch."""
    return Scenario(CASE).hidden()[0]


def test_a_forward_that_only_reads_is_not_blamed() -> None:
    """Both twins leave input and weights as they were."""
    for factory in (OptimizedSubject, ReferenceSubject):
        _, complaints = live(factory).observe(hidden(), CALL)
        assert not complaints


def test_a_forward_that_writes_its_input_or_weights_is_told() -> None:
    """One bit is enough, even where the answer is right."""
    layer = live()
    observe = layer.subject.observe

    def scribbling(hidden_TH: torch.Tensor, call: Call) -> RankObservation:
        observation = observe(hidden_TH, call)
        hidden_TH[-1, -1] += 1
        layer.subject.weights.w2_LHI[1, 2, 3] += 1
        return observation

    layer.subject.observe = scribbling
    _, complaints = layer.observe(hidden(), CALL)
    assert complaints == [
        "the forward overwrote its input",
        "the forward overwrote the layer's weights",
    ]


def test_weights_that_change_places_are_told() -> None:
    """Two rows exchanged add up to the same sum, and are not the same weights."""
    layer = live()
    w2_LHI = layer.subject.weights.w2_LHI
    w2_LHI[0, [0, 1]] = w2_LHI[0, [1, 0]]
    _, complaints = layer.observe(hidden(), CALL)
    assert complaints == ["the forward overwrote the layer's weights"]


def test_a_store_beside_the_pools_regions_is_told() -> None:
    """The guards of symmetric memory are looked at after every forward."""
    layer = live()
    graphed = Call("graphed", max_tokens=4)
    assert not layer.observe(hidden(), graphed)[1]
    layer.subject.layer.transport._pool.memory.buffer[3] = 0
    (complaint,) = layer.observe(hidden(), graphed)[1]
    assert "a store went astray" in complaint


def test_other_weights_straight_or_from_a_file_give_the_same_answer() -> None:
    """Version 1 in place, from a checkpoint, and built anew."""
    built = LiveLayer(Scenario(CASE, version=1), ALONE, OptimizedSubject)
    expected = built.observe(hidden(), CALL)[0].output_TH
    for from_file in (False, True):
        for factory in (OptimizedSubject, ReferenceSubject):
            layer = live(factory)
            assert not same_bits(layer.observe(hidden(), CALL)[0].output_TH, expected)
            layer.reload(1, from_file=from_file)
            observation, complaints = layer.observe(hidden(), CALL)
            assert not complaints
            torch.testing.assert_close(observation.output_TH, expected, rtol=0.02, atol=0.02)
    assert same_bits(layer.observe(hidden(), CALL)[0].output_TH, observation.output_TH)


def test_bits_are_compared_and_not_values() -> None:
    """NaN equals itself, zeros of two signs differ, and so do shapes and dtypes."""
    nan = torch.tensor([float("nan"), 0.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(3))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.int32))


def test_two_weights_of_a_row_that_change_places_are_told() -> None:
    """Their sum is what it was."""
    layer = live()
    w2_LHI = layer.subject.weights.w2_LHI
    w2_LHI[0, 0, [0, 1]] = w2_LHI[0, 0, [1, 0]]
    assert layer.observe(hidden(), CALL)[1] == ["the forward overwrote the layer's weights"]
