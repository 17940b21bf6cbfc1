"""Comparing with a recording: the same truth on every path, and no norm that is not the same."""

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module

import pytest

from twinmoe.oracle.case import Case
from twinmoe.oracle.golden import Golden, GoldenError, Recorded, Target, compare, record
from twinmoe.oracle.golden.export import junit
from twinmoe.oracle.golden.norm import declared
from twinmoe.oracle.golden.record import NotEquivalentError
from twinmoe.oracle.golden.report import verdict_line
from twinmoe.oracle.golden.target import questions
from twinmoe.oracle.showing import Showing, judge_showings
from twinmoe.oracle.trial import Trial
from twinmoe.oracle.verdict import Verdict
from twinmoe.reference.config import ConfigError


def altered(golden: Golden, **changes: object) -> Golden:
    """Return the recording's first case with its first forward changed."""
    first, *rest = golden.cases[0].forwards
    changed = replace(first, **changes)  # type: ignore[arg-type]
    recorded = Recorded(golden.cases[0].case, (changed, *rest), golden.cases[0].figures)
    return Golden((recorded,), golden.environment)


def test_the_same_path_gives_the_same_bits(golden: Golden, trial: Trial) -> None:
    """Compared where it was recorded, no bit differs, and the figures are the recorded ones."""
    comparison = compare(golden, trial)
    assert comparison.equivalent
    for compared in comparison.cases:
        assert compared.figures == compared.question.recorded.figures
        assert compared.changed is not None
        assert set(compared.changed) == {"ids", "weights", "routed", "output"}
        assert all(changed == 0 and total > 0 for changed, total in compared.changed.values())


def test_a_changed_bit_is_counted_and_is_no_failure(golden: Golden, trial: Trial) -> None:
    """The recorded output is no norm: one that differs in a bit changes the count alone."""
    output_TH = golden.cases[0].forwards[0].tensors["output"].clone()
    output_TH[0, 0] = -output_TH[0, 0] + 100
    tensors = {**golden.cases[0].forwards[0].tensors, "output": output_TH}
    comparison = compare(altered(golden, tensors=tensors), trial)
    assert comparison.equivalent
    assert comparison.cases[0].changed is not None
    assert comparison.cases[0].changed["output"][0] == 1


@pytest.mark.parametrize("ep_size", [1, 4])
def test_other_ranks_share_the_same_tokens(golden: Golden, trial: Trial, ep_size: int) -> None:
    """EP 2 recorded, EP 1 and 4 compared: the same truth, the path is another, nothing bitwise."""
    comparison = compare(golden, trial, Target(ep_size=ep_size))
    assert comparison.equivalent
    assert [compared.question.ep_size for compared in comparison.cases] == [ep_size] * 2
    assert [compared.changed for compared in comparison.cases] == [None] * 2
    assert [c.figures.tokens for c in comparison.cases] == [
        c.question.recorded.figures.tokens for c in comparison.cases
    ]


@pytest.mark.parametrize("transport", ["gloo", "alltoall", "nvls"])
def test_other_transports_are_held_to_their_own_contract(
    golden: Golden, trial: Trial, transport: str
) -> None:
    """Any transport compares; the contract is that of the path that ran."""
    comparison = compare(golden, trial, Target(transport=transport))
    assert comparison.equivalent
    for compared in comparison.cases:
        assert compared.verdict is not None
        assert compared.verdict.contract.name.startswith(transport)


@pytest.mark.parametrize(("ep_size", "fault", "stage"), [
    (None, "swapped_gate_up", "experts"),
    (4, "dropped_slot", "experts"),
])  # fmt: skip
def test_a_planted_fault_is_seen_at_its_stage(
    golden: Golden, trial: Trial, ep_size: int | None, fault: str, stage: str
) -> None:
    """A fault in the compared layer is not equivalent, and its stage is named."""
    comparison = compare(golden, trial, Target(ep_size=ep_size, fault=fault))
    assert not comparison.equivalent
    culprits = [c.verdict.culprit for c in comparison.cases if c.verdict and not c.equivalent]
    assert stage in [culprit.stage for culprit in culprits if culprit]
    assert all(c.account for c in comparison.cases if not c.equivalent)


def test_a_fault_that_reaches_no_case_is_refused(golden: Golden) -> None:
    """A comparison asked to plant what its cases cannot show is no success."""
    only_alltoall = Golden(golden.cases[1:], golden.environment)
    with pytest.raises(ConfigError, match="reaches none of the 1 cases"):
        questions(only_alltoall, Target(fault="swapped_segments"))


def test_ranks_that_cannot_share_the_experts_are_refused(golden: Golden) -> None:
    """Before anything runs: four experts cannot be shared by three ranks."""
    with pytest.raises(ConfigError, match=r"num_experts \(4\) must be divisible by ep_size \(3\)"):
        questions(golden, Target(ep_size=3))


def test_what_a_device_lacks_is_replaced(golden: Golden) -> None:
    """A recording over NCCL is compared over gloo on a CPU."""
    case = replace(golden.cases[0].case, transport="nccl")
    recorded = Recorded(case, golden.cases[0].forwards, golden.cases[0].figures)
    ((asked,), _) = questions(Golden((recorded,), golden.environment), Target())
    assert asked.case.transport == "gloo"


# --- a file that is no norm here ----------------------------------------------------------------


