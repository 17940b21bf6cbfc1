"""A layer that hangs, dies or crashes has failed, on the first case too, at a line of its own."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.oracle import lethal_layers
from twinmoe.oracle import cli, descendants
from twinmoe.oracle.case import Case
from twinmoe.oracle.failures import (
    WorkerDied,
    WorkerError,
    WorkerFailure,
    WorkerHang,
    WorkerLost,
    account,
)
from twinmoe.oracle.recurrence import Tracing
from twinmoe.oracle.trial import Trial

ONE = Case.parse("T=3,H=16,I=8,E=4,k=2,dtype=fp32,transport=alltoall")
TWO = Case.parse("T=3/2,H=16,I=8,E=4,k=2,dtype=fp32,transport=alltoall")
FILE = Path(lethal_layers.__file__)


@pytest.fixture
def judged() -> Iterator[Callable[[str], Trial]]:
    """Return trials of the layers by name, ended with the test."""
    trials: list[Trial] = []

    def trial(name: str) -> Trial:
        trials.append(Trial(timeout_s=2.0, subjects=(f"{FILE}:{name}",)))
        return trials[-1]

    yield trial
    for one in trials:
        one.close()


@pytest.mark.parametrize(
    ("name", "case", "kind", "function"),
    [
        ("one_sided", TWO, WorkerHang, "forward"),
        ("spinning", ONE, WorkerHang, "_spin"),
        ("leaving", ONE, WorkerDied, "_leave"),
        ("killing_itself", ONE, WorkerDied, "_kill_itself"),
        ("babbling", ONE, WorkerHang, "_print_for_ever"),
        ("crashing", ONE, WorkerDied, "_crash"),
    ],
)
def test_the_line_at_which_it_ended_comes_first(
    name: str,
    case: Case,
    kind: type[WorkerFailure],
    function: str,
    judged: Callable[[str], Trial],
) -> None:
    """File, line and function of the layer's own code, and the way there on every rank."""
    with pytest.raises(kind) as caught:
        judged(name).run(case)
    told = account(caught.value)
    assert re.match(rf"{re.escape(str(FILE))}:\d+ in {function}: {kind.__name__}: rank", told), told
    assert re.search(r"  rank 0 stands in .*:\d+ in forward > .*:\d+ in _", told), told


@pytest.mark.parametrize("name", ["forking", "daemonising"])
def test_a_process_that_outlives_the_forward_is_a_finding(
    name: str, judged: Callable[[str], Trial]
) -> None:
    """The copy answers for nobody, a daemon does not hide; both are named with their line."""
    trial = judged(name)
    before = descendants.marked(descendants.mark_of(os.getpid()))
    outcome = trial.run(ONE)
    assert not outcome.equivalent
    (told,) = {finding.message for finding in outcome.findings}
    assert re.search(r"the forward left process \d+ .* behind, started at .*:\d+ in _fork", told)
    trial.close()
    new = descendants.marked(descendants.mark_of(os.getpid())) - before
    assert not [pid for pid in new if not descendants.is_helper(pid)]


