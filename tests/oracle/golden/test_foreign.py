"""Anyone's layer against a recording: what it runs is judged, what it does not is said."""

import json
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest

from tests.oracle.golden.conftest import LINES
from twinmoe.oracle.case import Case
from twinmoe.oracle.golden import Golden, Target, compare, export, record, report
from twinmoe.oracle.golden.target import questions
from twinmoe.oracle.trial import Trial
from twinmoe.reference.config import ConfigError

LAYERS = Path(__file__).parents[1] / "plain_layers.py"

#: Near ties, which only the layer's own ids decide.
NEAR = "T=4/2,H=32,I=16,E=8,k=3,dtype=fp32,routing=near_ties"


def layer(name: str) -> str:
    """Name one of the layers of the tests."""
    return f"{LAYERS}:{name}"


def test_a_right_layer_is_equivalent(golden: Golden, trial: Trial) -> None:
    """On one rank, by its own contract, with the forwards of the recording and no bits compared."""
    comparison = compare(golden, trial, Target(subject=layer("right")))
    assert comparison.equivalent
    assert [one.question.ep_size for one in comparison.cases] == [1, 1]
    assert [one.changed for one in comparison.cases] == [None, None]
    assert {one.verdict.contract.name for one in comparison.cases if one.verdict} == {"right"}


def test_a_right_layer_is_equivalent_on_the_ranks_asked_for(golden: Golden, trial: Trial) -> None:
    """``ep_size`` shares the tokens and the experts."""
    comparison = compare(golden, trial, Target(subject=layer("right"), ep_size=2))
    assert comparison.equivalent
    assert [one.question.ep_size for one in comparison.cases] == [2, 2]


def test_what_a_layer_does_not_run_is_counted_and_said(
    golden: Golden, trial: Trial, tmp_path: Path
) -> None:
    """A layer without a shared expert: one case compared, one not run, in every report."""
    comparison = compare(golden, trial, Target(subject=layer("unscaled")))
    (not_run,) = comparison.not_run
    assert (not_run.number, not_run.why) == (1, ("shared_expert_intermediate_size=24",))
    (told,) = report.left_open(comparison)
    assert told.startswith("not run: 1 of 2 cases: ")
    assert "shared_expert_intermediate_size (1)" in told
    assert export.as_json(comparison)["not_run"][0]["why"] == list(not_run.why)
    export.write_junit(comparison, tmp_path / "suite.xml")
    suite = Xml.parse(tmp_path / "suite.xml").getroot()
    counts = [suite.get(name) for name in ("tests", "failures", "errors", "skipped")]
    assert counts == ["2", "1", "0", "1"]
    (skipped,) = suite.findall("testcase/skipped")
    assert skipped.get("message") == "not run: shared_expert_intermediate_size=24"


def test_a_wrong_layer_is_explained(trial: Trial) -> None:
    """Not equivalent, beyond any rounding, and the mistake is named."""
    plain = record([Case.parse("T=3/2,H=32,I=16,E=4,k=2,dtype=bf16")], trial)
    comparison = compare(plain, trial, Target(subject=layer("swapped")))
    (wrong,) = comparison.failed
    assert wrong.proven
    assert "this is what one gets if gate and up are swapped" in wrong.account
    assert json.dumps(export.as_json(comparison))


def test_a_layer_that_runs_no_case_is_refused(golden: Golden) -> None:
    """Before anything runs: nothing would be shown."""
    only_shared = Golden(golden.cases[1:], golden.environment)
    with pytest.raises(ConfigError, match=r"runs none of the 1 cases.*intermediate_size \(1\)"):
        questions(only_shared, Target(subject=layer("swapped")))


@pytest.mark.parametrize("wish", [{"fault": "zeros"}, {"transport": "gloo"}], ids=str)
def test_wishes_that_only_our_layer_can_grant_are_refused(
    golden: Golden, wish: dict[str, str]
) -> None:
    """Faults and transports are those of the optimized twin."""
    with pytest.raises(ConfigError, match=r"drop --(fault|transport) or --subject"):
        questions(golden, Target(subject=layer("right"), **wish))


def test_a_history_of_other_weights_is_not_asked(golden: Golden) -> None:
    """What a plain layer has no way to live through is not run; what it has, is."""
    for history, runs in (("f0.k1.f0", True), ("f0.w1.f0", False), ("f0.o0.f0", True)):
        case = Case.parse(f"{LINES[0]},history={history}")
        recorded = type(golden.cases[0])(case, (), golden.cases[0].figures)
        one = Golden((*golden.cases, recorded), golden.environment)
        _, not_run = questions(one, Target(subject=layer("right")))
        assert [left.why for left in not_run] == ([] if runs else [(f"history={history}",)])


def test_near_ties_leave_a_silent_layer_undecided(trial: Trial) -> None:
    """Neither equivalent nor failed; a comparison of such cases alone decides nothing."""
    near = record([Case.parse(NEAR)], trial)
    comparison = compare(near, trial, Target(subject=layer("silent")))
    assert comparison.cases[0].undecided
    assert not comparison.failed
    assert not comparison.decided
    assert not comparison.equivalent
    assert report.verdict_line(comparison) == "nothing shown: every case is undecided"
    (told,) = report.left_open(comparison)
    assert "shows no expert ids" in told
    assert export.junit(comparison).get("skipped") == "1"
