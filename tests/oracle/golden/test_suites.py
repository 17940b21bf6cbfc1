"""The suites: what each promises to hold, it holds, and any machine can ask for it."""

from dataclasses import replace

import pytest

from twinmoe.oracle import doctor
from twinmoe.oracle.golden import Golden, load, record, save, suite, suites, target
from twinmoe.oracle.golden.record import check_recordable
from twinmoe.oracle.golden.target import on_device, shared_evenly
from twinmoe.oracle.trial import Trial
from twinmoe.reference.config import ConfigError
from twinmoe.reference.published import published, scaled

NAMES = tuple(suites())


@pytest.mark.parametrize("name", NAMES)
def test_a_suite_is_recordable_and_shared_by_any_usual_group(name: str) -> None:
    """Its lines are cases without a fault, no two alike, which 1, 2, 4 and 8 ranks can share."""
    cases = suite(name).cases
    assert suite(name).about
    assert len(set(map(str, cases))) == len(cases)
    for case in cases:
        check_recordable(case)
        for ep_size in (1, 2, 4, 8):
            doctor.require_case(shared_evenly(case, ep_size), "cpu")


def test_quick_holds_each_path_once() -> None:
    """Every transport of a CPU, every dtype, and the three ways to score."""
    cases = suite("quick").cases
    assert {case.transport for case in cases} == {"p2p", "nvls", "gloo", "alltoall"}
    assert {str(case.config.dtype)[6:] for case in cases} == {"bfloat16", "float16", "float32"}
    assert {case.mode for case in cases} == {"eager", "graphed", "replayed"}


@pytest.mark.parametrize("model", ["mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3"])
def test_published_holds_the_models_themselves(model: str) -> None:
    """Each geometry at 1/16 of its widths, in prefill outside graphs and in decode inside."""
    config = scaled(published(model), 16)
    cases = [case for case in suite("published").cases if case.config == config]
    assert {case.mode for case in cases if case.transport == "alltoall"} == {"eager"}
    assert {case.mode for case in cases if case.transport != "alltoall"} == {"replayed"}
    assert len(cases) == 3


def test_a_gpu_records_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transports that CUDA has not are replaced before recording, not refused after it."""
    monkeypatch.setattr(target, "usable_backends", lambda *_: ("triton",))
    transports = {on_device(case, "cuda").transport for case in suite("quick").cases}
    assert transports == {"p2p", "nccl", "alltoall"}


def test_near_ties_are_near(trial: Trial) -> None:
    """The corner of near ties holds tokens with more than one admissible set of experts."""
    near = [case for case in suite("corners").cases if case.routing == "near_ties"]
    assert record(near, trial).cases[0].figures.ambiguous > 0


def test_an_unknown_suite_is_named() -> None:
    """With the known ones, and a way out."""
    with pytest.raises(
        ConfigError, match=r"suite \('slow'\) is unknown: use one of quick, .*--case"
    ):
        suite("slow")


def test_forwards_through_another_layer_are_read_back(
    trial: Trial, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A history of two layers on one pool: forwards of other widths than the case's own."""
    (case,) = (case for case in suite("histories").cases if "o0" in case.history)
    path = tmp_path_factory.mktemp("suites") / "two.safetensors"
    save(record([case], trial), path)
    forwards = load(path).cases[0].forwards
    widths = {forward.tensors["value"].shape[1] for forward in forwards}
    assert widths == {case.config.hidden_size, 2 * case.config.hidden_size}


def test_a_case_that_is_recorded_keeps_its_line(golden: Golden) -> None:
    """Sharing by other ranks is another case only where the ranks are others."""
    case = golden.cases[0].case
    assert shared_evenly(case, case.ep_size) == case
    assert shared_evenly(case, 1) == replace(case, tokens=(sum(case.tokens),))
