"""Averages of attention over heads, without a matrix per head: equation 7 of the paper.

    S[i, j] <- (S[i, j] count + (1/H) sum over h of softmax_j(k_h,i . k_h,j)) / (count + 1)
    W[i, j] = (S[i, j] + S[j, i]) / 2

Both first need the log-sum-exp of every row: one sweep of online softmax without values. Then a tile of S adds up its
heads in registers. Since k_h,i . k_h,j is symmetric, a tile of products also gives the tile of S across the diagonal:
only tiles on and above it are multiplied. W takes half the memory in fp16, multiplied by a unit that makes its mean
about 1; its rows are padded to 16 values, so that each is aligned.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import LOG2E, constants, dot, fp16_unit, image_head_rows, key_logits, positive, softmax_step
from .launch import check_launch, on_device, operator, strides, wrap_triton
from .operations import affinity_dtype


@triton.jit
def row_logsumexp(b_q, p_k, m_d, T, scale, stride_kt, PREFIX: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):
    """The log-sum-exp, in base 2, of the logits of rows b_q [BM, BD] with the T keys of a head."""
    b_max, b_sum = tl.full([b_q.shape[0]], -1e30, tl.float32), tl.zeros([b_q.shape[0]], tl.float32)
    for i in tl.static_range(PREFIX):
        b_l = key_logits(b_q, p_k + i * stride_kt, m_d, scale)
        b_new = tl.maximum(b_max, b_l)
        b_sum = b_sum * tl.exp2(b_max - b_new) + tl.exp2(b_l - b_new)
        b_max = b_new
    for start in range(PREFIX, T, BN):
        o_n = start + tl.arange(0, BN)
        i_k = tl.minimum(o_n, T - 1)  # the last key in place of none
        b_s = dot(b_q, tl.load(p_k[:, None] + i_k[None, :] * stride_kt, mask=m_d[:, None], other=0.0), PRECISION)
        if start + BN > T:  # in every tile, this would be an instruction for each product
            b_s = tl.where((o_n < T)[None, :], b_s, float("-inf"))
        _p, b_max, b_sum, _shrink = softmax_step(b_s, scale, b_max, b_sum)
    return b_max + tl.log2(b_sum)


@triton.jit(do_not_specialize=["H", "T"])
def row_logsumexp_kernel(
    k_ptr,  # [B, H, T, D]
    kept_ptr,  # [B, H, T, D], a copy, written where KEEP
    out_ptr,  # [B, H, T] fp32
    H,
    T,
    scale,  # times log2(e)
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kd,
    stride_cb,
    stride_ch,
    stride_ct,
    stride_cd,
    KEEP: tl.constexpr,
    PREFIX: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    scale = positive(scale)
    i_b, i_h, i_m = image_head_rows(H, T, BM)
    o_m = i_m * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    p_k = k_ptr + i_b * stride_kb + i_h * stride_kh + o_d * stride_kd
    m_q = (o_m < T)[:, None] & m_d[None, :]
    b_q = tl.load(p_k[None, :] + o_m[:, None] * stride_kt, mask=m_q, other=0.0)  # [BM, BD]
    if KEEP:
        p_kept = kept_ptr + i_b * stride_cb + i_h * stride_ch + o_m[:, None] * stride_ct + o_d[None, :] * stride_cd
        tl.store(p_kept, b_q, mask=m_q)
    b_lse = row_logsumexp(b_q, p_k, m_d, T, scale, stride_kt, PREFIX, BN, PRECISION)
    tl.store(out_ptr + (i_b * H + i_h) * T + o_m, b_lse / LOG2E, mask=o_m < T)


@triton.jit(do_not_specialize=["H", "T", "count"])
def key_similarity_kernel(
    k_ptr,  # [B, H, T, D]
    lse_ptr,  # [B, H, T]
    running_ptr,  # [B, N, N] S, or W where SYMMETRIC, read where count > 0, and written
    H,
    T,
    count,
    scale,  # times log2(e)
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kd,
    stride_sb,
    stride_sm,
    stride_sn,
    SYMMETRIC: tl.constexpr,
    PREFIX: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,  # divides BM
    BK: tl.constexpr,  # dimensions that are multiplied at a time
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    scale = tl.cast(scale, tl.float32)  # fp64 from some Inductors
    N = T - PREFIX
    G = tl.cdiv(N, BM)
    squares = G * (G + 1) // 2  # of BM patches a side, each of which BM // BN programs share
    i_b, i_part = (tl.program_id(0) // (squares * (BM // BN))).to(tl.int64), tl.program_id(0) % (BM // BN)
    i_square = tl.program_id(0) // (BM // BN) % squares
    # Squares (m, n) with m <= n are counted by columns: n (n + 1) / 2 + m.
    i_n = ((tl.sqrt(8.0 * i_square.to(tl.float32) + 1.0) - 1.0) / 2).to(tl.int32)
    i_n = tl.where(i_n * (i_n + 1) // 2 > i_square, i_n - 1, i_n)
    i_n = tl.where((i_n + 1) * (i_n + 2) // 2 <= i_square, i_n + 1, i_n)
    i_m = i_square - i_n * (i_n + 1) // 2
    o_m, o_n = i_m * BM + tl.arange(0, BM), i_n * BM + i_part * BN + tl.arange(0, BN)
    m_m, m_n = o_m < N, o_n < N
    p_k = k_ptr + i_b * stride_kb + PREFIX * stride_kt
    p_lse = lse_ptr + i_b * H * T + PREFIX
    b_mean = tl.zeros([BM, BN], tl.float32)
    b_across = tl.zeros([BM, BN], tl.float32)  # of the tile across the diagonal
    for _head in range(0, H):
        b_s = tl.zeros([BM, BN], tl.float32)
        for first in tl.static_range(0, BD, BK):
            o_d = first + tl.arange(0, BK)
            p_q = p_k + o_m[:, None] * stride_kt + o_d[None, :] * stride_kd
            b_q = tl.load(p_q, mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)  # [BM, BK]
            p_other = p_k + o_n[None, :] * stride_kt + o_d[:, None] * stride_kd
            b_k = tl.load(p_other, mask=(o_d < D)[:, None] & m_n[None, :], other=0.0)  # [BK, BN]
            b_s += dot(b_q, b_k, PRECISION)
        b_lse_m = tl.load(p_lse + o_m, mask=m_m, other=0.0) * LOG2E
        b_lse_n = tl.load(p_lse + o_n, mask=m_n, other=0.0) * LOG2E
        b_row = tl.exp2(tl.fma(b_s, scale, -b_lse_m[:, None]))
        b_column = tl.exp2(tl.fma(b_s, scale, -b_lse_n[None, :]))
        if SYMMETRIC:  # one sum, which costs fewer registers
            b_mean += b_row + b_column
        else:
            b_mean += b_row
            b_across += b_column
        p_k += stride_kh
        p_lse += T
    mask = m_m[:, None] & m_n[None, :]
    m_before = mask & (o_m < N * (count > 0))[:, None]
    p_out = running_ptr + i_b * stride_sb + o_m[:, None] * stride_sm + o_n[None, :] * stride_sn
    p_across = running_ptr + i_b * stride_sb + o_n[None, :] * stride_sm + o_m[:, None] * stride_sn
    b_before = tl.load(p_out, mask=m_before, other=0.0).to(tl.float32)
    if SYMMETRIC:
        b_mean = (b_before * count + b_mean * (fp16_unit(N) / (2 * H))) / (count + 1)
        b_across = b_mean
    else:
        b_before_across = tl.load(p_across, mask=m_before, other=0.0)
        b_mean = (b_before * count + b_mean / H) / (count + 1)
        b_across = (b_before_across * count + b_across / H) / (count + 1)
    tl.store(p_out, b_mean.to(running_ptr.dtype.element_ty), mask=mask)
    if i_m != i_n:
        tl.store(p_across, b_across.to(running_ptr.dtype.element_ty), mask=mask)


def empty_affinity(like: Tensor, N: int, dtype: torch.dtype) -> Tensor:
    """A place for W, [B, N, N], whose rows are aligned."""
    return like.new_empty((like.shape[0], N, triton.cdiv(N, 16) * 16), dtype=dtype)[:, :, :N]


@operator("key_normalizers", "kept")
def _key_normalizers(k: Tensor, kept: Tensor | None, scale: float, prefix: int) -> Tensor:
    B, H, T, D = k.shape
    out = k.new_empty((B, H, T), dtype=torch.float32)
    options = constants("row_logsumexp", k, prefix)
    copy = k if kept is None else kept
    if B:
        with on_device(k):
            wrap_triton(row_logsumexp_kernel)[(triton.cdiv(T, options["BM"]) * B * H,)](
                k_ptr=k,
                kept_ptr=copy,
                out_ptr=out,
                H=H,
                T=T,
                scale=scale * LOG2E.value,
                **strides("k", k, "bhtd"),
                **strides("c", copy, "bhtd"),
                KEEP=kept is not None,
                PREFIX=prefix,
                **options,
            )
    return out


@operator("key_similarity_", "running")
def _key_similarity_(
    k: Tensor, normalizers: Tensor, running: Tensor, count: int, scale: float, prefix: int, symmetric: bool
) -> None:
    B, H, T, _ = k.shape
    options = constants("key_affinity" if symmetric else "key_similarity", k, prefix)
    squares = triton.cdiv(T - prefix, options["BM"])
    programs = squares * (squares + 1) // 2 * (options["BM"] // options["BN"])
    if B:
        with on_device(k):
            wrap_triton(key_similarity_kernel)[(programs * B,)](
                k_ptr=k,
                lse_ptr=normalizers,
                running_ptr=running,
                H=H,
                T=T,
                count=count,
                scale=scale * LOG2E.value,
                **strides("k", k, "bhtd"),
                **strides("s", running, "bmn"),
                SYMMETRIC=symmetric,
                PREFIX=prefix,
                BK=32 if k.dtype == torch.float32 else options["BD"],
                **options,
            )


def launch_key_normalizers(k: Tensor, kept: Tensor | None, scale: float, prefix: int) -> Tensor:
    """One launch, which also copies the keys if asked to."""
    check_launch(k.shape[-1], k=k, kept=kept)
    return _key_normalizers(k, kept, scale, prefix)


def launch_key_similarity(k: Tensor, running: Tensor, count: int, scale: float, prefix: int) -> None:
    """Two launches, the second of which adds this layer to the running mean in place."""
    check_launch(k.shape[-1], k=k, running=running)
    normalizers = _key_normalizers(k, None, scale, prefix)
    _key_similarity_(k, normalizers, running, count, scale, prefix, False)


def launch_key_affinity(
    k: Tensor, normalizers: Tensor, running: Tensor | None, count: int, scale: float, prefix: int
) -> Tensor:
    """One launch, in place after the first layer."""
    check_launch(k.shape[-1], k=k, normalizers=normalizers, running=running)
    if running is None:
        running = empty_affinity(k, k.shape[2] - prefix, affinity_dtype(k))
    _key_similarity_(k, normalizers.contiguous(), running, count, scale, prefix, True)
    return running
