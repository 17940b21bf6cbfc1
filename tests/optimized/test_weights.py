"""Weights that kernels could not read as they are meant: refused before anything is built."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.optimized.exact import error_of, exact_config, exact_weights
from tests.spmd import run_spmd
from twinmoe.optimized import inputs
from twinmoe.optimized.layer import MoELayer
from twinmoe.optimized.options import InferenceOptions
from twinmoe.reference.placement import Placement

CONFIG = exact_config(
    use_correction_bias=True, shared_expert_intermediate_size=8, shared_expert_gate=True
)
WEIGHTS = exact_weights(CONFIG)


def strided(tensor):
    """The same values, every second element of a larger tensor."""
    spaced = tensor.new_zeros(*tensor.shape, 2)
    spaced[..., 0] = tensor
    return spaced[..., 0]


@pytest.mark.parametrize("name", WEIGHTS.tensors())
@pytest.mark.parametrize("backend", ["grouped_mm", "triton"])
def test_strides_are_refused_for_every_tensor_and_backend(name, backend):
    """Kernels read rows by address: values between others would be taken for theirs."""
    weights = replace(WEIGHTS, **{name: strided(WEIGHTS.tensors()[name])})
    options = InferenceOptions(experts_backend=backend)
    message = error_of(lambda: MoELayer(CONFIG, weights, options=options))
    assert message.startswith(f"ConfigError: {name} with strides")
    assert f"pass {name}.to('cpu').contiguous()" in message
    MoELayer(CONFIG, WEIGHTS, options=options)


@pytest.mark.parametrize("name", [name for name in WEIGHTS.tensors() if name != "router_EH"])
def test_all_weights_lie_on_one_device(name):
    """One tensor left elsewhere is named."""
    weights = replace(WEIGHTS, **{name: WEIGHTS.tensors()[name].to("meta")})
    assert f"{name} with strides" in error_of(lambda: MoELayer(CONFIG, weights))
    everywhere_else = WEIGHTS.to("meta")
    assert "have no kernels in this process" in error_of(lambda: MoELayer(CONFIG, everywhere_else))


def test_settings_of_cuda_that_change_the_answer_are_refused(monkeypatch):
    """Another current device than the layer's; fp32 matrix products of cut operands."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    fp32, first, second = (
        exact_config(dtype=torch.float32),
        *(torch.device("cuda", i) for i in (0, 1)),
    )
    inputs.check_cuda(fp32, first)
    inputs.check_cuda(fp32, torch.device("cpu"))
    assert "call torch.cuda.set_device(1)" in error_of(lambda: inputs.check_cuda(fp32, second))
    products = SimpleNamespace(fp32_precision="tf32")
    monkeypatch.setattr(torch.backends.cuda, "matmul", products)
    assert "set_float32_matmul_precision('highest')" in error_of(
        lambda: inputs.check_cuda(fp32, first)
    )
    inputs.check_cuda(CONFIG, first)  # 16-bit operands are not cut


def check_one_rank_without_weights(rank, group):
    """The last rank has none; return what is raised."""
    placement = Placement(CONFIG.num_experts, group.size())
    weights = None if rank == 1 else WEIGHTS.shard(placement, rank)
    return error_of(lambda: MoELayer(CONFIG, weights, group))


def test_a_rank_without_weights_is_named_to_its_peers(tmp_path):
    """No rank waits for one that has nothing to build a layer from."""
    told, own = run_spmd(check_one_rank_without_weights, 2, tmp_path, timeout=30)
    assert own.startswith("AttributeError")
    assert told.startswith("ConfigError: rank 1 could not build its layer (AttributeError")
