"""Anyone's layer by name: imported, narrowed to what it runs, judged; and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tests.oracle import plain_layers, rounding_layers
from twinmoe.oracle import cli
from twinmoe.oracle.case import Case
from twinmoe.oracle.corners import CORNERS
from twinmoe.oracle.failures import WorkerError
from twinmoe.oracle.layer_space import SEMANTICS, fitted, neutral, runs, standing_still
from twinmoe.oracle.plain_layer import LayerError, require_layer
from twinmoe.oracle.strategies import Cell, cases
from twinmoe.oracle.subject_spec import PlainName, load_factory, spec_of, subject_factory
from twinmoe.oracle.trial import Trial
from twinmoe.reference.config import ConfigError, MoEConfig

FILE = plain_layers.__file__
LINE = "T=3,H=32,I=16,E=4,k=2,dtype=bf16,transport=alltoall"


def named(layer: str) -> str:
    """The name of one of the layers of plain_layers.py."""
    return f"{FILE}:{layer}"


@pytest.fixture(scope="module")
def judged() -> Iterator[Callable[..., Trial]]:
    """Return a function that gives the trial of one layer, shared by the tests of this file."""
    trials: dict[str, Trial] = {}

    def trial_of(layer: str) -> Trial:
        return trials.setdefault(layer, Trial("cpu", 15.0, (named(layer),)))

    yield trial_of
    for trial in trials.values():
        trial.close()


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my_layer", "is no name of a layer"),
        (":make", "is no name of a layer"),
        ("no_such_module:make", "No module named 'no_such_module'"),
        ("no_such_file.py:make", "there is no file"),
        (f"{FILE}:nothing", "has no 'nothing'; it defines .*right"),
        (f"{FILE}:NOT_CALLABLE", "is int, which cannot be called"),
    ],
)
def test_a_wrong_name_is_refused_in_one_line(name: str, words: str) -> None:
    """A name that leads to no factory says what is missing and how to write it."""
    with pytest.raises(ConfigError, match=words):
        PlainName(name)


def test_a_module_that_fails_to_import_is_told(tmp_path: Path) -> None:
    """Whatever a module stumbles over is named, not raised as it is."""
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('no such kernel')")
    with pytest.raises(ConfigError, match=r"^.*broken_module.py:1: RuntimeError: no such kernel"):
        load_factory(f"{tmp_path}/broken_module.py:make")


def test_a_function_knows_its_name() -> None:
    """A factory at the top of a module has a name; one inside a function has none."""
    assert load_factory(spec_of(plain_layers.right)).__qualname__ == "right"
    with pytest.raises(ConfigError, match="has no name"):
        spec_of(lambda *_: None)


def test_our_twins_keep_their_names() -> None:
    """Names without a colon stand for this project's subjects."""
    assert subject_factory("reference").__name__ == "ReferenceSubject"


# --- what a layer can be asked ------------------------------------------------------------------


@given(data=st.data())
def test_a_fitted_case_is_one_that_the_layer_runs(data: st.DataObject) -> None:
    """Whatever is drawn, a layer without a declaration gets neutral settings and its one path."""
    transport = data.draw(st.sampled_from(("alltoall", "p2p")))
    drawn = data.draw(cases(Cell(2, transport, "eager", torch.bfloat16)))
    case = fitted(drawn, neutral)
    assert case.config == neutral(case.config)
    assert (case.transport, case.mode, case.backend) == ("alltoall", "eager", "auto")
    assert {step.kind for step in case.steps()} <= set("fcdnkwlpo")
    assert fitted(case, neutral) == case
    assert Case.parse(str(case)) == case


def test_settings_that_are_read_stay_as_drawn() -> None:
    """``neutral`` leaves what a layer reads, sets what it fixes, and resets the rest."""
    drawn = MoEConfig(
        hidden_size=32,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        hidden_act="gelu",
        routed_scaling_factor=2.5,
        swiglu_limit=1.5,
    )
    config = neutral(drawn, reads=("hidden_act",), scoring_func="sigmoid")
    assert (config.hidden_act, config.scoring_func) == ("gelu", "sigmoid")
    assert (config.routed_scaling_factor, config.swiglu_limit) == (1.0, None)


