"""The contracts of this project's own paths, all in one place, to be reviewed together.

A change here is a change of what the judge accepts: it needs a reason in its commit.
"""

import itertools
from dataclasses import replace

import torch

from twinmoe.optimized.experts import BACKENDS
from twinmoe.oracle.contract import RoundingContract, Wire, storage_contract
from twinmoe.oracle.rounding import CPU_BF16, FORMATS, FP32, HOPPER_FP16
from twinmoe.reference.config import MoEConfig

#: How each tier sums the ranks' shares.  The all-gather is a copy on every tier.
WIRE_OF_TIER = {
    "p2p": Wire.RANK_ORDER,
    "nvls": Wire.ANY_ORDER,
    "gloo": Wire.PER_HOP,
    "nccl": Wire.PER_HOP,
}

#: What hardware makes of fp32 accumulation, by type of device and dtype of the operands.
_ACCUMULATORS = {("cuda", torch.float16): HOPPER_FP16, ("cpu", torch.bfloat16): CPU_BF16}


def reference_contract(config: MoEConfig) -> RoundingContract:
    """Every tensor stored in the model's dtype, the combine in fp32, one final rounding."""
    return storage_contract("reference", config.dtype, config.router_dtype)


def eager_contract(config: MoEConfig, backend: str, device_type: str = "cpu") -> RoundingContract:
    """AlltoAll dispatch: the reference's sums, the expert backend's roundings."""
    stored = storage_contract(f"alltoall + {backend}", config.dtype)
    return _on(device_type, config, backend, _with_experts(stored, backend))


def graphed_contract(
    config: MoEConfig,
    backend: str,
    tier: str,
    wire_dtype: torch.dtype,
    device_type: str = "cpu",
) -> RoundingContract:
    """All-gather and reduce-scatter: each rank's share is stored in ``wire_dtype``.

    The p2p kernel keeps its fp32 sum.  ``multimem.ld_reduce`` returns its sum in the
    operands' type even where it accumulates in fp32 (PTX ISA), and so do NCCL and gloo.
    """
    payload = FORMATS[wire_dtype]
    stored = storage_contract(f"{tier} + {backend}", config.dtype)
    wired = replace(
        stored,
        partial=payload,
        wire=WIRE_OF_TIER[tier],
        reduced=None if tier == "p2p" else payload,
    )
    return _on(device_type, config, backend, _with_experts(wired, backend))


def on_device(contract: RoundingContract, dtype: torch.dtype, device_type: str) -> RoundingContract:
    """``contract`` with what fp32 accumulation is in GEMMs over ``dtype`` there.

    That is the hardware's affair, not the layer's.  Another accumulator stays.
    """
    if contract.accumulator != FP32:
        return contract
    return replace(contract, accumulator=_ACCUMULATORS.get((device_type, dtype), FP32))


def own_contracts(dtype: torch.dtype, device_type: str = "cpu") -> list[RoundingContract]:
    """Every contract of this project's paths for one model dtype, the reference's first."""
    config = MoEConfig(
        hidden_size=64,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        dtype=dtype,
    )
    contracts = [reference_contract(config)]
    contracts += [eager_contract(config, backend, device_type) for backend in BACKENDS]
    for backend, tier in itertools.product(BACKENDS, WIRE_OF_TIER):
        for wire_dtype in dict.fromkeys((torch.float32, dtype)):
            contract = graphed_contract(config, backend, tier, wire_dtype, device_type)
            wire = FORMATS[wire_dtype].name
            contracts.append(replace(contract, name=f"{contract.name}, {wire} wire"))
    return contracts


def _on(
    device_type: str, config: MoEConfig, backend: str, contract: RoundingContract
) -> RoundingContract:
    """``contract`` with the accumulator that GEMMs have on this type of device.

    On a CPU grouped_mm multiplies bf16 as it is stored, the triton backend in fp32.
    """
    in_fp32 = device_type == "cpu" and backend != "grouped_mm"
    return contract if in_fp32 else on_device(contract, config.dtype, device_type)


def _with_experts(contract: RoundingContract, backend: str) -> RoundingContract:
    """``contract`` with the roundings of an expert backend.

    grouped_mm stores each GEMM's result in the model's dtype, as separate kernels must.
    triton keeps gate and up in registers and writes expert outputs in fp32.  flashinfer
    stores each GEMM's result, and writes the sum over k in the model's dtype too, whatever
    the wire then carries.  All run the shared expert as the reference does.
    """
    if backend == "grouped_mm":
        return contract
    if backend == "triton":
        return replace(contract, gate_up=None, expert_output=None)
    if backend == "flashinfer":
        return contract if contract.partial is None else replace(contract, partial=contract.output)
    raise ValueError(f"backend ({backend!r}) has no contract: add one to {__name__}")
