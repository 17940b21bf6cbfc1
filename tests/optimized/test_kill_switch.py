"""The kill switch and forced tiers: all ranks together, shown by what was launched."""

import pytest
import torch

from tests.optimized.exact import (
    error_of,
    exact_config,
    exact_tokens,
    graphed_forward,
    optimized,
    random_tokens,
    reference,
    same_bits,
)
from tests.spmd import run_spmd
from twinmoe.optimized import launch
from twinmoe.optimized.communication.eligibility import Tier
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights

LABELS = {Tier.NVLS: "nvls (emulated)", Tier.P2P: "p2p", Tier.COLLECTIVE: "gloo"}


def collectives_of(action):
    """Return what ``action`` returns, and which all-gathers and reduce-scatters it launched."""
    before = launch.COUNTS.copy()
    result = action()
    return result, {name for name in launch.COUNTS - before if "[" in name}


def launches_of(label):
    """Name the collectives of one tier."""
    return {f"all_gather[{label}]", f"reduce_scatter[{label}]"}


def check_switching(rank, group):
    """Off, on, off: peer to peer, plain, peer to peer, with the first bits again."""
    config = MoEConfig(
        hidden_size=24, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2
    )
    layer = optimized(config, group, MoEWeights.random(config, seed=2))
    hidden_TH = random_tokens(config, (4, 0, 1, 7)[rank], seed=rank)
    outputs = []
    for disabled, tier in ((False, Tier.P2P), (True, Tier.COLLECTIVE), (False, Tier.P2P)):
        layer.set_kill_switch(disabled)
        assert layer.transport.tier is tier
        output_TH, launched = collectives_of(lambda: graphed_forward(layer, hidden_TH))
        assert launched == launches_of(LABELS[tier])
        assert ("p2p refused" in layer.transport_report()) is disabled
        assert ("kill_switch" in layer.transport_report()) is disabled
        outputs.append(output_TH)
    assert same_bits(outputs[0], outputs[2])


def check_exact_answers(rank, group):
    """The tier of a layer that does not round cannot be told from its output."""
    config = exact_config()
    hidden_TH = exact_tokens(config, 4, seed=rank)
    expected_TH = reference(config, group)(hidden_TH)
    killed = optimized(config, group, disable_triton_nvls_kernels=True)
    assert killed.transport.tier is Tier.COLLECTIVE
    assert torch.equal(graphed_forward(killed, hidden_TH), expected_TH)
    for tier in Tier:
        layer = optimized(config, group, transport=tier)
        for disabled in (False, True):
            layer.set_kill_switch(disabled)
            expected_tier = Tier.COLLECTIVE if disabled else tier
            output_TH, launched = collectives_of(lambda: graphed_forward(layer, hidden_TH))  # noqa: B023 - called at once
            assert layer.transport.tier is expected_tier
            assert launched == launches_of(LABELS[expected_tier])
            assert torch.equal(output_TH, expected_TH), (tier, disabled)


def check_disagreement(rank, group):
    """One rank flips the switch, the others do not: all raise, and go on as before."""
    config = exact_config()
    layer = optimized(config, group)
    hidden_TH = exact_tokens(config, 3, seed=rank)
    before_TH = graphed_forward(layer, hidden_TH)
    message = error_of(lambda: layer.set_kill_switch(rank == 1))
    assert message.startswith("TransportError: rank 0 asks for")
    assert "rank 1 for" in message
    assert layer.transport.tier is Tier.P2P
    assert same_bits(graphed_forward(layer, hidden_TH), before_TH)


def check_flips(rank, group):
    """Flip the switch together, then at odds, in one world."""
    check_switching(rank, group)
    check_disagreement(rank, group)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_switch_decides_what_is_launched(world_size, tmp_path):
    """Only the tier in force is launched; A, B, A gives A's bits; ranks that differ all raise."""
    run_spmd(check_flips, world_size, tmp_path)


def test_forced_tiers_run_until_the_switch_is_flipped(tmp_path):
    """Each tier is what is launched, the switch leaves plain collectives, the answer stays."""
    run_spmd(check_exact_answers, 2, tmp_path)


def test_the_switch_works_without_a_group():
    """A single rank falls back to plain copies, and comes back."""
    config = exact_config()
    layer = optimized(config)
    hidden_TH = exact_tokens(config, 5)
    expected_TH = layer(hidden_TH)
    for disabled, label in ((True, "local"), (False, "p2p")):
        layer.set_kill_switch(disabled)
        output_TH, launched = collectives_of(lambda: graphed_forward(layer, hidden_TH))
        assert launched == launches_of(label)
        assert torch.equal(output_TH, expected_TH)


def test_the_switch_wins_over_a_forced_tier_and_gives_it_back():
    """A kill switch that raised would kill nothing."""
    layer = optimized(exact_config(), transport=Tier.NVLS)
    layer.set_kill_switch(True)
    assert layer.transport.tier is Tier.COLLECTIVE
    assert "nvls refused: rank 0: kill_switch" in layer.transport_report()
    layer.set_kill_switch(False)
    assert layer.transport.tier is Tier.NVLS
