"""The two grouped GEMMs of backend ``triton``.

Program (x, n) computes row tile x of the slot plan by column tile n.  The grid depends
on shapes alone; programs of tiles that the routing left empty return at once.

Shapes: M tile rows, N tile columns, D a step through the summed dimension, L local
experts, F rows of w13.
"""

from twinmoe.optimized.experts.activation import gate_times_up
from twinmoe.optimized.numerics import dot_operand, round_to, to_fp32
from twinmoe.optimized.triton_runtime import tl, triton


@triton.jit
def _inside(rows, columns, fits: tl.constexpr):
    """``rows`` and ``columns`` in bounds; sizes that fit their tiles need no second test."""
    if fits:
        return rows
    else:  # noqa: RET505
        return rows & columns


@triton.jit
def _weight_mask(
    d_D, column_N, depth: tl.constexpr, columns: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Which of a weight tile [D, N] exists; the compiler drops a mask that is always true."""
    if depth % BLOCK_K == 0 and columns % BLOCK_N == 0:
        return tl.full((BLOCK_K, BLOCK_N), True, tl.int1)
    else:  # noqa: RET505
        return (d_D < depth)[:, None] & (column_N < columns)[None, :]


@triton.jit
def expert_gate_up(
    x_ptr,
    weights_ptr,
    slots_ptr,
    ends_ptr,
    tile_expert_ptr,
    tile_first_ptr,
    w13_ptr,
    h_ptr,
    K: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    LIMIT: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741 - the shape legend's name
    L: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h_SI = round(act(gate) * up) for the gathered rows; weights_ptr None or on the input."""
    expert = tl.load(tile_expert_ptr + tl.program_id(0))
    if expert >= L:
        return
    F: tl.constexpr = 2 * I if GATED else I
    position_M = tl.load(tile_first_ptr + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    filled_M = position_M < tl.load(ends_ptr + expert)
    slot_M = tl.load(slots_ptr + position_M, mask=filled_M, other=0)
    x_row_M = x_ptr + (slot_M // K).to(tl.int64) * H
    if weights_ptr is not None:
        weight_M1 = tl.load(weights_ptr + slot_M, mask=filled_M, other=0.0)[:, None]
    column_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists_N = column_N < I
    w_row_N = w13_ptr + (expert.to(tl.int64) * F + column_N) * H
    gate_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up_MN = gate_MN
    for start in range(0, H, BLOCK_K):
        d_D = start + tl.arange(0, BLOCK_K)
        x_mask = _inside(filled_M[:, None], (d_D < H)[None, :], H % BLOCK_K == 0)
        x_MD = tl.load(x_row_M[:, None] + d_D[None, :], mask=x_mask, other=0)
        if weights_ptr is not None:
            x_MD = round_to(weight_M1 * to_fp32(x_MD), x_ptr.dtype.element_ty)
        x_MD = dot_operand(x_MD)
        w_mask = _weight_mask(d_D, column_N, H, I, BLOCK_K, BLOCK_N)
        w_at = w_row_N[None, :] + d_D[:, None]
        gate_DN = dot_operand(tl.load(w_at, mask=w_mask, other=0))
        gate_MN = tl.dot(x_MD, gate_DN, gate_MN, input_precision="ieee")
        if GATED:
            up_DN = dot_operand(tl.load(w_at + I * H, mask=w_mask, other=0))
            up_MN = tl.dot(x_MD, up_DN, up_MN, input_precision="ieee")
    h_MN = gate_times_up(gate_MN, up_MN, ACT, GATED, LIMIT)
    h_at = h_ptr + position_M.to(tl.int64)[:, None] * I + column_N[None, :]
    h_mask = filled_M[:, None] & exists_N[None, :]
    tl.store(h_at, round_to(h_MN, h_ptr.dtype.element_ty), mask=h_mask)


@triton.jit
def expert_down(
    h_ptr,
    ends_ptr,
    tile_expert_ptr,
    tile_first_ptr,
    w2_ptr,
    y_ptr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    L: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y_SH = h_SI @ w2[expert].T in fp32, at sorted positions."""
    expert = tl.load(tile_expert_ptr + tl.program_id(0))
    if expert >= L:
        return
    position_M = tl.load(tile_first_ptr + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    filled_M = position_M < tl.load(ends_ptr + expert)
    h_row_M = h_ptr + position_M.to(tl.int64) * I
    column_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists_N = column_N < H
    w_row_N = w2_ptr + (expert.to(tl.int64) * H + column_N) * I
    y_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, I, BLOCK_K):
        d_D = start + tl.arange(0, BLOCK_K)
        h_mask = _inside(filled_M[:, None], (d_D < I)[None, :], I % BLOCK_K == 0)
        h_MD = tl.load(h_row_M[:, None] + d_D[None, :], mask=h_mask, other=0)
        w_mask = _weight_mask(d_D, column_N, I, H, BLOCK_K, BLOCK_N)
        w_DN = tl.load(w_row_N[None, :] + d_D[:, None], mask=w_mask, other=0)
        y_MN = tl.dot(dot_operand(h_MD), dot_operand(w_DN), y_MN, input_precision="ieee")
    y_at = y_ptr + position_M.to(tl.int64)[:, None] * H + column_N[None, :]
    tl.store(y_at, y_MN, mask=filled_M[:, None] & exists_N[None, :])
