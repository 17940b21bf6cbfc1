"""Every kernel compiles for Hopper, on a machine without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    """Return layer -> kernel -> matrix and copy instructions of its PTX."""
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'ci' / 'packages'}",
    }
    command = [sys.executable, "-m", "tests.optimized.experts.compile_kernels"]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_every_kernel_of_every_layer_compiles_for_sm_90(instructions):
    """Router, sort, both GEMMs and the sum are launched, and compile, in each layer."""
    always = {
        "router_logits",
        "router_select",
        "sort_slots",
        "expert_gate_up",
        "expert_down",
        "combine_slots",
    }
    assert instructions
    for layer, kernels in instructions.items():
        assert always <= kernels.keys(), layer
    assert "expert_activation" in instructions["decode"]


@pytest.mark.parametrize("kernel", ["expert_gate_up", "expert_down"])
def test_gemms_use_tensor_cores_and_pipelined_copies(instructions, kernel):
    """Small tiles use mma, full ones Hopper's wgmma; both prefetch with cp.async."""
    assert instructions["decode"][kernel] == ["cp.async.cg", "mma.sync"]
    assert instructions["prefill"][kernel] == ["cp.async.cg", "wgmma.mma_async"]


def test_fp32_layers_and_router_logits_stay_off_tf32_tensor_cores(instructions):
    """Both are declared to keep every bit of their fp32 operands."""
    for kernel in ("expert_gate_up", "expert_down"):
        assert instructions["fp32"][kernel] == ["cp.async.cg"]
    assert all("mma" not in " ".join(layer["router_logits"]) for layer in instructions.values())
