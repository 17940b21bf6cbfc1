"""The layer under real CUDA graphs, judged on one GPU."""

from dataclasses import replace

import pytest
import torch

from twinmoe.optimized.graph import GraphRunner
from twinmoe.optimized.layer import MoELayer
from twinmoe.optimized.options import InferenceOptions
from twinmoe.optimized.router import InferenceTopKRouter
from twinmoe.oracle import RankObservation, Truth, judge
from twinmoe.oracle.contracts import graphed_contract
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights


def _config(dtype: torch.dtype) -> MoEConfig:
    return MoEConfig(
        hidden_size=256,
        moe_intermediate_size=192,
        num_experts=16,
        num_experts_per_tok=4,
        routed_scaling_factor=2.5,
        shared_expert_intermediate_size=64,
        dtype=dtype,
    )


def _hidden(config: MoEConfig, tokens: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, config.hidden_size, generator=generator).to(config.dtype)


@pytest.mark.parametrize("backend", ["grouped_mm", "triton"])
def test_replays_with_new_inputs_stay_inside_the_envelope(backend: str) -> None:
    """One captured graph answers batches of other sizes and contents within its contract."""
    config = _config(torch.bfloat16)
    weights = MoEWeights.random(config, seed=0)
    layer = MoELayer(config, weights.to("cuda"), options=InferenceOptions(experts_backend=backend))
    runner = GraphRunner(layer, buckets=(32,))
    contract = graphed_contract(config, backend, "p2p", torch.float32, "cuda")
    for seed, tokens in enumerate((17, 32, 1, 0, 5)):
        hidden_TH = _hidden(config, tokens, seed)
        output_TH = runner(hidden_TH.cuda())
        verdict = judge([RankObservation(output_TH)], Truth(config, weights, [hidden_TH]), contract)
        assert verdict.equivalent, str(verdict)


def test_a_replay_waits_for_no_host() -> None:
    """Replays run where any synchronisation of the host with the device is an error."""
    config = _config(torch.bfloat16)
    runner = GraphRunner(MoELayer(config, MoEWeights.random(config, 0).to("cuda")), buckets=(8,))
    hidden_TH = _hidden(config, 5, seed=1).cuda()
    expected_TH = runner(hidden_TH)
    torch.cuda.set_sync_debug_mode("error")
    try:
        output_TH = runner(hidden_TH)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(output_TH, expected_TH)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_a_row_is_routed_alike_in_any_batch(scoring: str) -> None:
    """Neither the batch's size nor a row's place in it changes one bit of its routing."""
    config = replace(_config(torch.bfloat16), scoring_func=scoring)
    router = InferenceTopKRouter(config, MoEWeights.random(config, 0).to("cuda"))
    hidden_TH = _hidden(config, 140, seed=4).cuda()
    whole = router(hidden_TH)
    for row in range(140):
        alone = router(hidden_TH[row : row + 1])
        assert torch.equal(whole.ids_TK[row : row + 1], alone.ids_TK)
        assert torch.equal(whole.weights_TK[row : row + 1], alone.weights_TK)
