"""The two kernels of the inference router: logits, then everything after them.

Shapes: T tokens, H hidden_size, E experts, K experts per token, G groups,
M members of a group, P partial sums of a logit.
"""

from twinmoe.optimized.numerics import (
    exp_nonpositive,
    sigmoid,
    softplus,
    to_fp32,
)
from twinmoe.optimized.triton_runtime import INTERPRETED, tl, triton

_INTERPRETED = tl.constexpr(INTERPRETED)

#: The upper halves of the keys of NaN and of -inf, next below that of the lowest finite value.
_NAN_RANK = tl.constexpr(-(2**31) + 0x7FFFFF)
_DISABLED_RANK = tl.constexpr(-(2**31) + 0x7FFFFE)

#: Key of what cannot be chosen: below the key of every value, -inf included.
_UNAVAILABLE = tl.constexpr(-(2**63))


@triton.jit
def router_logits(
    x_ptr,
    w_ptr,
    num_valid_ptr,
    partials_ptr,
    T,
    H: tl.constexpr,
    E: tl.constexpr,
    HAS_NUM_VALID: tl.constexpr,
    H_PER_PART: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """partials_PTE[p] = x_TH @ w_EH.T over the p-th stretch of H, in fp32."""
    num_valid = _num_valid(num_valid_ptr, T, HAS_NUM_VALID)
    first_row = tl.program_id(0) * BLOCK_T
    if first_row >= num_valid:
        return
    part = tl.program_id(2)
    row_T = (first_row + tl.arange(0, BLOCK_T)).to(tl.int64)
    expert_E = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    valid_T = row_T < num_valid
    exists_E = expert_E < E
    # A matrix unit would truncate its sums, and few rows leave it idle: multiply lane by lane,
    # and add the lanes up once.  The interpreter has no lanes and takes the matrix product.
    product_TEH = tl.zeros((BLOCK_T, BLOCK_E, 1 if _INTERPRETED else BLOCK_H), tl.float32)
    for start in tl.static_range(0, H_PER_PART, BLOCK_H):
        h_H = part * H_PER_PART + start + tl.arange(0, BLOCK_H)
        x_mask = valid_T[:, None] & (h_H < H)[None, :]
        x_TH = to_fp32(tl.load(x_ptr + row_T[:, None] * H + h_H[None, :], mask=x_mask, other=0))
        w_at = w_ptr + expert_E[:, None] * H + h_H[None, :]
        w_mask = exists_E[:, None] & (h_H < H)[None, :]
        if _INTERPRETED:
            w_HE = to_fp32(tl.load(tl.trans(w_at), mask=tl.trans(w_mask), other=0))
            product_TEH += tl.dot(x_TH, w_HE, input_precision="ieee")[:, :, None]
        else:
            w_EH = to_fp32(tl.load(w_at, mask=w_mask, other=0))
            product_TEH += x_TH[:, None, :] * w_EH[None, :, :]
    sum_TE = tl.sum(product_TEH, 2)
    out = partials_ptr + (part.to(tl.int64) * T + row_T[:, None]) * E + expert_E[None, :]
    tl.store(out, sum_TE, mask=valid_T[:, None] & exists_E[None, :])


@triton.jit
def router_select(
    partials_ptr,
    bias_ptr,
    num_valid_ptr,
    ids_ptr,
    weights_ptr,
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    SCORING: tl.constexpr,
    GROUP_SCORE: tl.constexpr,
    NORMALISE: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NUM_VALID: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Score, select and weigh BLOCK_T rows; experts lie as [group, member] in registers."""
    MEMBERS: tl.constexpr = E // N_GROUP
    num_valid = _num_valid(num_valid_ptr, T, HAS_NUM_VALID)
    row_T = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    valid_T = row_T < num_valid
    group = tl.arange(0, BLOCK_G)[None, :, None]
    member = tl.arange(0, BLOCK_M)[None, None, :]
    expert = group * MEMBERS + member
    exists = (group < N_GROUP) & (member < MEMBERS)
    available = valid_T[:, None, None] & exists

    part = tl.arange(0, BLOCK_P)[:, None, None, None]
    at = partials_ptr + (part * T + row_T[None, :, None, None]) * E + expert[None, :, :, :]
    present = (part < PARTS) & available[None, :, :, :]
    logits_TGM = tl.sum(tl.load(at, mask=present, other=0.0), 0)
    score_TGM = _score(logits_TGM, exists, SCORING)
    selection_TGM = score_TGM
    if HAS_BIAS:
        selection_TGM += tl.load(bias_ptr + expert, mask=exists, other=0.0)
    if TOPK_GROUP < N_GROUP:
        kept_TG = _kept_groups(
            selection_TGM, exists, N_GROUP, TOPK_GROUP, MEMBERS, GROUP_SCORE, BLOCK_G, BLOCK_M
        )
        available = available & kept_TG[:, :, None]

    key_TGM = tl.where(available, _rank_key(selection_TGM, E - 1 - expert), _UNAVAILABLE)
    key_TE = tl.reshape(key_TGM, (BLOCK_T, BLOCK_G * BLOCK_M))
    score_TE = tl.reshape(score_TGM, (BLOCK_T, BLOCK_G * BLOCK_M))
    column = tl.arange(0, BLOCK_K)[None, :]
    ids_TK = tl.full((BLOCK_T, BLOCK_K), -1, tl.int32)
    weights_TK = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for k in range(K):
        best_T = tl.max(key_TE, 1)
        chosen_TE = key_TE == best_T[:, None]
        weight_T = tl.sum(tl.where(chosen_TE, score_TE, 0.0), 1)
        id_T = E - 1 - (best_T & 0xFFFFFFFF).to(tl.int32)
        ids_TK = tl.where(column == k, id_T[:, None], ids_TK)
        weights_TK = tl.where(column == k, weight_T[:, None], weights_TK)
        key_TE = tl.where(chosen_TE, _UNAVAILABLE, key_TE)

    if NORMALISE:
        weights_TK = tl.div_rn(weights_TK, tl.sum(weights_TK, 1)[:, None] + 1e-20)
    weights_TK = weights_TK * SCALE
    out = row_T[:, None] * K + column
    out_mask = (row_T < T)[:, None] & (column < K)
    tl.store(ids_ptr + out, tl.where(valid_T[:, None], ids_TK, -1), mask=out_mask)
    tl.store(weights_ptr + out, tl.where(valid_T[:, None], weights_TK, 0.0), mask=out_mask)


@triton.jit
def _num_valid(num_valid_ptr, T, HAS_NUM_VALID: tl.constexpr):
    if HAS_NUM_VALID:
        return tl.minimum(tl.load(num_valid_ptr).to(tl.int32), T)
    else:  # noqa: RET505
        return T


@triton.jit
def _score(logits_TGM, exists, SCORING: tl.constexpr):
    if SCORING == "softmax":
        logits_TGM = tl.where(exists, logits_TGM, float("-inf"))
        largest_T = tl.max(tl.max(logits_TGM, 2), 1)
        e_TGM = exp_nonpositive(logits_TGM - largest_T[:, None, None])
        return tl.div_rn(e_TGM, tl.sum(tl.sum(e_TGM, 2), 1)[:, None, None])
    elif SCORING == "sigmoid":  # noqa: RET505
        return sigmoid(logits_TGM)
    else:
        return tl.sqrt_rn(softplus(logits_TGM))


@triton.jit
def _rank_key(value, preference):
    """int64 in the total order of reference.router.TopKRouter: value, then preference >= 0.

    -0.0 would rank below 0.0, but no score is -0.0, nor is a sum of unlike summands.
    """
    bits = value.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(value == float("-inf"), _DISABLED_RANK, ordered)
    ordered = tl.where(value == value, ordered, _NAN_RANK)  # noqa: PLR0124 - false for NaN only
    return (ordered.to(tl.int64) << 32) | preference.to(tl.int64)


@triton.jit
def _kept_groups(
    selection_TGM,
    exists,
    N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    GROUP_SCORE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Which groups stay: the TOPK_GROUP best, by the same order on IEEE sums of their best."""
    member = tl.arange(0, BLOCK_M)[None, None, :]
    key_TGM = tl.where(exists, _rank_key(selection_TGM, MEMBERS - 1 - member), _UNAVAILABLE)
    score_TG = tl.zeros((selection_TGM.shape[0], BLOCK_G), tl.float32)
    for _ in tl.static_range(2 if GROUP_SCORE == "top2_sum" and MEMBERS > 1 else 1):
        best_TGM = (key_TGM == tl.max(key_TGM, 2)[:, :, None]) & exists
        score_TG += tl.sum(tl.where(best_TGM, selection_TGM, 0.0), 2)
        key_TGM = tl.where(best_TGM, _UNAVAILABLE, key_TGM)
    group = tl.arange(0, BLOCK_G)[None, :]
    key_TG = tl.where(group < N_GROUP, _rank_key(score_TG, N_GROUP - 1 - group), _UNAVAILABLE)
    kept_TG = group < 0
    for _ in range(TOPK_GROUP):
        best_TG = key_TG == tl.max(key_TG, 1)[:, None]
        kept_TG = kept_TG | best_TG
        key_TG = tl.where(best_TG, _UNAVAILABLE, key_TG)
    return kept_TG
