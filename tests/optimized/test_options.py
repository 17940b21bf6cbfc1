"""Settings and inputs that do not fit: refused with the value, the reason and the remedy."""

import pytest
import torch

from tests.optimized.exact import (
    error_of,
    exact_config,
    exact_tokens,
    exact_weights,
    graphed_forward,
    optimized,
    reference,
)
from tests.spmd import run_spmd
from twinmoe.optimized.communication.eligibility import Tier
from twinmoe.optimized.experts import BACKENDS
from twinmoe.optimized.graph import GraphRunner
from twinmoe.optimized.layer import MoELayer
from twinmoe.optimized.options import InferenceOptions
from twinmoe.reference.placement import Placement

REFUSED_OPTIONS = {
    "wire": (
        {"wire_dtype": torch.float16},
        "wire_dtype (torch.float16) must be torch.float32 or the model's dtype (torch.bfloat16)",
        "use one of the two",
    ),
    "a name": ({"transport": "p2p"}, "transport ('p2p') is no tier: use one of", "or None"),
    "half a row": (
        {"max_tokens_per_rank": 2.5},
        "max_tokens_per_rank (2.5) must be an integer from 1 to",
        "use the largest graph bucket",
    ),
    "true rows": (
        {"max_tokens_per_rank": True},
        "max_tokens_per_rank (True) must be an integer from 1 to",
        "use the largest graph bucket",
    ),
    "more rows than can be numbered": (
        {"max_tokens_per_rank": 2**27},
        "max_tokens_per_rank (134217728) must be an integer from 1 to 134217727",
        "use the largest graph bucket",
    ),
    "no rows": (
        {"max_tokens_per_rank": 0},
        "max_tokens_per_rank (0) must be an integer from 1 to",
        "use the largest graph bucket",
    ),
    "forced and killed": (
        {"transport": Tier.P2P, "disable_triton_nvls_kernels": True},
        "transport (p2p) cannot be forced while disable_triton_nvls_kernels is set",
        "drop one of the two",
    ),
    "backend": (
        {"experts_backend": "tirton"},
        "expert backend ('tirton') is unknown: there are grouped_mm, triton",
        "'auto'",
    ),
}

REFUSED_CONFIGS = {
    "fp64": (
        {"dtype": torch.float64},
        "dtype (torch.float64) has no inference kernels: they accumulate in fp32",
        "use bfloat16, float16 or float32",
    ),
    "router": (
        {"router_dtype": torch.float64},
        "router_dtype (torch.float64) must be torch.float32 on the inference path",
        "set router_dtype=torch.float32",
    ),
    "backend": (
        {"hidden_size": 12},
        "expert backend 'grouped_mm' cannot run this layer: hidden_size (12) must be a multiple",
        "use the triton backend",
    ),
}


def assert_says(message, *parts):
    """Require a ConfigError with all of ``parts``."""
    assert message.startswith("ConfigError: ")
    for part in parts:
        assert part in message


@pytest.mark.parametrize("name", REFUSED_OPTIONS)
def test_options_that_do_not_fit_are_refused(name):
    """Before anything is allocated."""
    options, *parts = REFUSED_OPTIONS[name]
    assert_says(error_of(lambda: optimized(exact_config(), **options)), *parts)


@pytest.mark.parametrize("name", REFUSED_CONFIGS)
def test_configs_without_kernels_are_refused(name):
    """What the reference may compute, the inference layer may not."""
    settings, *parts = REFUSED_CONFIGS[name]
    config = exact_config(**settings)
    assert_says(error_of(lambda: optimized(config, experts_backend="grouped_mm")), *parts)


def test_options_that_agree_with_themselves_are_taken():
    """The kill switch with the tier that it leaves; the model's dtype on the wire; one row."""
    config = exact_config(hidden_size=12)
    layer = optimized(
        config,
        transport=Tier.COLLECTIVE,
        disable_triton_nvls_kernels=True,
        wire_dtype=config.dtype,
        max_tokens_per_rank=1,
    )
    assert layer.transport.tier is Tier.COLLECTIVE
    assert layer.experts.backend_name == "triton", "what grouped_mm cannot run goes elsewhere"
    assert MoELayer(exact_config(), exact_weights(exact_config())).options == InferenceOptions()


def test_weights_that_do_not_fit_are_refused():
    """Another dtype, another shape, another rank's shard."""
    config = exact_config()
    other_dtype = exact_weights(exact_config(dtype=torch.float32))
    other_shape = exact_weights(exact_config(moe_intermediate_size=16))
    other_shard = exact_weights(config).shard(Placement(8, 2), 1)
    assert_says(error_of(lambda: MoELayer(config, other_dtype)), "router_EH", "torch.float32")
    assert_says(error_of(lambda: MoELayer(config, other_shape)), "w13_LFH is [8, 32, 16]")
    assert_says(error_of(lambda: MoELayer(config, other_shard)), "range(4, 8)", "range(0, 8)")


