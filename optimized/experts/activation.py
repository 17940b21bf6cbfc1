"""h = act(gate) * up in fp32: a leaf for fused kernels, and a kernel of its own.

Infinities and NaN travel as they do in PyTorch's functions of the same names.

Shapes: S rows, I moe_intermediate_size, F = 2I gate and up columns (I without a gate).
"""

from torch import Tensor

from twinmoe.optimized.launch import launch
from twinmoe.optimized.numerics import round_to, sigmoid, to_fp32
from twinmoe.optimized.triton_runtime import INTERPRETED, tl, triton
from twinmoe.reference.config import MoEConfig

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)


@triton.jit
def gate_times_up(gate, up, ACT: tl.constexpr, GATED: tl.constexpr, LIMIT: tl.constexpr):
    """act(gate) * up in fp32, both clamped by LIMIT first; act(gate) without a gate."""
    if LIMIT is not None:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    if ACT == "silu":
        h = gate * sigmoid(gate)
    elif ACT == "gelu":
        h = 0.5 * gate * (1.0 + tl.erf(gate * _SQRT_HALF))
    elif ACT == "gelu_pytorch_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2u), without the cancellation at negative u.
        h = gate * sigmoid((gate + 0.044715 * gate * gate * gate) * _SQRT_8_OVER_PI)
    else:
        h = tl.where(gate < 0.0, 0.0, gate)
        if ACT == "relu2":
            h = h * h
    if GATED:
        h = h * up
    return h


@triton.jit
def _stored(value, h_ptr):
    """``value`` as fp32, after one rounding to the dtype of h if it has none behind it yet."""
    if value.dtype == h_ptr.dtype.element_ty:
        return to_fp32(value)
    else:  # noqa: RET505
        return to_fp32(round_to(value, h_ptr.dtype.element_ty))


@triton.jit
def expert_activation(
    gate_up_ptr,
    h_ptr,
    num_rows_ptr,
    I: tl.constexpr,  # noqa: E741 - the shape legend's name
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """h_SI = round(act(gate) * up) from gate_up_SF = [gate | up], for the first rows only."""
    num_rows = tl.load(num_rows_ptr)
    if tl.program_id(0) * BLOCK_S >= num_rows:
        return
    row_S = (tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)[:, None]
    i_I = (tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I))[None, :]
    mask = (row_S < num_rows) & (i_I < I)
    F: tl.constexpr = 2 * I if GATED else I
    gate = _stored(tl.load(gate_up_ptr + row_S * F + i_I, mask=mask, other=0), h_ptr)
    up = gate
    if GATED:
        up = _stored(tl.load(gate_up_ptr + row_S * F + I + i_I, mask=mask, other=0), h_ptr)
    h = gate_times_up(gate, up, ACT, GATED, LIMIT)
    tl.store(h_ptr + row_S * I + i_I, round_to(h, h_ptr.dtype.element_ty), mask=mask)


def activate(config: MoEConfig, gate_up_SF: Tensor, num_rows: Tensor) -> Tensor:
    """Return h_SI in the model dtype, computed in fp32 and rounded once.

    gate_up_SF: in the model dtype, or in fp32 and then rounded to it first.
    num_rows: one int32 on the device; rows from there on are neither read nor written.
    """
    num_slots, intermediate = gate_up_SF.shape[0], config.moe_intermediate_size
    h_SI = gate_up_SF.new_empty(num_slots, intermediate, dtype=config.dtype)
    if num_slots:
        block_s = min(triton.next_power_of_2(num_slots), 64) if INTERPRETED else 1
        block_i = min(triton.next_power_of_2(intermediate), 1024)
        launch(
            expert_activation,
            (triton.cdiv(num_slots, block_s), triton.cdiv(intermediate, block_i)),
            gate_up_SF,
            h_SI,
            num_rows,
            I=intermediate,
            ACT=config.hidden_act,
            GATED=config.gated,
            LIMIT=config.swiglu_limit,
            BLOCK_S=block_s,
            BLOCK_I=block_i,
        )
    return h_SI
