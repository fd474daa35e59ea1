"""Attention that re-weights columns by group, without a T x T matrix: equations 9 to 12 and 14 of the paper.

Refocused attention, for the row of a patch, with keys in T (target), S (distraction) and R (the rest, which includes
the prefix unless it is in T):

    out = o_R + (1 - beta) o_S + (1 + beta m_S / m_T) o_T,   m_G the softmax mass of a group and o_G its sum of p v

One launch orders the patches of each image, T first and S last, and the next sweeps them as keys in two runs of an
online softmax. Only T's factor depends on the whole row, so the second run adds R and S to one accumulator: two
accumulators are enough. Columns are weighted only in tiles that have some of S, and masked only in the last tile of a
run. The runs merge through their maxima and sums. What S loses goes to T as `beta m_S` times T's own softmax, which
needs no division by a mass that might underflow, and rows keep summing to 1 by construction. The keys of the prefix
start a run, so that the tiles hold the N keys of the patches.

Self-attention, as the peers use it: out + factor softmax(scale q k^T + bias) v, with k in place of q or the reverse in
most. The bias is read from a table by the offset of two patches on the grid, or from a matrix of patches for each
image. Proxy attention is the same sweep, L times into one accumulator: (1 / L) sum over l of softmax(k_l k_l^T) v for
the rows of patches, the values of the prefix counting as 0. Where the log-sum-exp of every row is known, the layers'
probabilities are added first, and multiplied with v once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .launch import check_launch, interpreted, on_device, operator, strides, wrap_triton

BLOCK_PATCHES = 512
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """The product of two tiles, in fp32.

    PRECISION is how fp32 is multiplied, or "interpreter": it reads bf16 as raw integers, so both are widened first.
    """
    if PRECISION == "interpreter":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def fp16_unit(N):
    """`operations.affinity_unit`: what fp16 holds probabilities over N patches times, whose mean is then about 1."""
    return tl.minimum(N, 32768).to(tl.float32)


@triton.jit
def softmax_step(b_s, scale, b_max, b_sum):
    """One step of the online softmax, in base 2, over logits scale b_s [BM, BN]; -1e30 is the maximum over nothing.

    Returns p, the new maximum and sum, and the factor for what was accumulated before. All is finite for logits up to
    2^28, where the rounding of a maximum, which p does not share, comes to no more than fp16 holds.
    """
    b_new = tl.maximum(b_max, tl.max(b_s, axis=1) * scale)
    b_shrink = tl.exp2(b_max - b_new)
    b_p = tl.exp2(tl.fma(b_s, scale, -b_new[:, None]))  # [BM, BN]
    return b_p, b_new, b_sum * b_shrink + tl.sum(b_p, axis=1), b_shrink


@triton.jit
def positive(scale):
    """A scale of at least 0 as fp32 (it is fp64 from some Inductors), and not 0, so that -inf times it is -inf."""
    scale = tl.cast(scale, tl.float32)
    return tl.where(scale < 1e-30, 1e-30, scale)


@triton.jit
def image_head_rows(H, T, BM: tl.constexpr):
    """The image, the head and the block of rows of a program; all are on the grid's first axis, which has no limit."""
    i_bh, blocks = tl.program_id(0) // tl.cdiv(T, BM), tl.cdiv(T, BM)
    return (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64), tl.program_id(0) % blocks


@triton.jit
def product(b_x, b_y):
    """b_x b_y, rounded before it is summed over lanes: no compiler fuses an fma that adds 0 into the sum.

    Fused, a lane's own product would be exact, and the sums of the lanes would differ.
    """
    return tl.fma(b_x, b_y, 0.0)


@triton.jit
def key_logits(b_q, p_k, m_d, scale):
    """The logits of the one key that p_k points to: [BM]."""
    b_k = tl.load(p_k, mask=m_d, other=0.0).to(tl.float32)  # [BD]
    return tl.sum(product(b_q.to(tl.float32), b_k[None, :]), axis=1) * scale