@pytest.mark.parametrize("mode", ["eager", "graphed"])
@pytest.mark.parametrize(
    ("hidden", "found"),
    [
        (torch.zeros(3, 15, dtype=torch.bfloat16), "(3, 15) and torch.bfloat16"),
        (torch.zeros(3, 16), "(3, 16) and torch.float32"),
        (torch.zeros(16, dtype=torch.bfloat16), "(16,) and torch.bfloat16"),
        (torch.zeros(1, 3, 16, dtype=torch.bfloat16), "(1, 3, 16) and torch.bfloat16"),
    ],
)
def test_hidden_states_that_do_not_fit_are_refused(mode, hidden, found):
    """On both paths: nothing is reshaped or cast silently."""
    layer = optimized(exact_config())
    if mode == "graphed":
        layer.set_inference_cuda_graphed_iteration()
    message = error_of(lambda: layer(hidden))
    assert message.startswith(f"ValueError: hidden states of shape {found} on cpu do not fit")
    assert message.endswith("pass [tokens, 16] in torch.bfloat16 on cpu")


def test_a_row_count_is_for_the_graphed_path():
    """The eager path takes exactly the valid rows, and says so."""
    config = exact_config()
    layer = optimized(config)
    hidden_TH = exact_tokens(config, 3)
    message = error_of(lambda: layer(hidden_TH, torch.tensor([3])))
    assert message.startswith("ValueError: num_valid is for the graphed path")
    assert "slice them, or call set_inference_cuda_graphed_iteration()" in message


@pytest.mark.parametrize(
    ("num_valid", "found"),
    [
        (torch.tensor([2.0]), "(1,) and torch.float32"),
        (torch.tensor([2, 2]), "(2,) and torch.int64"),
        (torch.tensor([2], dtype=torch.int16), "(1,) and torch.int16"),
    ],
)
def test_a_row_count_is_one_integer(num_valid, found):
    """A kernel would read the bits of anything else as a count."""
    config = exact_config()
    layer = optimized(config)
    layer.set_inference_cuda_graphed_iteration()
    message = error_of(lambda: layer(exact_tokens(config, 3), num_valid))
    assert message.startswith(f"ValueError: num_valid of shape {found} on cpu is no row count")
    assert message.endswith("pass one int32 or int64 on cpu")


@pytest.mark.parametrize("mode", ["eager", "graphed"])
def test_another_device_is_refused(mode):
    """Kernels address one device: tensors elsewhere are named, not read."""
    config = exact_config()
    layer, runner = optimized(config), GraphRunner(optimized(config), (4,))
    elsewhere = exact_tokens(config, 3).to("meta")
    if mode == "graphed":
        layer.set_inference_cuda_graphed_iteration()
        message = error_of(lambda: layer(exact_tokens(config, 3), torch.tensor(2, device="meta")))
        assert "on meta is no row count" in message
    for call in (layer, runner):
        assert "on meta do not fit" in error_of(lambda call=call: call(elsewhere))


def differing(rank, group, build):
    """Build a layer of which the last rank's differs; return what is raised."""
    return error_of(lambda: build(rank == group.size() - 1))


def check_ranks_that_differ(rank, group):
    """Let the last rank ask for something else, or fail alone: every rank hears of it."""
    config, last = exact_config(), group.size() - 1

    def tier(odd):
        optimized(config, group, transport=Tier.P2P if odd else None)

    def switch(odd):
        optimized(config, group, disable_triton_nvls_kernels=odd)

    def backend(odd):
        optimized(config, group, experts_backend="triton" if odd else "auto")

    def scale(odd):
        optimized(exact_config(routed_scaling_factor=2.0 if odd else 1.0), group)

    for build in (tier, switch, backend, scale):
        message = differing(rank, group, build)
        assert_says(message, "asks for", "pass the same on all ranks")
        assert (f"rank {last} asks" in message) is (rank != last)

    with pytest.MonkeyPatch.context() as machine:
        if rank == last:  # as where a package is missing on one host
            machine.setattr(BACKENDS["grouped_mm"], "unsupported", lambda *_: "not installed")
        message = error_of(lambda: optimized(config, group))
    assert_says(message, "computes experts with", "name one in experts_backend")
    assert (f"rank {last} computes experts with triton" in message) is (rank != last)

    def misfit(odd):
        optimized(config, group, wire_dtype=torch.float16 if odd else torch.float32)

    message = differing(rank, group, misfit)
    reason = "wire_dtype (torch.float16) must be torch.float32 or the model's dtype"
    if rank == last:
        assert_says(message, reason)
    else:
        assert_says(message, f"rank {last} could not build its layer (ConfigError: {reason}")

    hidden_TH = exact_tokens(config, 4, seed=rank)
    output_TH = graphed_forward(optimized(config, group), hidden_TH)
    assert torch.equal(output_TH, reference(config, group)(hidden_TH))


def test_ranks_that_differ_all_raise(tmp_path):
    """No rank waits for one that has given up or wants another layer; then all can go on."""
    run_spmd(check_ranks_that_differ, 2, tmp_path, timeout=30)
