"""The reduce-scatter sums within its tier's declared rounding, no more, no less."""

import pytest
import torch

from tests.optimized.communication.workers import choose, gather_all, message_of, reduce_all
from tests.spmd import run_spmd
from twinmoe.optimized.communication import Tier

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

#: [N, H, dtype]: empty, odd (lanes of 2 and 4 bytes), 64- and 128-bit lanes.
CASES = [(0, 8, FP32)] + [
    (n, h, dtype) for n, h in [(1, 7), (3, 6), (2, 64)] for dtype in (FP32, BF16, FP16)
]


def _in_rank_order(terms):
    total = terms[0].float()
    for term in terms[1:]:
        total = total + term.float()
    return total


def _assert_within_rule(tier, dtype, result, terms):
    """Check ``result`` against ``terms`` [R, N, H] by the tier's wire rule."""
    assert result.dtype is FP32
    assert result.shape == terms.shape[1:]
    if tier is Tier.P2P:
        assert torch.equal(result.view(torch.int32), _in_rank_order(terms).view(torch.int32))
        return
    exact, magnitude = terms.double().sum(0), terms.double().abs().sum(0)
    hops = len(terms) - 1
    if tier is Tier.NVLS:
        # fp32 in any order, then one rounding to the wire dtype: rounding is monotone.
        slack = hops * 2.0**-24 * magnitude
        low, high = ((exact + sign * slack).float().to(dtype).double() for sign in (-1, 1))
    else:
        unit = {FP32: 2.0**-24, BF16: 2.0**-8, FP16: 2.0**-11}[dtype]
        # Half the smallest subnormal for each hop that rounds near zero.
        slack = hops * (unit * magnitude + torch.finfo(dtype).smallest_normal * unit)
        low, high = exact - slack, exact + slack
    assert bool(((result >= low) & (result <= high)).all()), (tier, dtype)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_sums_obey_the_tier_s_rule(world_size, tmp_path):
    """p2p is the fp32 sum in rank order bit for bit; the others lie inside their interval."""
    for results in run_spmd(reduce_all, world_size, tmp_path, CASES):
        for tier, dtype, result, terms in results:
            _assert_within_rule(tier, dtype, result, terms)


def _gather_and_reduce(rank, group):
    return gather_all(rank, group, [(3, 2, 33)]), reduce_all(rank, group, [(2, 24, BF16)])


def test_eight_ranks_gather_and_reduce(tmp_path):
    """More ranks than cores, on every tier."""
    for wrong, results in run_spmd(_gather_and_reduce, 8, tmp_path):
        assert wrong == []
        for tier, dtype, result, terms in results:
            _assert_within_rule(tier, dtype, result, terms)


def test_several_ctas_share_the_work(tmp_path):
    """Blocks are dealt to CTAs in a grid-stride loop, with a masked tail."""
    for results in run_spmd(reduce_all, 2, tmp_path, [(33, 125, FP32), (1, 4, BF16)], 3, 64):
        for tier, dtype, result, terms in results:
            _assert_within_rule(tier, dtype, result, terms)


def _cancelling(rank, group):
    sums = []
    for tier in (Tier.P2P, Tier.NVLS):
        transport = choose(group, tier)
        buffer = transport.partial_buffer(group.size(), 4, FP32)
        buffer.copy_(torch.tensor([1.0, 2.0**24, -(2.0**24)])[rank].expand_as(buffer))
        sums.append(transport.reduce_scatter(buffer)[0, 0].item())
    return sums


def test_the_emulated_switch_promises_no_order(tmp_path):
    """Ranks start their sums at themselves, so a sum that depends on the order shows it."""
    ordered, rotated = zip(*run_spmd(_cancelling, 3, tmp_path), strict=True)
    assert ordered == (0.0, 0.0, 0.0)
    assert rotated == (0.0, 1.0, 1.0)


def _special_values(rank, group):
    transport = choose(group, Tier.P2P)
    buffer = transport.partial_buffer(2 * group.size(), 4, BF16)
    inf, nan = float("inf"), float("nan")
    buffer.copy_(torch.tensor([[-0.0, inf, 1.0, 2.0], [inf, nan, -inf, -0.0]])[[rank]])
    return transport.reduce_scatter(buffer)


def test_infinities_and_signed_zeros_sum_as_fp32_does(tmp_path):
    """Inf - Inf is NaN, -0 + -0 would be -0, and nothing is flushed or clamped."""
    for result in run_spmd(_special_values, 2, tmp_path):
        assert result[0, 0] == float("inf")
        assert result[0, 1].isnan()
        assert result[0, 2] == -float("inf")
        assert result[0, 3] == 2.0


@pytest.mark.parametrize("tier", list(Tier))
def test_partial_results_of_another_kind_are_refused(tier):
    """A dtype that is not summed in fp32 raises, with the choices."""
    message = message_of(lambda: choose(None, tier).partial_buffer(4, 8, torch.float64))
    assert message.startswith("ValueError: dtype (torch.float64)")
    assert "torch.bfloat16" in message


def _uneven_rows(rank, group):
    return message_of(lambda: choose(group, Tier.P2P).partial_buffer(3, 8, FP32))


def test_rows_that_do_not_divide_are_refused(tmp_path):
    """Every rank gets as many rows back as it sent."""
    for message in run_spmd(_uneven_rows, 2, tmp_path):
        assert message.startswith(
            "ValueError: num_rows (3) must be divisible by the world size (2)"
        )


def test_partial_results_outside_the_buffer_are_refused():
    """Peers read at a fixed address: rows elsewhere would silently be old ones."""
    transport = choose(None, Tier.P2P)
    buffer = transport.partial_buffer(4, 8, FP32)
    for stranger in (torch.zeros(4, 8), buffer[1:], buffer[:, :4]):
        message = message_of(lambda t=stranger: transport.reduce_scatter(t))
        assert message.startswith("TransportError")
        assert "partial_buffer()" in message


def _narrow_lanes(rank, group):
    transport = choose(group, Tier.NVLS)
    buffer = transport.partial_buffer(group.size(), 3, BF16)
    buffer.copy_(torch.tensor([1.0, 2.0**-9])[rank].expand_as(buffer))
    result = transport.reduce_scatter(buffer)
    transport.all_gather([torch.zeros(1, 1, dtype=torch.int32)])
    return result, str(transport.report())


def test_shapes_too_narrow_for_multicast_go_peer_to_peer_and_say_so(tmp_path):
    """The call is reported as misaligned, and its sum is rounded as the switch would."""
    for result, report in run_spmd(_narrow_lanes, 2, tmp_path):
        assert torch.equal(result, torch.ones(1, 3))
        assert "reduce_scatter [2, 3] torch.bfloat16: misaligned" in report
        assert "all_gather [[1, 1]]: misaligned" in report
        assert "all_gather[p2p] x1, reduce_scatter[p2p] x1" in report