def test_a_report_says_what_stood_still() -> None:
    """Settings with one value in all layers are named; one that varied is not."""
    one = MoEConfig(hidden_size=32, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
    still = standing_still({one, replace(one, hidden_act="gelu")})
    assert still.keys() == set(SEMANTICS) - {"hidden_act"}
    assert still["scoring_func"] == "softmax"


def test_steps_between_our_own_paths_are_left_out() -> None:
    """Those that choose a path or fill padding are dropped; reloads, switches and poison stay."""
    line = f"{LINE},history=f0.k1.a1.w1.x2.p.g0.o1.f0"
    assert fitted(Case.parse(line), neutral).history == "f0.k1.w1.p.o1.f0"
    assert fitted(Case.parse(f"{LINE},history=f0.x1"), neutral).history == ""


def test_another_layer_beside_it_must_be_one_of_its_own() -> None:
    """A layer of one width is not asked to share its memory with a wider one."""
    case = Case.parse(f"{LINE},history=f0.o0.f0")
    assert fitted(case, lambda config: neutral(config, hidden_size=32)).history == "f0.f0"


def test_a_relation_stays_where_the_changed_layer_is_one_of_its_own() -> None:
    """Another scaling factor is beyond a layer that reads none."""
    scaled = replace(Case.parse(LINE), relation="scaled routing")
    names = {fitted(replace(scaled, relation=name), neutral).relation for name in _relations()}
    assert "permuted tokens" in names or len(names) > 1
    assert "" in names


def _relations() -> tuple[str, ...]:
    from twinmoe.oracle.relations import RELATIONS  # noqa: PLC0415 - only here

    return tuple(RELATIONS)


# --- judged -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ep_size", [1, 2])
def test_a_right_layer_passes_every_corner(ep_size: int, judged: Callable[[str], Trial]) -> None:
    """The readable twin as a plain layer, with everything drawn that it reads."""
    name = PlainName(named("right"))
    cell = Cell(ep_size, "alltoall", "eager", torch.bfloat16)
    for corner in CORNERS.values():
        outcome = judged("right").run(name.fit(corner(cell)))
        assert outcome.equivalent, outcome.explain()


@pytest.mark.parametrize("values", ["normal", "recorded"])
def test_other_ids_may_order_a_stored_sum_otherwise(values: str) -> None:
    """Experts that change places are added in another order: no mistake of such a layer."""
    case = f"T=9,H=96,I=16,E=6,k=3,dtype=bf16,transport=alltoall,values={values}"
    with Trial("cpu", 15.0, (f"{rounding_layers.__file__}:summed_in_place",)) as trial:
        outcome = trial.run(Case.parse(f"{case},relation=relabelled_experts"))
    assert outcome.equivalent, outcome.explain()


def test_a_wrong_layer_is_named_with_its_mistake(judged: Callable[[str], Trial]) -> None:
    """Gate and up swapped: outside, and told so, with the line that replays it."""
    trial = judged("swapped")
    outcome = trial.run(Case.parse(LINE))
    trial.diagnose(outcome)
    assert not outcome.equivalent
    told = outcome.explain()
    assert "this is what one gets if gate and up are swapped" in told
    assert f"twinmoe replay --subject {named('swapped')} 'T=3," in told


def test_a_missing_factor_is_named(judged: Callable[[str], Trial]) -> None:
    """A layer that forgets the scaling factor is told so."""
    trial = judged("unscaled")
    outcome = trial.run(Case.parse(f"{LINE},rsf=2.5"))
    trial.diagnose(outcome)
    assert outcome.diagnosis[0] == "routed_scaling_factor is missing"


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ("without_forward", "has no method forward"),
        ("without_contract", "contract is NoneType"),
        ("wrong_return", "returned NoneType: the judge compares rows"),
    ],
)
def test_what_is_no_layer_is_refused(
    layer: str, words: str, judged: Callable[[str], Trial]
) -> None:
    """A factory, or a forward, that returns something else says what and what to return."""
    with pytest.raises(WorkerError, match=words):
        judged(layer).run(Case.parse(LINE))


def test_an_answer_that_is_overwritten_later_is_called_so(judged: Callable[[str], Trial]) -> None:
    """Not the arithmetic, which is right: who kept the first answer would find the second."""
    trial = judged("overwriting")
    assert trial.run(Case.parse(LINE)).equivalent
    outcome = trial.run(Case.parse(f"{LINE},history=f0.f1.f2"))
    messages = [finding.message for finding in outcome.findings]
    assert messages
    assert all("overwrote what forward" in message for message in messages)


def test_a_module_with_a_contract_is_a_layer() -> None:
    """A torch module needs no base class of ours."""
    module = torch.nn.Identity()
    with pytest.raises(LayerError):
        require_layer("mine", module)
    module.contract = plain_layers.storage_contract("mine", torch.bfloat16)
    require_layer("mine", module)


