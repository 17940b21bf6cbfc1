"""Dispatch and layer over several ranks, with ragged and empty ranks.

Legend: T tokens, H hidden_size, K experts per token, S slots.
"""

import pytest
import torch
import torch.distributed as dist

from tests.reference.inputs import (
    EVERYTHING,
    PLAIN,
    assert_close_per_token,
    fp64_config,
    tokens,
)
from tests.spmd import run_spmd
from twinmoe.reference.config import DTYPES, ConfigError
from twinmoe.reference.dense import dense_moe
from twinmoe.reference.dispatch import MoEAlltoAllTokenDispatcher
from twinmoe.reference.layer import MoELayer
from twinmoe.reference.placement import Placement
from twinmoe.reference.weights import MoEWeights

#: Tokens of each rank, for worlds of 2 and 4.
TOKENS = {
    2: [(5, 5), (0, 7), (0, 0), (12, 1)],
    4: [(0, 9, 1, 0), (0, 0, 0, 0), (1, 2, 3, 4)],
}
EXPERTS = 8
K = 3


def _ids(kind: str, count: int, seed: int) -> torch.Tensor:
    """Draw ids [T, K]: anywhere, all on one expert's rank, or partly -1 (no expert)."""
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.rand(count, EXPERTS, generator=generator).argsort(dim=1)[:, :K]
    if kind == "one rank":
        ids_TK = torch.full_like(ids_TK, EXPERTS - 1)
    if kind == "partly absent":
        ids_TK = ids_TK.where(torch.rand(count, K, generator=generator) < 0.6, -1)
    return ids_TK


def _check_rows(dispatcher, rank, rows_TKH, x, ids_TK):
    """Send rows out, let each expert add 100 times its id, and require them back in place."""
    owned = dispatcher.placement.experts_of(rank)
    x_SH, local_expert_S, metadata = dispatcher.token_dispatch(x, ids_TK)
    assert local_expert_S.shape == x_SH.shape[:1]
    assert ((local_expert_S >= 0) & (local_expert_S < len(owned))).all()
    y_SH = x_SH + (100 * (local_expert_S + owned.start)).to(x_SH.dtype).unsqueeze(1)
    y_TKH = dispatcher.token_combine(y_SH, metadata)
    expected_TKH = rows_TKH + (100 * ids_TK).to(x.dtype).unsqueeze(2)
    assert y_TKH.dtype == x.dtype
    assert torch.equal(y_TKH, expected_TKH.masked_fill((ids_TK < 0).unsqueeze(2), 0))
    return x_SH


def _dispatch_on(rank, group):
    """Run every pattern of tokens, ids and row kinds on this rank."""
    ranks = group.size()
    dispatcher = MoEAlltoAllTokenDispatcher(Placement(EXPERTS, ranks), group)
    for counts in TOKENS[ranks]:
        for kind in ("anywhere", "one rank", "partly absent"):
            ids_TK = _ids(kind, counts[rank], seed=rank)
            # Small integers are exact in every dtype, and name the rank and the token.
            x_TH = torch.arange(counts[rank] * 4).view(-1, 4) + 50.0 * rank
            per_pair_TKH = x_TH.unsqueeze(1) + 0.25 * torch.arange(K).view(1, K, 1)
            shared_TKH = x_TH.unsqueeze(1).expand(-1, K, -1)
            _check_rows(dispatcher, rank, shared_TKH, x_TH, ids_TK)
            received = _check_rows(dispatcher, rank, per_pair_TKH, per_pair_TKH, ids_TK)
            source_S = received[:, 0] // 50
            assert (source_S.diff() >= 0).all(), "rows arrive by source rank"
            total = torch.tensor([len(received), -int((ids_TK >= 0).sum())])
            dist.all_reduce(total, group=group)
            assert total.sum() == 0, "no row is dropped or doubled"
    for dtype in DTYPES.values():
        x_TH = (torch.arange(2 * rank + 2) % 16).view(-1, 1).to(dtype)
        ids_TK = _ids("anywhere", len(x_TH), seed=rank) % 2
        _check_rows(dispatcher, rank, x_TH.unsqueeze(1).expand(-1, K, -1), x_TH, ids_TK)


