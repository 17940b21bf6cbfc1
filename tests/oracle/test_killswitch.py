"""Kill-switch validation: it holds for our layer, and names the rank that applies it by half."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace

import pytest
from click.testing import CliRunner, Result

from twinmoe.optimized.communication import INJECTABLE
from twinmoe.oracle import cli, killswitch, killswitch_cli
from twinmoe.oracle.killswitch import validate
from twinmoe.oracle.killswitch_checks import Check, Place, checks
from twinmoe.oracle.killswitch_play import FAULTS, Setup
from twinmoe.oracle.world import World

PLACE = Place(2)

#: Checks in which a half-applied switch shows, one for each time at which it is flipped.
FLIPPED = ("between calls", "between captures", "before the first capture")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Share two ranks between the tests of this file; a hang costs three seconds."""
    with World(2, timeout_s=3) as shared:
        yield shared


def named(*parts: str) -> list[Check]:
    """Return the checks of two ranks whose names contain all ``parts``."""
    return [check for check in checks(PLACE) if all(part in check.name for part in parts)]


def test_the_fallback_of_our_layer_is_validated(world: World) -> None:
    """Every check holds; each forward ran where the switch says; A, B, A gives A's bits."""
    results = validate(PLACE, world)
    assert [result.wrong for result in results if not result.holds] == []
    ran = {result.check: result.ran for result in results}
    assert ran["switch before construction"] == ("gloo",)
    assert ran["p2p: between captures"] == ("p2p", "gloo", "gloo", "p2p")
    emulated = "nvls (emulated)"
    assert ran["nvls: between calls"] == (emulated, "gloo", "gloo", emulated)
    assert ran["nvls: misaligned, odd counts, k = 6"] == ("p2p", "gloo", "gloo", "p2p")
    assert ran["set-up fails on rank 1: rendezvous_failed"] == ("gloo", "gloo", "gloo")
    assert ran["set-up fails on rank 1: multicast_unavailable"] == ("p2p", "p2p", "p2p")
    assert ran["gathers are the same bits on every tier"] == ("gloo", "p2p", emulated)
    assert "WorkerHang" in ran["rank 1 switches alone"][0]
    again = {result.check: result.same_bits for result in results}
    assert all(again[f"{tier}: {when}"] for tier in ("p2p", "nvls") for when in FLIPPED[:2])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_half_applied_switch_names_the_rank(world: World, fault: str) -> None:
    """The last rank ignores the flag, or keeps what it had: nothing hangs, and it is named."""
    chosen = [check for when in FLIPPED for check in named("p2p", when)]
    results = validate(PLACE, world, fault, only=chosen)
    assert len(results) == len(FLIPPED)
    for result in results:
        assert not result.holds
        assert result.ranks == (1,)
    words = {
        "ignores_flag": "was told kill switch on",
        "keeps_transport": "would run p2p there",
        "sets_up_anyway": "symmetric memory was set up: symmetric allocation x1",
    }
    assert all(words[fault] in result.wrong for result in results)


def test_what_runs_is_not_what_is_claimed(world: World) -> None:
    """A check that expects another transport than the layer takes does not hold."""
    (check,) = named("gloo by choice")
    (result,) = validate(PLACE, world, only=[replace(check, labels=("p2p",))])
    assert result.ranks == (0, 1)
    assert "would run gloo there, not p2p" in result.wrong


def test_a_reason_that_is_not_told_is_missed(world: World) -> None:
    """Falling back is not enough: every rank's report must give the reason."""
    (check,) = named("rendezvous_failed")
    (result,) = validate(PLACE, world, only=[replace(check, refusal="buffer_too_small")])
    assert result.ranks == (0, 1)
    assert "does not say 'buffer_too_small'" in result.wrong


def test_a_switch_that_was_never_thrown_does_not_pass(world: World) -> None:
    """Another layer holds as well; where nothing was switched off, no rank ran the fallback."""
    (check,) = named("switch before construction, captured")
    wrong = replace(check.case, config=replace(check.case.config, routed_scaling_factor=0.0))
    good = validate(PLACE, world, only=[replace(check, case=wrong)])
    assert good[0].holds  # another layer, but right
    case = replace(check.case, relation="", history="f0.f1.f0")
    (result,) = validate(PLACE, world, only=[replace(check, case=case, setup=Setup())])
    assert not result.holds  # nothing was switched off
    assert result.ranks == (0, 1)


def test_every_injectable_failure_is_injected() -> None:
    """The list of set-up failures is the transport's own, and each must be told by its reason."""
    injected = {check.refusal for check in checks(PLACE) if check.setup.inject}
    assert injected == {refusal.value for refusal in INJECTABLE.values()}


def test_one_rank_has_nobody_to_disagree_with() -> None:
    """At EP 1 the switch still leaves plain copies, and no check is about other ranks."""
    names = [check.name for check in checks(Place(1))]
    assert "p2p: between captures" in names
    assert not any("rank 0 asks" in name or "switches alone" in name for name in names)


def test_a_gpu_is_left_without_a_rank_that_spins() -> None:
    """On GPUs no check leaves a kernel waiting for ever; nvls is checked where there is any."""
    without, with_multicast = (
        [check.name for check in checks(Place(2, "cuda"), multicast)] for multicast in (False, True)
    )
    assert not any("switches alone" in name for name in without)
    assert not any(name.startswith("nvls") for name in without)
    assert any(name.startswith("nvls") for name in with_multicast)


# --- the command --------------------------------------------------------------------------------

Run = Callable[..., Result]


@pytest.fixture
def run(world: World, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs ``twinmoe killswitch`` here on a few checks, with two ranks."""
    few = named("p2p", "between calls") + named("gloo by choice")
    monkeypatch.setattr(killswitch_cli, "open_world", lambda *_: nullcontext(world))
    monkeypatch.setattr(killswitch, "checks", lambda *_: iter(few))
    return lambda *arguments: CliRunner().invoke(cli.main, ["killswitch", *arguments])


def test_the_command_ends_in_the_verdict(run: Run) -> None:
    """Exit 0, a row for each check, and "fallback validated" last."""
    result = run("--ep", "2")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("holds") == 3
    last = result.stdout.splitlines()[-1]
    assert last == "fallback validated: 3 checks on 2 ranks, cpu"


def test_the_command_names_the_rank_to_blame(run: Run) -> None:
    """Exit 1, "NOT validated" last, with the rank that applies the switch by half."""
    result = run("--ep", "2", "--fault", "keeps_transport")
    assert result.exit_code == 1, result.output
    assert "rank 1: forward 2 would run p2p there, not gloo" in result.stdout
    assert result.stdout.splitlines()[-1].endswith("cpu fail, rank 1 to blame")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--fault", "gremlin"], ("'gremlin'", "no half-applied switch", "ignores_flag")),
        (["--ep", "1", "--fault", "ignores_flag"], ("--ep 1 has one", "--ep 2 or more")),
        (["--ep", "0"], ("0", "range", "--help")),
    ],
)
def test_bad_input_is_one_line_and_exit_two(
    run: Run, arguments: list[str], parts: tuple[str, ...]
) -> None:
    """One line on stderr with value, why and remedy; exit code 2."""
    result = run(*arguments)
    assert result.exit_code == cli.COULD_NOT_RUN
    (line,) = result.stderr.splitlines()
    assert all(part in line for part in parts), line
