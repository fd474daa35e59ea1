"""What only the code that RF-CLIP's authors released computes: tokens blended with their window, and sums by cosine.

    x[i]   <- 0.6 x[i] + (0.4 / 9) * sum of x[n] over the 3 x 3 window of i, for masked i
    out[i] =  sum over the j with w[i, j] >= cut of w[i, j] x[j],  w[i, j] = <g[i], g[j]> / (|g[i]| |g[j]|)

With a gain it is the mean of these x[j] and of x[i] itself, weighted by exp(gain w[i, j]), as attention across windows
takes it. The sum keeps no matrix: a program holds the sums of BM rows over BC columns of x, and makes the cosines of
its rows tile by tile, in steps over the dimensions of g. For N patches, g of d and x of e dimensions that is
2 N^2 (d e / BC + e) operations instead of the 2 N^2 (d + e) with a matrix, for ViT-B/16 (d = 768, e = 2 d, BC = 256)
2.7 times as many, which is 4 % of its blocks' at N = 588.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .attention import LOG2E, dot, precision
from .launch import check_launch, on_device, operator, strides, wrap_triton

BLOCK_WIDTH = 256


@triton.jit(do_not_specialize=["gh", "gw"])
def blend_kernel(
    before_ptr,  # [B, N, d] contiguous, the values of x before the update
    mask_ptr,  # [B, N] bool
    x_ptr,  # [B, N, d], updated
    gh,
    gw,
    d,
    stride_xb,
    stride_xn,
    stride_xd,
    stride_mb,
    stride_mn,
    BD: tl.constexpr,
):
    N = gh * gw
    i_b, i_n = (tl.program_id(0) // N).to(tl.int64), tl.program_id(0) % N
    if tl.load(mask_ptr + i_b * stride_mb + i_n * stride_mn) != 0:
        row, column = i_n // gw, i_n % gw
        p_before, p_x = before_ptr + i_b * N * d, x_ptr + i_b * stride_xb + i_n * stride_xn
        for start in range(0, d, BD):
            o_d = start + tl.arange(0, BD)
            m_d = o_d < d
            b_sum = tl.zeros([BD], tl.float32)
            for place in range(9):
                r, c = row + place // 3 - 1, column + place % 3 - 1
                inside = (r >= 0) & (r < gh) & (c >= 0) & (c < gw)
                p_near = p_before + (r * gw + c) * d + o_d
                b_sum += tl.load(p_near, mask=o_d < d * inside, other=0.0).to(tl.float32)
            b_x = tl.load(p_before + i_n * d + o_d, mask=m_d, other=0.0).to(tl.float32)
            b_x = 0.6 * b_x + (0.4 / 9) * b_sum
            tl.store(p_x + o_d * stride_xd, b_x.to(x_ptr.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=["N"])
def cosine_aggregation_kernel(
    g_ptr,  # [B, N, d]
    norm_ptr,  # [B, N] fp32 contiguous, |g|
    x_ptr,  # [B, N, e]
    out_ptr,  # [B, N, e] contiguous
    N,
    d,
    e,
    cut,  # or a tensor [B], if CUTS
    gain,  # times log2(e), read where GAIN
    stride_gb,
    stride_gn,
    stride_gd,
    stride_xb,
    stride_xn,
    stride_xe,
    stride_cb,
    CUTS: tl.constexpr,
    GAIN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    gain = tl.cast(gain, tl.float32)  # fp64 from some Inductors
    blocks = tl.cdiv(N, BM)
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    least = tl.load(cut + i_b * stride_cb).to(tl.float32) if CUTS else tl.cast(cut, tl.float32)
    o_m, o_c = tl.program_id(0) % blocks * BM + tl.arange(0, BM), tl.program_id(1) * BC + tl.arange(0, BC)
    m_m, m_c = o_m < N, o_c < e
    p_g, p_x, p_norm = g_ptr + i_b * stride_gb, x_ptr + i_b * stride_xb, norm_ptr + i_b * N
    b_norm = tl.maximum(tl.load(p_norm + o_m, mask=m_m, other=1.0), 1e-12)  # [BM]
    b_out, b_sum = tl.zeros([BM, BC], tl.float32), tl.zeros([BM], tl.float32)
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        m_n = o_n < N
        b_w = tl.zeros([BM, BN], tl.float32)
        for first in range(0, d, BD):
            o_d = first + tl.arange(0, BD)
            m_d = o_d < d
            p_m = p_g + o_m[:, None] * stride_gn + o_d[None, :] * stride_gd
            p_n = p_g + o_n[None, :] * stride_gn + o_d[:, None] * stride_gd
            b_m = tl.load(p_m, mask=m_m[:, None] & m_d[None, :], other=0.0)  # [BM, BD]
            b_n = tl.load(p_n, mask=m_d[:, None] & m_n[None, :], other=0.0)  # [BD, BN]
            b_w += dot(b_m, b_n, PRECISION)
        b_norms = b_norm[:, None] * tl.maximum(tl.load(p_norm + o_n, mask=m_n, other=1.0), 1e-12)[None, :]
        b_w = tl.div_rn(b_w, b_norms)
        m_w = b_w >= least
        if GAIN:
            m_w = (m_w | (o_m[:, None] == o_n[None, :])) & m_n[None, :]
            b_w = tl.exp2(gain * (b_w - 1))  # at most about 1
        b_w = tl.where(m_w, b_w, 0.0)
        if GAIN:
            b_sum += tl.sum(b_w, axis=1)
        p_v = p_x + o_n[:, None] * stride_xn + o_c[None, :] * stride_xe
        b_x = tl.load(p_v, mask=m_n[:, None] & m_c[None, :], other=0.0)  # [BN, BC]
        b_out += dot(b_w.to(b_x.dtype), b_x, PRECISION)
    if GAIN:
        b_out = tl.div_rn(b_out, tl.broadcast_to(b_sum[:, None], [BM, BC]))
    p_out = out_ptr + (i_b * N + o_m[:, None]) * e + o_c[None, :]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_m[:, None] & m_c[None, :])


@operator("blend_embeddings_", "x")
def _blend_embeddings_(x: Tensor, mask: Tensor, gh: int, gw: int) -> None:
    B, N, d = x.shape
    if B:
        with on_device(x):
            wrap_triton(blend_kernel)[(B * N,)](
                before_ptr=x.clone(memory_format=torch.contiguous_format),
                mask_ptr=mask,
                x_ptr=x,
                gh=gh,
                gw=gw,
                d=d,
                **strides("x", x, "bnd"),
                **strides("m", mask, "bn"),
                BD=BLOCK_WIDTH,
            )


@operator("cosine_aggregation")
def _cosine_aggregation(guide: Tensor, x: Tensor, cut: float, cuts: Tensor | None, gain: float | None) -> Tensor:
    B, N, d = guide.shape
    e = x.shape[2]
    out = x.new_empty((B, N, e))
    chosen = tiles.choose("cosine_aggregation", x, B, N)
    width = BLOCK_WIDTH if gain is None else BLOCK_WIDTH // 2  # or the sums of weights would spill
    BC = min(width, max(chosen.columns, triton.next_power_of_2(e)))
    if B:
        with on_device(x):
            wrap_triton(cosine_aggregation_kernel)[(B * triton.cdiv(N, chosen.rows), triton.cdiv(e, BC))](
                g_ptr=guide,
                norm_ptr=torch.linalg.vector_norm(guide, dim=-1, dtype=torch.float32).contiguous(),
                x_ptr=x,
                out_ptr=out,
                N=N,
                d=d,
                e=e,
                cut=cut if cuts is None else cuts,
                gain=0.0 if gain is None else gain * LOG2E.value,
                **strides("g", guide, "bnd"),
                **strides("x", x, "bne"),
                stride_cb=0 if cuts is None else cuts.stride(0),
                CUTS=cuts is not None,
                GAIN=gain is not None,
                BD=chosen.columns,
                BC=BC,
                PRECISION=precision(x),
                **chosen.options,
            )
    return out


def launch_blend_embeddings(x: Tensor, mask: Tensor, gh: int, gw: int) -> None:
    """Only masked tokens are computed and written, from a copy of x."""
    check_launch(x=x, mask=mask)
    _blend_embeddings_(x, mask, gh, gw)


def launch_cosine_aggregation(guide: Tensor, x: Tensor, cut: float | Tensor, gain: float | None) -> Tensor:
    """The norms of g, and one launch."""
    cut, cuts = (0.0, cut) if isinstance(cut, Tensor) else (cut, None)
    check_launch(guide=guide, x=x, cut=cuts)
    return _cosine_aggregation(guide, x, cut, cuts, gain)