def test_a_declaration_stays_with_its_factory() -> None:
    """``runs`` returns the factory it was given."""
    assert runs(neutral)(plain_layers.silent) is plain_layers.silent


# --- the command line ---------------------------------------------------------------------------


def test_the_command_judges_a_layer() -> None:
    """Exit 0 for a right layer, its cases counted, and what was not judged as last words."""
    run = ["check", "--subject", named("silent"), "--dtype", "fp32", "--cases", "2"]
    result = CliRunner().invoke(cli.main, run)
    assert result.exit_code == cli.EQUIVALENT, result.output
    assert "cases undecided: scores nearly tie" in result.stdout
    last = result.stdout.splitlines()[-1]
    assert "settings were not varied" in last


def test_the_command_names_a_mistake() -> None:
    """Exit 1 for a wrong layer, from check and from the line that it prints."""
    run = ["check", "--subject", named("swapped"), "--dtype", "bf16", "--cases", "1"]
    result = CliRunner().invoke(cli.main, run)
    assert result.exit_code == cli.NOT_EQUIVALENT
    assert "this is what one gets if gate and up are swapped" in result.stdout
    again = CliRunner().invoke(cli.main, ["replay", "--subject", named("swapped"), LINE])
    assert again.exit_code == cli.NOT_EQUIVALENT
    assert "this is what one gets if gate and up are swapped" in again.stdout


@pytest.mark.parametrize("layer", ["raising", "wrong_return", "without_contract"])
def test_a_layer_that_never_answers_is_not_equivalent(layer: str) -> None:
    """Exit 1 from the first case on: what fails is the layer; its own line leads its account."""
    run = ["check", "--subject", named(layer), "--dtype", "bf16"]
    result = CliRunner().invoke(cli.main, run)
    assert result.exit_code == cli.NOT_EQUIVALENT
    assert "before it 0 were answered" in result.stdout
    assert "twinmoe replay --subject" in result.stdout
    assert "NOT equivalent: 1 cases in 1 cells" in result.stdout
    again = CliRunner().invoke(cli.main, ["replay", "--subject", named(layer), LINE])
    assert again.exit_code == cli.NOT_EQUIVALENT
    if layer != "without_contract":  # a missing contract has no line
        assert f"\n{FILE}:" in result.stdout
        assert again.stdout.startswith(FILE)


def test_the_line_that_is_told_is_the_layers_own() -> None:
    """The last one in its file, not the adapter's before nor a library's behind it."""
    run = ["check", "--subject", named("raising"), "--dtype", "bf16"]
    told = CliRunner().invoke(cli.main, run).stdout
    assert re.search(
        r"plain_layers\.py:\d+ in kernel: RuntimeError: no such kernel \(on rank 0\)", told
    )


def test_a_layer_that_answers_some_cases_is_not_equivalent(tmp_path: Path) -> None:
    """Exit 1 where others were answered: an empty batch is a case; the report says how many."""
    report = tmp_path / "report.json"
    run = ["check", "--subject", named("raising_without_tokens"), "--dtype", "bf16"]
    result = CliRunner().invoke(cli.main, [*run, "--json", str(report)])
    assert result.exit_code == cli.NOT_EQUIVALENT
    assert "in forward: ValueError: no tokens (on rank 0)" in result.stdout
    assert "no answer to this case; before it 1 was answered" in result.stdout
    assert "'T=0," in result.stdout
    told = json.loads(report.read_text())
    assert set(told["stood_still"]) <= set(SEMANTICS)


def test_a_declaration_that_fails_is_told_with_its_line() -> None:
    """What ``runs`` was given is somebody's code too."""
    result = CliRunner().invoke(cli.main, ["check", "--subject", named("wrong_runs")])
    assert result.exit_code == cli.COULD_NOT_RUN
    assert re.search(r"plain_layers\.py:\d+: TypeError: .*no_such_setting", result.stderr)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--transport", "p2p"], "--transport"),
        (["--mode", "eager"], "--mode"),
        (["--fault", "dropped_slot"], "cannot be planted"),
    ],
)
def test_options_of_our_own_paths_are_refused(arguments: list[str], words: str) -> None:
    """A layer of one path has no transport, no mode, and none of our faults."""
    result = CliRunner().invoke(cli.main, ["check", "--subject", named("right"), *arguments])
    assert result.exit_code == cli.COULD_NOT_RUN
    assert words in result.stderr
