"""The choice: one tier for all ranks, with reasons, whatever fails on whichever rank."""

import pytest
import torch

from tests.optimized.communication.workers import CPU, choose, message_of
from tests.spmd import run_spmd
from twinmoe.optimized.communication import INJECTABLE, Capacity, Refusal, Tier
from twinmoe.optimized.communication import transport as choice
from twinmoe.optimized.communication.barrier import signal_pad_bytes
from twinmoe.optimized.communication.eligibility import highest_open, refused_multicast
from twinmoe.optimized.communication.pool_setup import release_pools


def _round_trip(transport):
    """One gather and one reduce, to show that the chosen tier works; return the sum."""
    (rows,) = transport.all_gather([torch.ones(1, 4)])
    buffer = transport.partial_buffer(transport.world_size, 4, torch.float32)
    return transport.reduce_scatter(buffer.copy_(rows))[0, 0].item()


def _select(rank, group, calls):
    """Make each call of ``calls`` (options by rank); return tier, label, refusals or the error."""
    outcomes = []
    for options in calls:
        mine = options.get(rank, options.get("all", {}))
        tier = Tier(mine["tier"]) if mine.get("tier") else None
        rest = {key: value for key, value in mine.items() if key != "tier"}
        selected = []
        error = message_of(lambda t=tier, r=rest, s=selected: s.append(choose(group, t, **r)))
        if error:
            outcomes.append(error)
            continue
        report = selected[0].report()
        assert _round_trip(selected[0]) == group.size()
        outcomes.append((report.tier, report.label, report.refusals))
    return outcomes


def _same_on_all(results):
    assert all(result == results[0] for result in results)
    return results[0]


def test_the_best_open_tier_is_taken_and_higher_ones_are_explained(tmp_path):
    """On a CPU there is no multicast: p2p runs, nvls only emulated and on demand."""
    calls = [{"all": {"tier": tier}} for tier in (None, "nvls", "p2p", "collective")]
    auto, nvls, p2p, collective = _same_on_all(run_spmd(_select, 2, tmp_path, calls))
    everyone = lambda reason: dict.fromkeys(range(2), reason)  # noqa: E731
    assert auto == (Tier.P2P, "p2p", {Tier.NVLS: everyone(Refusal.MULTICAST_UNAVAILABLE)})
    assert nvls == (Tier.NVLS, "nvls (emulated)", {})
    lower = everyone(Refusal.FORCED_LOWER_TIER)
    assert p2p == (Tier.P2P, "p2p", {Tier.NVLS: lower})
    assert collective == (Tier.COLLECTIVE, "gloo", {Tier.NVLS: lower, Tier.P2P: lower})


def test_a_failure_on_one_rank_takes_all_ranks_to_the_next_tier(tmp_path):
    """Nobody hangs, nobody stays behind, and everybody knows whose fault it was."""
    failures = ["symmetric_memory", "rendezvous", "buffer", "signal_pad"]
    calls = [{rank: {"inject": {failure}}} for failure in failures for rank in (1, 2)]
    # A pool that exists already is no excuse: the second half repeats the first after a success.
    outcomes = _same_on_all(run_spmd(_select, 3, tmp_path, [*calls, {}, *calls]))
    assert outcomes.pop(len(calls))[0] is Tier.P2P
    for call, outcome in zip([*calls, *calls], outcomes, strict=True):
        ((rank, options),) = call.items()
        reason = {rank: INJECTABLE[next(iter(options["inject"]))]}
        assert outcome == (Tier.COLLECTIVE, "gloo", {Tier.NVLS: reason, Tier.P2P: reason})


def test_a_rank_without_multicast_closes_nvls_to_all(tmp_path):
    """The choice falls to p2p; demanded, nvls is refused on all ranks with the rank's name."""
    calls = [
        {0: {"inject": {"multicast"}}},
        {"all": {"tier": "nvls"}, 1: {"tier": "nvls", "inject": {"multicast"}}},
    ]
    auto, demanded = _same_on_all(run_spmd(_select, 2, tmp_path, calls))
    assert auto[0] is Tier.P2P
    assert auto[2][Tier.NVLS][0] is Refusal.MULTICAST_UNAVAILABLE
    assert demanded.startswith("TransportError: tier (nvls) was demanded but is refused")
    assert "rank 1: multicast_unavailable" in demanded