@triton.jit
def add_key(b_l, b_v, taken, b_max, b_sum, b_acc):
    """One step of the online softmax with a single key of logits b_l [BM] and value b_v [BD], if it is taken."""
    b_l = tl.where(taken, b_l, float("-inf"))
    b_new = tl.maximum(b_max, b_l)
    b_shrink, b_p = tl.exp2(b_max - b_new), tl.exp2(b_l - b_new)
    b_acc = b_acc * b_shrink[:, None] + b_p[:, None] * tl.where(taken, b_v, 0.0)[None, :]
    return b_new, b_sum * b_shrink + b_p, b_acc


@triton.jit
def store_order(p_order, m_taken, m_target, n_target, n_free, i_target, i_taken, o_n, N):
    """Number some patches: the n_target of T first, then what is in neither, and from place n_free on S, as -1 - n.

    i_target of T and i_taken of S come before these patches; it returns both counts with these patches included. The
    masks are false where there is no patch.
    """
    b_target, b_taken = m_target.to(tl.int32), m_taken.to(tl.int32)
    b_i_target, b_i_taken = i_target + tl.cumsum(b_target, 0), i_taken + tl.cumsum(b_taken, 0)
    b_place = tl.where(b_target == 1, b_i_target - 1, n_target + o_n - b_i_target - b_i_taken)
    b_place = tl.where(b_taken == 1, n_free + b_i_taken - 1, b_place)
    tl.store(p_order + b_place, tl.where(m_taken, -1 - o_n, o_n), mask=o_n < N)
    return tl.max(b_i_target, axis=0), tl.max(b_i_taken, axis=0)


@triton.jit
def order_patches(p_distraction, stride_dn, p_target, stride_tn, p_order, N, BN: tl.constexpr):
    """Number the patches of an image: [N + 1], the count of T, and the patches as `store_order` places them."""
    b_target, b_taken = tl.zeros([BN], tl.float32), tl.zeros([BN], tl.float32)  # counts are exact in fp32
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        m_taken = tl.load(p_distraction + o_n * stride_dn, mask=o_n < N, other=0) != 0
        m_target = tl.load(p_target + o_n * stride_tn, mask=o_n < N, other=0) != 0
        b_target += (m_target & (m_taken == 0)).to(tl.float32)
        b_taken += m_taken.to(tl.float32)
    n_target, n_free = tl.sum(b_target, axis=0).to(tl.int32), N - tl.sum(b_taken, axis=0).to(tl.int32)
    tl.store(p_order, n_target)
    i_target, i_taken = 0, 0
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        m_taken = tl.load(p_distraction + o_n * stride_dn, mask=o_n < N, other=0) != 0
        m_target = tl.load(p_target + o_n * stride_tn, mask=o_n < N, other=0) != 0
        m_target &= m_taken == 0
        i_target, i_taken = store_order(p_order + 1, m_taken, m_target, n_target, n_free, i_target, i_taken, o_n, N)