def test_other_random_numbers_are_no_norm(golden: Golden, trial: Trial) -> None:
    """Where the line draws other weights than recorded, the file is refused."""
    with pytest.raises(GoldenError, match="weights are drawn otherwise here"):
        compare(altered(golden, digests={"weights": "0" * 64, "hidden": "0" * 64}), trial)


def test_a_changed_promise_is_no_norm(golden: Golden, trial: Trial) -> None:
    """Where a path declares other roundings than when recorded, the file is refused by point."""
    points = {**golden.cases[0].forwards[0].points, "gate up": "fp8"}
    with pytest.raises(GoldenError, match="now declares gate up bf16, recorded as fp8"):
        compare(altered(golden, points=points), trial)


def test_a_path_that_is_gone_is_no_norm(golden: Golden, trial: Trial) -> None:
    """Where no path of the recorded name is left, the file is refused."""
    for name in ("carrier pigeon + grouped_mm", "p2p + abacus"):
        with pytest.raises(GoldenError, match="is gone from this version"):
            compare(altered(golden, contract=name), trial)


def test_another_truth_is_no_norm(golden: Golden, trial: Trial) -> None:
    """Where the mathematics gives another truth than recorded, the file is refused."""
    tensors = dict(golden.cases[0].forwards[0].tensors)
    tensors["value"] = tensors["value"] * 1.01
    with pytest.raises(GoldenError, match="elements of its truth come out otherwise"):
        compare(altered(golden, tensors=tensors), trial)


def test_a_path_that_is_wrong_when_recorded_becomes_no_norm(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not equivalent now is not recorded."""
    case = Case.parse("T=3/2,H=32,I=16,E=4,k=2,dtype=bf16")
    faulty = trial.observe(replace(case, fault="swapped_gate_up"), ("optimized",))
    assert not judge_showings(case, [showing["optimized"] for showing in faulty]).equivalent
    monkeypatch.setattr(trial, "observe", lambda *_: faulty)
    with pytest.raises(NotEquivalentError, match="not equivalent to its own truth"):
        record([case], trial)


@pytest.mark.parametrize("extra", ["fault=zeros", "relation=token permutation"])
def test_what_is_no_norm_is_not_recorded(trial: Trial, extra: str) -> None:
    """A planted fault, and a question to several layers, are refused before they run."""
    case = Case.parse(f"T=3/2,H=32,I=16,E=4,k=2,dtype=bf16,{extra}")
    with pytest.raises(ConfigError, match="leave it out"):
        record([case], trial)


def test_contracts_are_found_again_by_name() -> None:
    """Each path's contract is what its name, and the case's wire, say."""
    case = Case.parse("T=3/2,H=32,I=16,E=4,k=2,dtype=bf16,wire=model")
    for name in ("p2p + triton", "nvls + grouped_mm", "nccl + flashinfer", "alltoall + triton"):
        assert declared(case, name, "cpu").name == name


def test_other_hidden_states_are_no_norm(golden: Golden, trial: Trial) -> None:
    """Weights and inputs both have to be drawn as they were."""
    digests = {**golden.cases[0].forwards[0].digests, "hidden": "0" * 64}
    with pytest.raises(GoldenError, match="hidden are drawn otherwise here"):
        compare(altered(golden, digests=digests), trial)


@pytest.mark.parametrize("part", ["radius", "value"])
def test_another_interval_is_no_norm(golden: Golden, trial: Trial, part: str) -> None:
    """Four times as wide, or four radii beside: it is another mathematics."""
    tensors = dict(golden.cases[0].forwards[0].tensors)
    moved = {
        "radius": tensors["radius"] * 4,
        "value": tensors["value"] + 4 * tensors["radius"],
    }
    tensors[part] = moved[part]
    with pytest.raises(GoldenError, match="elements of its truth come out otherwise"):
        compare(altered(golden, tensors=tensors), trial)


def test_a_point_that_a_file_does_not_name_is_as_where_it_is_left_out(
    golden: Golden, trial: Trial
) -> None:
    """A file of a version that had fewer points compares; one that contradicts does not."""
    points = dict(golden.cases[0].forwards[0].points)
    assert points.pop("scores") == "kept"
    assert points.pop("scales") == "router weights"
    assert compare(altered(golden, points=points), trial).equivalent
    del points["gate up"]
    with pytest.raises(GoldenError, match="now declares gate up"):
        compare(altered(golden, points=points), trial)


def test_a_case_that_breaks_the_judge_costs_no_other_its_verdict(
    golden: Golden, trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison is not equivalent, and nothing has failed: there is no verdict on one case."""

    def breaks_once(case: Case, showings: Sequence[Showing]) -> Verdict:
        if case.transport != "alltoall":
            raise IndexError("index 3 is out of bounds")
        return judge_showings(case, showings)

    module = import_module("twinmoe.oracle.golden.compare")  # whose name the package gives away
    monkeypatch.setattr(module, "judge_showings", breaks_once)
    comparison = compare(golden, trial)
    broken, judged = comparison.cases
    assert "IndexError: index 3 is out of bounds" in broken.account
    assert judged.equivalent
    assert comparison.not_judged == [broken]
    assert not comparison.failed
    assert not comparison.equivalent
    assert verdict_line(comparison) == "no verdict: 1 case not judged: a defect of twinmoe"
    assert junit(comparison).get("errors") == "1"