def test_a_process_that_ends_with_the_forward_is_its_own_affair(
    judged: Callable[[str], Trial],
) -> None:
    """What is started, waited for and gone changes nothing."""
    assert not judged("pooling").run(ONE).findings


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_what_is_ended_from_outside_is_asked_again(
    number: int, judged: Callable[[str], Trial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: the fresh workers' answer is judged, and what happened is kept, as what it is."""
    monkeypatch.setenv("TWINMOE_TEST_SIGNAL", f"{int(number)},{tmp_path / 'sent'}")
    trial = judged("strangled")
    assert trial.run(ONE).equivalent
    ((case, told),) = trial.cut_off
    assert case == ONE
    assert "from outside" in told or "somebody sent SIGSTOP" in told


def test_what_ends_again_in_a_fresh_world_is_the_layers_own(
    judged: Callable[[str], Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sent the signal: it comes with the layer."""
    monkeypatch.setenv("TWINMOE_TEST_SIGNAL", f"{int(signal.SIGKILL)},always")
    trial = judged("strangled")
    with pytest.raises(WorkerDied) as caught:
        trial.run(ONE)
    assert caught.value.outside is None
    assert not trial.cut_off


def test_a_rank_lost_after_its_answer_is_a_failure_of_that_case(
    judged: Callable[[str], Trial],
) -> None:
    """Not of the next one, which is not run; and it is found at the end of a run, too."""
    trial = judged("dying_later")
    assert trial.run(ONE).equivalent
    time.sleep(1.0)
    with pytest.raises(
        WorkerLost, match=r"rank 0 exited with code 7\n  after its answer"
    ) as caught:
        trial.require_alive(1)
    assert caught.value.case == ONE


def test_a_failure_that_an_earlier_case_left_behind_is_replayed_with_it() -> None:
    """Exit 1, the two cases in one line, and the line fails again."""
    subject = f"{FILE}:remembering"
    five, three = str(ONE).replace("T=3", "T=5"), str(ONE)
    with Trial(subjects=(subject,)) as trial:
        assert trial.run(Case.parse(five)).equivalent
        assert trial.run(replace(ONE, seed=7)).findings
        outcome = trial.run(ONE)
        outcome.recurrence = Tracing(trial.fails_again).trace(ONE, outcome.before)
        told = outcome.explain()
    assert "alone it passes" in told
    assert told.endswith(f"reproduce: twinmoe replay --subject {subject} '{five}' '{three}'")
    again = CliRunner().invoke(cli.main, ["replay", "--subject", subject, five, three])
    assert again.exit_code == cli.NOT_EQUIVALENT, again.output


def test_what_a_layer_raises_is_bounded_and_visible(judged: Callable[[str], Trial]) -> None:
    """200 kB with terminal escapes: a few lines that a terminal prints, and the place first."""
    with pytest.raises(WorkerError) as caught:
        judged("raging").run(ONE)
    told = account(caught.value)
    assert re.match(rf"{re.escape(str(FILE))}:\d+ in _rage: ValueError: ", told)
    assert r"\x1b[2J\x1b[31mNO\ud800xxx" in told
    assert r"xxx\x07" in told
    for text in (told, str(caught.value), *caught.value.__notes__):
        assert len(text) < 10_000
        assert text.replace("\n", "").isprintable()


def test_an_exception_without_words_is_the_layers_own(judged: Callable[[str], Trial]) -> None:
    """A class whose __str__ raises is named; the worker lives to say so."""
    with pytest.raises(WorkerError, match=r"_Unspeakable: .* __str__ raised RuntimeError"):
        judged("unspeakable").run(ONE)


def test_what_a_layer_prints_changes_no_verdict(judged: Callable[[str], Trial]) -> None:
    """50 MB, half of it past Python: read as they come, and the account has the end of them."""
    outcome = judged("flooding").run(ONE)
    assert outcome.equivalent
    assert len(outcome.printed) < 5_000
    assert outcome.printed.endswith("the end of 50 MB")
    assert re.search(r"rank 0 printed 5\d{7} bytes", outcome.printed)


def test_a_layer_may_close_its_output(judged: Callable[[str], Trial]) -> None:
    """It is a pipe of its own process: nobody else's writing depends on it."""
    trial = judged("muting")
    assert trial.run(ONE).equivalent
    assert trial.run(replace(ONE, seed=7)).equivalent


def test_the_last_words_of_a_dead_rank_are_in_its_account() -> None:
    """Escaped, whatever it printed with; all of it is on stderr, and in a file that is named."""
    arguments = ["replay", "--subject", f"{FILE}:cursing", str(ONE)]
    done = CliRunner().invoke(cli.main, arguments)
    assert done.exit_code == cli.NOT_EQUIVALENT, done.output
    said = r"\x1b[2J\x1b]0;title\x07\ud800\xff\r"
    assert f"    | {said}\n" in done.stdout
    assert f"layers printed:\n--- rank 0 of 1 ---\n{said}\n" in done.stderr
    kept = re.search(r"layers printed \d+ bytes \(kept in (.*)\)\n$", done.stderr)
    assert kept, done.stderr
    assert said in Path(kept[1]).read_text()
    Path(kept[1]).unlink()