def _gradients(forward, x_TH, weights, cotangent_TH):
    """Return the output and the gradients of the tokens and of each learned tensor."""
    learned = {n: t for n, t in weights.tensors().items() if n != "correction_bias_E"}
    leaves = {"x_TH": x_TH, **learned}
    for leaf in leaves.values():
        leaf.requires_grad_()
    out_TH = forward(weights, x_TH)
    found = torch.autograd.grad(out_TH, list(leaves.values()), cotangent_TH)
    return out_TH.detach(), dict(zip(leaves, found, strict=True))


def _layer_on(rank, group):
    """Compare every pattern of tokens with both kinds of layer."""
    for counts in TOKENS[group.size()]:
        for settings in (EVERYTHING, PLAIN):
            _compare_with_dense(rank, group, settings, counts)


def _compare_with_dense(rank, group, settings, counts):
    """Compare output and gradients of this rank with the dense formulation of all tokens."""
    config = fp64_config(**settings)
    placement = Placement(config.num_experts, group.size())
    x = tokens(config, sum(counts), seed=1).split(counts)
    cotangents = tokens(config, sum(counts), seed=2).split(counts)
    dense_out, dense = _gradients(
        lambda w, x_TH: dense_moe(config, w, x_TH),
        torch.cat(x),
        MoEWeights.random(config, 3),
        torch.cat(cotangents),
    )
    mine = MoEWeights.random(config, 3, experts=placement.experts_of(rank))
    out_TH, ours = _gradients(
        lambda w, x_TH: MoELayer(config, w, group)(x_TH),
        x[rank].clone(),
        mine,
        cotangents[rank],
    )
    assert_close_per_token(out_TH, dense_out.split(counts)[rank], relative=1e-12)
    for name, gradient in ours.items():
        expected = dense[name]
        if name == "x_TH":
            expected = expected.split(counts)[rank]
        elif name in ("w13_LFH", "w2_LHI"):
            expected = expected[list(placement.experts_of(rank))]
        else:
            # Replicated tensors: every rank contributes its own tokens' part.
            dist.all_reduce(gradient, group=group)
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12 * scale, msg=name)


@pytest.mark.parametrize("ranks", TOKENS)
def test_every_row_reaches_its_expert_and_returns(ranks, tmp_path):
    """Ragged, empty and one-sided ranks: each row visits exactly its expert, in every dtype."""
    run_spmd(_dispatch_on, ranks, tmp_path)


@pytest.mark.parametrize("ranks", TOKENS)
def test_parallel_layer_equals_dense(ranks, tmp_path):
    """Outputs and all gradients over 2 and 4 ranks are those of one process without dispatch."""
    run_spmd(_layer_on, ranks, tmp_path)


def test_a_single_rank_needs_no_process_group():
    """Without a group the dispatcher sorts by expert owner alone, with the same promises."""
    assert not dist.is_initialized()
    dispatcher = MoEAlltoAllTokenDispatcher(Placement(EXPERTS, 1), None)
    x_TH = torch.arange(20.0).view(5, 4)
    rows_TKH = x_TH.unsqueeze(1).expand(-1, K, -1)
    for kind in ("anywhere", "one rank", "partly absent"):
        _check_rows(dispatcher, 0, rows_TKH, x_TH, _ids(kind, 5, seed=0))


def test_rows_without_an_expert_are_not_read():
    """What lies in a row with id -1 travels nowhere and comes back as zero."""
    dispatcher = MoEAlltoAllTokenDispatcher(Placement(EXPERTS, 1), None)
    ids_TK = torch.tensor([[0, 1], [-1, -1]])
    x_SH, _, metadata = dispatcher.token_dispatch(torch.tensor([[1.0], [torch.nan]]), ids_TK)
    assert x_SH.tolist() == [[1.0], [1.0]]
    assert dispatcher.token_combine(x_SH, metadata).flatten().tolist() == [1.0, 1.0, 0.0, 0.0]


def test_group_and_placement_have_to_agree():
    """A placement for two ranks cannot be used by one."""
    with pytest.raises(ConfigError, match=r"ep_size \(2\).*group's size \(1\)"):
        MoEAlltoAllTokenDispatcher(Placement(EXPERTS, 2), None)