@triton.jit(do_not_specialize=["N"])
def order_kernel(
    distraction_ptr,  # [B, N] bool
    target_ptr,  # [B, N] bool
    order_ptr,  # [B, N + 1] int32
    N,
    stride_db,
    stride_dn,
    stride_tb,
    stride_tn,
    BN: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    p_distraction, p_target = distraction_ptr + i_b * stride_db, target_ptr + i_b * stride_tb
    order_patches(p_distraction, stride_dn, p_target, stride_tn, order_ptr + i_b * (N + 1), N, BN)


@triton.jit
def add_tile(
    b_q,
    p_k,
    p_v,
    stride_kt,
    stride_vt,
    p_order,
    n,
    m_d,
    scale,
    b_kept,
    b_max,
    b_sum,
    b_sum_taken,
    b_acc,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of a run with the next BN keys of an order, or the last n, of which those of S come last.

    T's run has none of S, but takes the same step: a load that the branch waits for makes the compiler start all loads
    a tile earlier.
    """
    m_n = tl.arange(0, BN) < n
    i_n = tl.load(p_order + tl.arange(0, BN), mask=m_n, other=0)  # patch 0 in place of none
    i_k = tl.maximum(i_n, -1 - i_n)
    b_k = tl.load(p_k[:, None] + i_k[None, :] * stride_kt, mask=m_d[:, None], other=0.0)  # [BD, BN]
    b_s = dot(b_q, b_k, PRECISION)  # [BM, BD] @ [BD, BN] -> [BM, BN]
    if n < BN:  # in every tile, this would be an instruction for each product
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
    b_p, b_max, b_sum, b_shrink = softmax_step(b_s, scale, b_max, b_sum)
    if tl.load(p_order + tl.minimum(n, BN) - 1) < 0:
        m_taken = (i_n < 0)[None, :]
        b_sum_taken = b_sum_taken * b_shrink + tl.sum(tl.where(m_taken, b_p, 0.0), axis=1)
        b_p = tl.where(m_taken, b_p * b_kept[:, None], b_p)
    b_v = tl.load(p_v[None, :] + i_k[:, None] * stride_vt, mask=m_d[None, :], other=0.0)
    b_acc = b_acc * b_shrink[:, None] + dot(b_p.to(b_v.dtype), b_v, PRECISION)  # [BM, BN] @ [BN, BD] -> [BM, BD]
    return b_max, b_sum, b_sum_taken, b_acc


@triton.jit(do_not_specialize=["H", "T"])
def refocused_attention_kernel(
    q_ptr,  # [B, H, T, D]
    k_ptr,  # [B, H, T, D]
    v_ptr,  # [B, H, T, D]
    target_ptr,  # [B, T] bool, read for the prefix where WHOLE
    order_ptr,  # [B, N + 1] int32, as order_patches makes it
    out_ptr,  # [B, T, H, D] contiguous
    H,
    T,
    beta,
    scale,  # times log2(e)
    stride_qb,
    stride_qh,
    stride_qt,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_vd,
    stride_gb,
    stride_gt,
    WHOLE: tl.constexpr,
    PREFIX: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    beta, scale = tl.cast(beta, tl.float32), positive(scale)  # fp64 from some Inductors
    i_b, i_h, i_m = image_head_rows(H, T, BM)
    o_m = i_m * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    m_q = (o_m < T)[:, None] & m_d[None, :]
    p_q = q_ptr + i_b * stride_qb + i_h * stride_qh + o_m[:, None] * stride_qt + o_d[None, :] * stride_qd
    b_q = tl.load(p_q, mask=m_q, other=0.0)  # [BM, BD]
    p_k = k_ptr + i_b * stride_kb + i_h * stride_kh + o_d * stride_kd
    p_v = v_ptr + i_b * stride_vb + i_h * stride_vh + o_d * stride_vd
    N = T - PREFIX
    p_order = order_ptr + i_b * (N + 1)
    n_target = tl.load(p_order)
    p_order += 1

    b_max, b_max_rest = tl.full([BM], -1e30, tl.float32), tl.full([BM], -1e30, tl.float32)
    b_sum, b_sum_rest = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    b_acc, b_acc_rest = tl.zeros([BM, BD], tl.float32), tl.zeros([BM, BD], tl.float32)
    with_target = n_target > 0
    for i in tl.static_range(PREFIX):
        in_target = tl.load(target_ptr + i_b * stride_gb + i * stride_gt) != 0 if WHOLE else i < 0
        with_target |= in_target
        b_l = key_logits(b_q, p_k + i * stride_kt, m_d, scale)
        b_v_one = tl.load(p_v + i * stride_vt, mask=m_d, other=0.0).to(tl.float32)  # [BD]
        b_max, b_sum, b_acc = add_key(b_l, b_v_one, in_target, b_max, b_sum, b_acc)
        b_max_rest, b_sum_rest, b_acc_rest = add_key(b_l, b_v_one, in_target == 0, b_max_rest, b_sum_rest, b_acc_rest)
    # The rows of the prefix, and every row of an image without target, stay as they are.
    b_beta = tl.where((o_m >= PREFIX) & with_target, beta, 0.0)  # [BM]
    b_kept, b_sum_taken = 1 - b_beta, tl.zeros([BM], tl.float32)  # of S
    p_k, p_v = p_k + PREFIX * stride_kt, p_v + PREFIX * stride_vt
    for start in range(0, n_target, BN):
        b_max, b_sum, _taken, b_acc = add_tile(
            b_q, p_k, p_v, stride_kt, stride_vt, p_order + start, n_target - start, m_d, scale, b_kept,
            b_max, b_sum, b_sum_taken, b_acc, BN, PRECISION,
        )  # fmt: skip
    for start in range(n_target, N, BN):
        b_max_rest, b_sum_rest, b_sum_taken, b_acc_rest = add_tile(
            b_q, p_k, p_v, stride_kt, stride_vt, p_order + start, N - start, m_d, scale, b_kept,
            b_max_rest, b_sum_rest, b_sum_taken, b_acc_rest, BN, PRECISION,
        )  # fmt: skip

    b_top = tl.maximum(b_max, b_max_rest)
    b_target, b_rest = tl.exp2(b_max - b_top), tl.exp2(b_max_rest - b_top)
    b_given = b_beta * b_sum_taken * b_rest / tl.where(b_sum > 0, b_sum, 1.0)
    b_out = b_acc_rest * b_rest[:, None] + b_acc * (b_target + b_given)[:, None]
    b_out = b_out / (b_sum * b_target + b_sum_rest * b_rest)[:, None]
    p_out = out_ptr + ((i_b * T + o_m[:, None]) * H + i_h) * D + o_d[None, :]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_q)


@triton.jit(do_not_specialize=["H", "T"])
def self_attention_kernel(
    q_ptr,  # [L, B, H, T, D]
    k_ptr,  # [L, B, H, T, D]
    v_ptr,  # [B, H, T, D]
    bias_ptr,  # by BIAS: [2 gh - 1, 2 gw - 1] fp32 contiguous, or [B, N, N]
    scales_ptr,  # [B], read where SCALES
    out_ptr,  # [B, H, T - (PREFIX if DROP else 0), D]
    L,
    H,
    T,
    gh,
    gw,
    scale,  # times log2(e)
    factor,  # of what is written, or added where ADD
    stride_ql,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_qd,
    stride_kl,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_vd,
    stride_bb,
    stride_bm,
    stride_bn,
    stride_sb,
    stride_ob,
    stride_oh,
    stride_ot,
    stride_od,
    BIAS: tl.constexpr,  # "none", "offsets" or "patches"
    SCALES: tl.constexpr,
    ADD: tl.constexpr,
    PREFIX: tl.constexpr,
    DROP: tl.constexpr,  # drop the rows and columns of the prefix after the softmax
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    scale, factor = positive(scale), tl.cast(factor, tl.float32)  # fp64 from some Inductors
    first = PREFIX if DROP else 0
    i_b, i_h, i_m = image_head_rows(H, T - first, BM)
    if SCALES:
        signed_scale = tl.load(scales_ptr + i_b * stride_sb).to(tl.float32) * LOG2E
        scale = positive(tl.abs(signed_scale))
    o_m = first + i_m * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    m_m = (o_m < T)[:, None] & m_d[None, :]
    p_v = v_ptr + i_b * stride_vb + i_h * stride_vh + o_d * stride_vd
    p_q = q_ptr + i_b * stride_qb + i_h * stride_qh + o_d * stride_qd
    p_k = k_ptr + i_b * stride_kb + i_h * stride_kh + o_d * stride_kd
    b_first = tl.load(p_v, mask=m_d & (PREFIX > 0) & (DROP == 0), other=0.0).to(tl.float32)  # [BD]
    i_m = o_m - PREFIX
    m_biased = (i_m >= 0) & (o_m < T)  # the rows of the prefix have none
    if BIAS == "offsets":  # of patches m and n: (row_m - row_n + gh - 1) (2 gw - 1) + column_m - column_n + gw - 1
        p_bias = bias_ptr + (i_m // gw + gh - 1) * (2 * gw - 1) + i_m % gw + gw - 1
    else:
        p_bias = bias_ptr + i_b * stride_bb + i_m.to(tl.int64) * stride_bm
    b_out = tl.zeros([BM, BD], tl.float32)
    for _layer in range(0, L):
        b_q = tl.load(p_q[None, :] + o_m[:, None] * stride_qt, mask=m_m, other=0.0)  # [BM, BD]
        if SCALES:
            b_q = (b_q.to(tl.float32) * tl.where(signed_scale < 0, -1.0, 1.0)).to(b_q.dtype)
        b_acc = tl.zeros([BM, BD], tl.float32) + b_first[None, :]
        if PREFIX > 0:  # the first key needs no step, which would cost registers
            b_max, b_sum = key_logits(b_q, p_k, m_d, scale), tl.full([BM], 1.0, tl.float32)
        else:
            b_max, b_sum = tl.full([BM], -1e30, tl.float32), tl.zeros([BM], tl.float32)
        for i in tl.static_range(1, PREFIX):
            b_l = key_logits(b_q, p_k + i * stride_kt, m_d, scale)
            b_v_one = tl.load(p_v + i * stride_vt, mask=m_d & (DROP == 0), other=0.0).to(tl.float32)  # [BD]
            b_max, b_sum, b_acc = add_key(b_l, b_v_one, True, b_max, b_sum, b_acc)
        for start in range(PREFIX, T, BN):
            o_n = start + tl.arange(0, BN)
            i_k = tl.minimum(o_n, T - 1)  # the last key in place of none
            b_k = tl.load(p_k[:, None] + i_k[None, :] * stride_kt, mask=m_d[:, None], other=0.0)  # [BD, BN]
            b_s, unit = dot(b_q, b_k, PRECISION), scale
            if BIAS != "none":
                i_n = i_k - PREFIX
                to_n = -(i_n // gw * (2 * gw - 1) + i_n % gw) if BIAS == "offsets" else i_n * stride_bn
                b_bias = tl.load(p_bias[:, None] + to_n[None, :], mask=m_biased[:, None], other=0.0).to(tl.float32)
                b_s, unit = tl.fma(b_s, scale, b_bias * LOG2E), 1.0
            if start + BN > T:  # in every tile, this would be an instruction for each product
                b_s = tl.where((o_n < T)[None, :], b_s, float("-inf"))
            b_p, b_max, b_sum, b_shrink = softmax_step(b_s, unit, b_max, b_sum)
            b_v = tl.load(p_v[None, :] + i_k[:, None] * stride_vt, mask=m_d[None, :], other=0.0)
            b_acc = b_acc * b_shrink[:, None] + dot(b_p.to(b_v.dtype), b_v, PRECISION)
        b_out += b_acc / b_sum[:, None]
        p_q += stride_ql
        p_k += stride_kl
    b_out *= factor
    p_out = out_ptr + i_b * stride_ob + i_h * stride_oh + (o_m[:, None] - first) * stride_ot + o_d[None, :] * stride_od
    if ADD:
        b_out += tl.load(p_out, mask=m_m, other=0.0).to(tl.float32)
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_m)


@triton.jit(do_not_specialize=["L", "H", "T"])
def proxy_attention_kernel(
    k_ptr,  # [L, B, H, T, D]
    v_ptr,  # [B, H, T, D]
    lse_ptr,  # [L, B, H, T] fp32
    out_ptr,  # [B, N, H, D] contiguous
    L,
    H,
    T,
    scale,  # times log2(e)
    stride_kl,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_vd,
    stride_sl,
    stride_sb,
    stride_sh,
    stride_st,
    PREFIX: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,  # dimensions that are multiplied at a time
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    scale = tl.cast(scale, tl.float32)  # fp64 from some Inductors
    N = T - PREFIX
    i_b, i_h, i_m = image_head_rows(H, N, BM)
    o_m = i_m * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_d, m_m = o_d < D, o_m < N
    p_k = k_ptr + i_b * stride_kb + i_h * stride_kh + PREFIX * stride_kt
    p_v = v_ptr + i_b * stride_vb + i_h * stride_vh + PREFIX * stride_vt
    p_lse = lse_ptr + i_b * stride_sb + i_h * stride_sh + PREFIX * stride_st
    unit = fp16_unit(N)
    b_acc = tl.zeros([BM, BD], tl.float32)
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        m_n = o_n < N
        b_p = tl.zeros([BM, BN], tl.float32)  # the sum over layers
        p_layer, p_sums = p_k, p_lse + o_m * stride_st
        for _layer in range(0, L):
            b_s = tl.zeros([BM, BN], tl.float32)
            for first in tl.static_range(0, BD, BK):
                o_k = first + tl.arange(0, BK)
                p_q = p_layer + o_m[:, None] * stride_kt + o_k[None, :] * stride_kd
                b_q = tl.load(p_q, mask=m_m[:, None] & (o_k < D)[None, :], other=0.0)  # [BM, BK]
                p_other = p_layer + o_n[None, :] * stride_kt + o_k[:, None] * stride_kd
                b_k = tl.load(p_other, mask=(o_k < D)[:, None] & m_n[None, :], other=0.0)  # [BK, BN]
                b_s += dot(b_q, b_k, PRECISION)
            b_lse = tl.load(p_sums, mask=m_m, other=0.0) * LOG2E
            b_p += tl.exp2(tl.fma(b_s, scale, -b_lse[:, None]))
            p_layer += stride_kl
            p_sums += stride_sl
        m_v = m_n[:, None] & m_d[None, :]
        b_v = tl.load(p_v + o_n[:, None] * stride_vt + o_d[None, :] * stride_vd, mask=m_v, other=0.0)
        b_acc += dot((b_p * (unit / L)).to(b_v.dtype), b_v, PRECISION)  # [BM, BN] @ [BN, BD] -> [BM, BD]
    p_out = out_ptr + ((i_b * N + o_m[:, None]) * H + i_h) * D + o_d[None, :]
    tl.store(p_out, (b_acc / unit).to(out_ptr.dtype.element_ty), mask=m_m[:, None] & m_d[None, :])


def precision(x: Tensor) -> str:
    """How fp32 tiles are multiplied: three tf32 products on NVIDIA's tensor cores, whose error is that of fp32."""
    if interpreted():
        return "interpreter"
    return "ieee" if tiles.architecture(x.device).startswith("gfx") else "tf32x3"


def constants(kernel: str, x: Tensor, prefix: int) -> dict[str, Any]:
    """Compile-time arguments and launch options of one of `tiles.KERNELS` for x [.., B, H, T, D], D at most 128."""
    B, _, T, D = x.shape[-4:]
    chosen = tiles.choose(kernel, x, B, T - prefix, D)
    return chosen.options | {"D": D, "BD": max(16, triton.next_power_of_2(D)), "PRECISION": precision(x)}


@operator("order_patches")
def ordered_patches(distraction: Tensor, target: Tensor) -> Tensor:
    """The patches of each image in the order of `order_patches`, int32 [B, N + 1], from masks [B, N]."""
    B, N = distraction.shape
    order = distraction.new_empty((B, N + 1), dtype=torch.int32)
    if B:
        with on_device(distraction):
            wrap_triton(order_kernel)[(B,)](
                distraction_ptr=distraction,
                target_ptr=target,
                order_ptr=order,
                N=N,
                **strides("d", distraction, "bn"),
                **strides("t", target, "bn"),
                BN=BLOCK_PATCHES,
            )
    return order


@operator("refocused_attention")
def _refocused_attention(
    q: Tensor, k: Tensor, v: Tensor, target: Tensor, order: Tensor, beta: float, scale: float, prefix: int
) -> Tensor:
    B, H, T, D = q.shape
    out = q.new_empty((B, T, H, D))
    options = constants("refocused_attention", q, prefix)
    if B:
        with on_device(q):
            wrap_triton(refocused_attention_kernel)[(triton.cdiv(T, options["BM"]) * B * H,)](
                q_ptr=q,
                k_ptr=k,
                v_ptr=v,
                target_ptr=target,
                order_ptr=order,
                out_ptr=out,
                H=H,
                T=T,
                beta=beta,
                scale=scale * LOG2E.value,
                **strides("q", q, "bhtd"),
                **strides("k", k, "bhtd"),
                **strides("v", v, "bhtd"),
                **strides("g", target, "bt"),
                WHOLE=target.shape[1] == T,
                PREFIX=prefix,
                **options,
            )
    return out


@operator("self_attention_", "out")
def _self_attention_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scales: Tensor | None,
    scale: float,
    factor: float,
    prefix: int,
    drop: bool,
    add: bool,
    out: Tensor,
) -> None:
    L, B, H, T, D = q.shape
    gh = gw = 1
    kind, of_bias = "none", {"stride_bb": 0, "stride_bm": 0, "stride_bn": 0}
    if bias is not None and bias.dim() == 2:
        kind, bias = "offsets", bias.float().contiguous()
        gh, gw = ((side + 1) // 2 for side in bias.shape)
    elif bias is not None:
        kind, of_bias = "patches", strides("b", bias, "bmn")
    options = constants("self_attention", v, prefix)
    if B:
        with on_device(v):
            wrap_triton(self_attention_kernel)[(triton.cdiv(out.shape[2], options["BM"]) * B * H,)](
                q_ptr=q,
                k_ptr=k,
                v_ptr=v,
                bias_ptr=out if bias is None else bias,
                scales_ptr=out if scales is None else scales,
                out_ptr=out,
                L=L,
                H=H,
                T=T,
                gh=gh,
                gw=gw,
                scale=scale * LOG2E.value,
                factor=factor,
                **strides("q", q, "lbhtd"),
                **strides("k", k, "lbhtd"),
                **strides("v", v, "bhtd"),
                **of_bias,
                stride_sb=0 if scales is None else scales.stride(0),
                **strides("o", out, "bhtd"),
                BIAS=kind,
                SCALES=scales is not None,
                ADD=add,
                PREFIX=prefix,
                DROP=drop,
                **options,
            )


@operator("proxy_attention")
def _proxy_attention(keys: Tensor, v: Tensor, normalizers: Tensor, scale: float, prefix: int) -> Tensor:
    L, B, H, T, D = keys.shape
    out = v.new_empty((B, T - prefix, H, D))
    options = constants("proxy_attention", v, prefix)
    if B:
        with on_device(v):
            wrap_triton(proxy_attention_kernel)[(triton.cdiv(T - prefix, options["BM"]) * B * H,)](
                k_ptr=keys,
                v_ptr=v,
                lse_ptr=normalizers,
                out_ptr=out,
                L=L,
                H=H,
                T=T,
                scale=scale * LOG2E.value,
                **strides("k", keys, "lbhtd"),
                **strides("v", v, "bhtd"),
                **strides("s", normalizers, "lbht"),
                PREFIX=prefix,
                BK=32 if v.dtype == torch.float32 else options["BD"],
                **options,
            )
    return out


def launch_refocused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    distraction: Tensor,
    target: Tensor,
    beta: float,
    scale: float,
    prefix: int,
    order: Tensor | None,
) -> Tensor:
    """Two launches, or one if the order is given: keys are ordered by group, and swept as by flash attention.

    Views of a packed projection are read in place. The result is a view of memory laid out [B, T, H, D], as the output
    projection reads it. Where the reference leaves a row unchanged because its mass on the target underflows, this
    gives what exact arithmetic gives.
    """
    check_launch(q.shape[-1], q=q, k=k, v=v, distraction=distraction, target=target, order=order)
    if order is None:
        order = ordered_patches(distraction, target[:, -distraction.shape[1] :])
    return _refocused_attention(q, k, v, target, order, beta, scale, prefix).transpose(1, 2)


def launch_self_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float | Tensor,
    prefix: int,
    factor: float,
    out: Tensor | None,
) -> Tensor:
    """One flash sweep, to which a table of offsets is no matrix. A new tensor is laid out [B, T, H, D]."""
    scales, scale = (None, scale) if isinstance(scale, float) else (scale, 1.0)
    check_launch(q.shape[-1], q=q, k=k, v=v, bias=bias, scale=scales, out=out)
    add, out = out is not None, _new_heads(v, v.shape[2]) if out is None else out
    _self_attention_(q[None], k[None], v, bias, scales, scale, factor, prefix, False, add, out)
    return out


def launch_proxy_attention(keys: Tensor, v: Tensor, scale: float, prefix: int, normalizers: Tensor | None) -> Tensor:
    """L flash sweeps into one accumulator; with normalizers, one sweep over sums of the layers' attention.

    Laid out [B, N, H, D].
    """
    check_launch(v.shape[-1], keys=keys, v=v, normalizers=normalizers)
    if normalizers is None:
        out = _new_heads(v, v.shape[2] - prefix)
        _self_attention_(keys, keys, v, None, None, scale, 1 / len(keys), prefix, True, False, out)
        return out
    return _proxy_attention(keys, v, normalizers, scale, prefix).transpose(1, 2)


def _new_heads(v: Tensor, rows: int) -> Tensor:
    """Memory for what heads gather, [B, H, rows, D], as the output projection reads it."""
    B, H, _, D = v.shape
    return v.new_empty((B, rows, H, D)).transpose(1, 2)