def test_the_kill_switch_leaves_the_collective_tier(tmp_path):
    """It wins over everything but a demand, which it turns into an error on all ranks."""
    calls = [
        {"all": {"kill_switch": True}},
        {"all": {"kill_switch": True, "tier": "p2p"}},
        {"all": {"kill_switch": True, "tier": "collective"}},
        {},
    ]
    killed, demanded, agreed, revived = _same_on_all(run_spmd(_select, 2, tmp_path, calls))
    assert killed[:2] == (Tier.COLLECTIVE, "gloo")
    assert set(killed[2][Tier.P2P].values()) == {Refusal.KILL_SWITCH}
    assert "ranks 0, 1: kill_switch" in demanded
    assert agreed[0] is Tier.COLLECTIVE
    assert revived[0] is Tier.P2P


def test_ranks_that_ask_for_different_things_all_raise(tmp_path):
    """The message quotes both requests, and is the same everywhere."""
    odd_ones = [
        {"tier": "p2p"},
        {"kill_switch": True},
        {"capacity": Capacity(64, 64)},
        {"pool": "tp"},
        {"num_ctas": 2},
    ]
    calls = [{1: odd_one} for odd_one in odd_ones]
    for message in _same_on_all(run_spmd(_select, 2, tmp_path, calls, timeout=20)):
        assert message.startswith("TransportError: rank 0 asks for")
        assert "rank 1 for" in message


def test_a_misspelt_failure_raises_on_all_ranks(tmp_path):
    """Injecting nothing would look like a passed test."""
    calls = [{1: {"inject": {"multicats"}}}]
    (message,) = _same_on_all(run_spmd(_select, 2, tmp_path, calls, timeout=20))
    assert message.startswith("ValueError: inject (multicats)")
    assert "multicast" in message


def test_the_best_tier_no_rank_refuses_is_the_highest_open():
    """Falling from nvls leads to p2p, and only then to the collective tier."""
    refusal = {0: Refusal.RENDEZVOUS_FAILED}
    assert highest_open({}) is Tier.NVLS
    assert highest_open({Tier.NVLS: refusal}) is Tier.P2P
    assert highest_open({Tier.NVLS: refusal, Tier.P2P: refusal}) is Tier.COLLECTIVE
    assert highest_open({Tier.NVLS: {}, Tier.P2P: refusal}) is Tier.NVLS


def test_multicast_needs_an_address_and_a_recent_gpu(monkeypatch):
    """Compute capability 9.0 and a multicast pointer; neither alone will do."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert refused_multicast(gpu, 4096, emulate=False) is None
    assert refused_multicast(gpu, 0, emulate=False) is Refusal.MULTICAST_UNAVAILABLE
    assert refused_multicast(gpu, 0, emulate=True) is Refusal.MULTICAST_UNAVAILABLE
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert refused_multicast(gpu, 4096, emulate=False) is Refusal.COMPUTE_CAPABILITY
    assert refused_multicast(CPU, 0, emulate=False) is Refusal.MULTICAST_UNAVAILABLE
    assert refused_multicast(CPU, 0, emulate=True) is None


@pytest.mark.parametrize(("ranks", "ctas"), [(1, 56), (8, 56), (9, 51), (16, 30), (72, 7)])
def test_large_groups_take_fewer_programs(monkeypatch, ranks, ctas):
    """As many as have a row on PyTorch's signal pad of 2048 bytes, at most 56."""
    monkeypatch.setattr(choice, "_MOST_CTAS", 56)
    monkeypatch.setattr(choice, "available_signal_pad_bytes", lambda: 2048)
    gpu = torch.device("cuda", 0)
    assert choice._ctas_for(ranks, gpu) == ctas
    assert signal_pad_bytes(ctas, ranks) <= 2048

    def without_symmetric_memory():
        raise ImportError("no _symmetric_memory in this build")

    monkeypatch.setattr(choice, "available_signal_pad_bytes", without_symmetric_memory)
    assert choice._ctas_for(ranks, gpu) == 56


def test_the_report_reads_as_text():
    """Tier, ranks, reasons, launches and bytes, for people."""
    transport = choose(None, pool="report", capacity=Capacity(1024, 1024))
    _round_trip(transport)
    text = str(transport.report())
    assert text.startswith("transport p2p, rank 0 of 1\n")
    assert "nvls refused: rank 0: multicast_unavailable" in text
    assert "all_gather[p2p] x" in text
    assert f"pool: {transport.report().pool_bytes} bytes" in text
    release_pools(None)
