"""On a machine with a CUDA device, whatever is asked for a CPU runs as on one without.

There is none here, so one is pretended: torch says that it sees a device unless the environment
hides it, and fails in the child of a process that had looked, as CUDA does.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from twinmoe.optimized import launch, triton_runtime
from twinmoe.optimized.experts import backend_report
from twinmoe.optimized.inputs import check_weights
from twinmoe.oracle import doctor
from twinmoe.oracle.world import World
from twinmoe.reference.config import ConfigError, MoEConfig
from twinmoe.reference.weights import MoEWeights

CONFIG = MoEConfig(hidden_size=16, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)

_PRETENDED = """
import os
import torch

looked = []


def is_available():
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return False
    looked.append(os.getpid())
    return True


def is_current_stream_capturing():
    if looked and looked[0] != os.getpid():
        raise RuntimeError("CUDA error: initialization error")
    return False


torch.cuda.is_available = is_available
torch.cuda.is_current_stream_capturing = is_current_stream_capturing
torch.cuda.device_count = lambda: int(is_available())
"""


@pytest.mark.slow
def test_a_case_is_judged_on_the_cpu_of_a_gpu_machine(tmp_path: Path) -> None:
    """The driver finds a device and compiles; its workers interpret, and never ask CUDA."""
    (tmp_path / "sitecustomize.py").write_text(_PRETENDED)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)]),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    line = "T=3,H=16,I=16,E=4,k=2,dtype=bf16,mode=replayed"
    done = subprocess.run(
        [sys.executable, "-m", "twinmoe.oracle", "replay", line],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "equivalent under p2p" in done.stdout


def report_runtime(_context: Any) -> tuple[bool, str | None, str | None]:
    """Say how this worker's kernels run, and what its environment says of it."""
    names = ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")
    interpret, visible = (os.environ.get(name) for name in names)
    return triton_runtime.INTERPRETED, interpret, visible


def test_workers_for_a_cpu_interpret_and_see_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the driver's environment says, which stays as it is."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with World(1, "cpu") as world:
        assert world.run(report_runtime) == [(True, "1", "")]
    assert (os.environ["TRITON_INTERPRET"], os.environ["CUDA_VISIBLE_DEVICES"]) == ("0", "3")


def test_an_interpreted_process_never_asks_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be the fork of one that had found a device, where asking is an error."""

    def ask() -> bool:
        raise RuntimeError("CUDA error: initialization error")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", ask)
    assert not launch.capturing()


def test_a_driver_that_compiles_answers_for_its_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts a CPU, and knows which expert backends run there."""
    monkeypatch.setattr(triton_runtime, "INTERPRETED", False)
    doctor.require("cpu")
    assert backend_report(CONFIG, torch.device("cpu"))["triton"] is None


def test_a_layer_on_the_wrong_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process that compiles, weights on a CPU are refused, and what to do is said."""
    monkeypatch.setattr(triton_runtime, "INTERPRETED", False)
    with pytest.raises(ConfigError, match="start Python with TRITON_INTERPRET=1"):
        check_weights(MoEWeights.random(CONFIG, 0))


def test_ranks_of_torchrun_for_another_device_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can change processes that run already: how torchrun must be started is said."""
    monkeypatch.setattr(triton_runtime, "INTERPRETED", False)
    for name in ("RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match="start it with TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES="):
        doctor.require("cpu")


def test_versions_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Triton that does not interpret beside this NumPy is no verdict on a layer."""
    monkeypatch.setattr(doctor, "interpreter_trouble", lambda: "Triton 3.6.0 and NumPy 2.5.2 fail")
    with pytest.raises(ConfigError, match=r"device \('cpu'\) .* NumPy 2.5.2 fail; install"):
        doctor.require("cpu")
