"""What this machine can run, and why it cannot run the rest."""

import platform
from importlib import metadata

import torch
from rich.table import Table

from twinmoe.optimized.communication.eligibility import Tier
from twinmoe.optimized.communication.errors import TransportError
from twinmoe.optimized.communication.pool import Capacity
from twinmoe.optimized.communication.transport import select_transport
from twinmoe.optimized.experts import backend_report, choose_backend
from twinmoe.optimized.interpreter import trouble as interpreter_trouble
from twinmoe.optimized.options import InferenceOptions
from twinmoe.optimized.triton_runtime import INTERPRETED, environment_for, kernels_run_on
from twinmoe.oracle import torchrun
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults import patch_named, require_fault
from twinmoe.oracle.inputs import largest_batch
from twinmoe.oracle.relations import require_relation
from twinmoe.oracle.subject import BUCKETS
from twinmoe.reference.config import ConfigError, MoEConfig, dtype_name

_PACKAGES = ("torch", "triton", "numpy", "hypothesis", "flashinfer-python")


def require(device: str) -> None:
    """Raise ConfigError unless ``device`` is usable here."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device ('cuda') is not available: this torch sees no CUDA device; use --device cpu"
        )
    if torchrun.launched() and not kernels_run_on(torch.device(device)):
        needed = " ".join(f"{name}={value}" for name, value in environment_for(device).items())
        raise ConfigError(
            f"device ({device!r}) is out of reach of these ranks: torchrun started them with "
            f"another environment; start it with {needed}"
        )
    if device == "cpu" and (reason := interpreter_trouble()):
        raise ConfigError(
            f"device ('cpu') is not available: {reason}; install versions that fit, such as those "
            "of ci/constraints.txt, or use --device cuda"
        )


def require_case(case: Case, device: str) -> None:
    """Raise ConfigError, before a worker starts, unless ``device`` here can run ``case``."""
    require(device)
    InferenceOptions(experts_backend=case.backend).check(case.config)
    choose_backend(case.backend, case.config, torch.device(device), ranks=case.ep_size)
    if case.config.router_dtype is not torch.float32:
        raise ConfigError(
            f"router_dtype ({dtype_name(case.config.router_dtype)}) has no router kernel: they "
            "score in fp32; leave it out"
        )
    if largest_batch(case) > BUCKETS[-1]:
        raise ConfigError(
            f"T ({largest_batch(case)}) exceeds the largest graph bucket ({BUCKETS[-1]}): no graph "
            f"holds that many rows; use at most {BUCKETS[-1]} on each rank"
        )
    if len(case.batches) > case.last_batch:
        raise ConfigError(
            f"batches ({len(case.batches)} sizes) speaks of batches that no forward takes: the "
            f"last is batch {case.last_batch}; write a history with them, or drop the sizes"
        )
    require_fault(case.fault)
    require_relation(case)
    planted = patch_named(case.fault)
    if planted is not None and not planted.reaches(case):
        raise ConfigError(
            f"fault ({case.fault!r}) is out of this case's reach: {planted.what}; use "
            "a case that takes that way"
        )


def table(device: torch.device) -> Table:
    """Transports and expert backends: available or not, and the reason."""
    shown = Table(title=f"twinmoe on {device.type}", title_justify="left")
    for name in ("part", "name", "available", "why not, or how"):
        shown.add_column(name)
    for tier in Tier:
        shown.add_row("transport", *_probe(tier, device))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        config = MoEConfig(
            hidden_size=128,
            moe_intermediate_size=64,
            num_experts=8,
            num_experts_per_tok=2,
            dtype=dtype,
        )
        name = str(dtype).removeprefix("torch.")
        for backend, reason in backend_report(config, device).items():
            shown.add_row(f"experts, {name}", backend, "no" if reason else "yes", reason or "")
    return shown


def _probe(tier: Tier, device: torch.device) -> tuple[str, str, str]:
    """(name, available, remark): set the tier up for a single rank, and see."""
    try:
        transport = select_transport(
            None, device=device, capacity=Capacity(1024, 1024), tier=tier, pool="doctor"
        )
    except TransportError as error:
        return tier.value, "no", str(error)
    label = transport.report().label
    if tier is Tier.COLLECTIVE:
        return "nccl" if device.type == "cuda" else "gloo", "yes", "torch.distributed"
    return tier.value, "yes", "" if label == tier.value else label


def versions() -> str:
    """Python and package versions, in one line."""
    parts = [f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            parts.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            parts.append(f"{package} not installed")
    how = "interpreted" if INTERPRETED else "compiled"
    return ", ".join(parts) + f"; Triton kernels are {how}"


def not_verified(device: str) -> str:
    """What a check on ``device`` leaves open, in one honest line."""
    if device == "cpu":
        return (
            "not verified here: CUDA (kernels ran in Triton's interpreter, graphs as a stand-in) "
            "and NVLink multicast hardware (the nvls tier ran with its multicast leaf emulated)"
        )
    return "not verified here: NVLink multicast hardware (the nvls tier was not run)"
