"""Weighted sum of each row's local expert outputs, in fp32, rounded once.

Shapes: M rows, K experts per row, S = M * K slots, L local experts, H hidden_size.
"""

from torch import Tensor

from twinmoe.optimized.experts.slots import SlotPlan
from twinmoe.optimized.launch import launch
from twinmoe.optimized.numerics import round_to, to_fp32
from twinmoe.optimized.triton_runtime import INTERPRETED, tl, triton


@triton.jit
def combine_slots(
    y_ptr,
    ids_ptr,
    weights_ptr,
    positions_ptr,
    out_ptr,
    num_rows,
    first_expert,
    K: tl.constexpr,
    L: tl.constexpr,
    H: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out_MH = sum over k = 0 .. K-1, in this order, of weight * y at the slot's position."""
    row_M = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    h_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    row_exists = row_M < num_rows
    # One load each for all k, so that a row's latency is three loads and not three times K.
    k_K = tl.arange(0, BLOCK_K)
    slot_MK = row_M[:, None] * K + k_K[None, :]
    exists_MK = row_exists[:, None] & (k_K < K)[None, :]
    id_MK = tl.load(ids_ptr + slot_MK, mask=exists_MK, other=-1).to(tl.int32)
    expert_MK = id_MK - first_expert
    local_MK = (id_MK >= 0) & (expert_MK >= 0) & (expert_MK < L)
    position_MK = tl.load(positions_ptr + slot_MK, mask=local_MK, other=-1)
    if WEIGHTED:
        weight_MK = tl.load(weights_ptr + slot_MK, mask=local_MK, other=0.0)
    sum_MH = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    for k in tl.static_range(K):
        is_k_MK = (k_K == k)[None, :]
        position_M = tl.max(tl.where(is_k_MK, position_MK, -1), 1)
        local_M = position_M >= 0
        y_at = y_ptr + position_M.to(tl.int64)[:, None] * H + h_H[None, :]
        # Rows behind the last position hold anything, NaN included: never loaded, never scaled.
        y_MH = to_fp32(tl.load(y_at, mask=local_M[:, None] & (h_H < H)[None, :], other=0.0))
        if WEIGHTED:
            weight_M = tl.sum(tl.where(is_k_MK, weight_MK, 0.0), 1)
            y_MH = weight_M[:, None] * y_MH
        sum_MH += y_MH
    out_at = out_ptr + row_M[:, None] * H + h_H[None, :]
    out_mask = row_exists[:, None] & (h_H < H)[None, :]
    tl.store(out_at, round_to(sum_MH, out_ptr.dtype.element_ty), mask=out_mask)


def combine(
    y_SH: Tensor,
    ids_MK: Tensor,
    weights_MK: Tensor,
    out_MH: Tensor,
    *,
    plan: SlotPlan,
    first_expert: int,
    weighted: bool,
) -> None:
    """Write every element of ``out_MH``: rows without a local expert become exact zeros.

    y_SH: expert outputs at the plan's positions, any float dtype up to fp32.
    weighted: multiply by weights_MK (fp32); False when the weight went into the input.
    """
    num_rows, hidden = out_MH.shape
    if num_rows == 0:
        return
    block_m = min(triton.next_power_of_2(num_rows), 128) if INTERPRETED else 1
    block_h = min(triton.next_power_of_2(hidden), 1024)
    launch(
        combine_slots,
        (triton.cdiv(num_rows, block_m), triton.cdiv(hidden, block_h)),
        y_SH,
        ids_MK,
        weights_MK,
        plan.positions_S,
        out_MH,
        num_rows,
        first_expert,
        K=ids_MK.shape[1],
        L=plan.ends_L.shape[0],
        H=hidden,
        WEIGHTED=weighted,
        BLOCK_M=block_m,
        BLOCK_H=block_h,
        BLOCK_K=triton.next_power_of_2(ids_MK.shape[1]),
    )
