"""Find distraction tokens and repair their embeddings from their neighbours: equations 6 and 13 of the paper.

phi[i] = max over j in D_dis of f[i, j] / sum_k f[i, k],  f = x - min_k x[k] per token
x[i, j] <- mean of x[n, j] over the size x size neighbours n of i, for i in T_dis and j in D_dis
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from rfclip_kernels.launch import check_launch, on_device, wrap_triton

BLOCK_TOKENS = 16
BLOCK_WIDTH = 128


@triton.jit(do_not_specialize=["N"])
def distraction_scores_kernel(
    x_ptr,  # [B, N, d]
    out_ptr,  # [B, N], fp32 scores, or bool where MASK
    N,
    d,
    threshold,
    stride_xb,
    stride_xn,
    stride_xd,
    DIMS: tl.constexpr,  # tuple of int
    SHIFTED: tl.constexpr,
    MASK: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    i_b = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = o_n < N
    p_x = x_ptr + i_b * stride_xb + o_n * stride_xn  # [BN]
    b_min = tl.full([BN], float("inf"), tl.float32)
    b_sum = tl.zeros([BN], tl.float32)
    b_first = tl.load(p_x, mask=m_n, other=0.0).to(tl.float32)  # sums are of differences from it: a large mean cancels
    for start in range(0, d, BD):
        o_d = start + tl.arange(0, BD)
        m_x = m_n[:, None] & (o_d < d)[None, :]
        b_x = tl.load(p_x[:, None] + o_d[None, :] * stride_xd, mask=m_x, other=0.0).to(tl.float32)  # [BN, BD]
        b_min = tl.minimum(b_min, tl.min(tl.where(m_x, b_x, float("inf")), axis=1))
        b_sum += tl.sum(tl.where(m_x, b_x - b_first[:, None], 0.0), axis=1)
    b_least = tl.where(m_n, b_min, 0.0) if SHIFTED else tl.zeros([BN], tl.float32)
    b_sum += d * (b_first - b_least)
    b_phi = tl.full([BN], float("-inf"), tl.float32)
    for j in tl.static_range(len(DIMS)):
        b_f = tl.load(p_x + DIMS[j] * stride_xd, mask=m_n, other=0.0).to(tl.float32) - b_least
        b_phi = tl.maximum(b_phi, tl.where(b_sum == 0, 0.0, b_f / tl.where(b_sum == 0, 1.0, b_sum)))
    if MASK:
        tl.store(out_ptr + i_b * N + o_n, b_phi > threshold, mask=m_n)
    else:
        tl.store(out_ptr + i_b * N + o_n, b_phi, mask=m_n)


@triton.jit(do_not_specialize=["gh", "gw"])
def redistribute_kernel(
    before_ptr,  # [B, N, |D_dis|] contiguous, the values of x before the update
    mask_ptr,  # [B, N] bool
    x_ptr,  # [B, N, d], updated
    gh,
    gw,
    stride_xb,
    stride_xn,
    stride_xd,
    stride_mb,
    stride_mn,
    DIMS: tl.constexpr,
    SIZE: tl.constexpr,
    BN: tl.constexpr,
):
    i_b = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = o_n < gh * gw
    m_n &= tl.load(mask_ptr + i_b * stride_mb + o_n * stride_mn, mask=m_n, other=0) != 0
    row, column = o_n // gw, o_n % gw
    for j in tl.static_range(len(DIMS)):
        b_sum = tl.zeros([BN], tl.float32)
        b_count = tl.zeros([BN], tl.float32)
        for place in range(SIZE * SIZE):
            r, c = row + place // SIZE - SIZE // 2, column + place % SIZE - SIZE // 2
            m_near = m_n & (r >= 0) & (r < gh) & (c >= 0) & (c < gw) & (place != SIZE * SIZE // 2)
            p_near = before_ptr + (i_b * gh * gw + r * gw + c) * len(DIMS) + j
            b_sum += tl.load(p_near, mask=m_near, other=0.0).to(tl.float32)
            b_count += m_near.to(tl.float32)
        b_mean = (b_sum / tl.maximum(b_count, 1.0)).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + i_b * stride_xb + o_n * stride_xn + DIMS[j] * stride_xd, b_mean, mask=m_n & (b_count > 0))


@triton_op("rfclip::distraction_scores", mutates_args={})
def _distraction_scores(x: Tensor, dims: list[int], threshold: float | None, shifted: bool) -> Tensor:
    B, N, d = x.shape
    out = x.new_empty((B, N), dtype=torch.float32 if threshold is None else torch.bool)
    if B:
        with on_device(x):
            wrap_triton(distraction_scores_kernel)[(triton.cdiv(N, BLOCK_TOKENS), B)](
                x_ptr=x,
                out_ptr=out,
                N=N,
                d=d,
                threshold=0.0 if threshold is None else threshold,
                stride_xb=x.stride(0),
                stride_xn=x.stride(1),
                stride_xd=x.stride(2),
                DIMS=tuple(dims),
                SHIFTED=shifted,
                MASK=threshold is not None,
                BN=BLOCK_TOKENS,
                BD=BLOCK_WIDTH,
            )
    return out


@triton_op("rfclip::redistribute_embeddings_", mutates_args={"x"})
def _redistribute_embeddings_(x: Tensor, mask: Tensor, dims: list[int], gh: int, gw: int, size: int) -> None:
    B, N, _ = x.shape
    if B:
        with on_device(x):
            wrap_triton(redistribute_kernel)[(triton.cdiv(N, BLOCK_TOKENS), B)](
                before_ptr=torch.stack([x[:, :, j] for j in dims], dim=-1),
                mask_ptr=mask,
                x_ptr=x,
                gh=gh,
                gw=gw,
                stride_xb=x.stride(0),
                stride_xn=x.stride(1),
                stride_xd=x.stride(2),
                stride_mb=mask.stride(0),
                stride_mn=mask.stride(1),
                DIMS=tuple(dims),
                SIZE=size,
                BN=BLOCK_TOKENS,
            )


def launch_distraction_scores(x: Tensor, dims: list[int], shifted: bool) -> Tensor:
    """One pass over x."""
    check_launch(x=x)
    return _distraction_scores(x, dims, None, shifted)


def launch_distraction_mask(x: Tensor, dims: list[int], threshold: float, shifted: bool) -> Tensor:
    """The same pass; only the mask is stored."""
    check_launch(x=x)
    return _distraction_scores(x, dims, threshold, shifted)


def launch_redistribute_embeddings(x: Tensor, mask: Tensor, dims: list[int], gh: int, gw: int, size: int) -> None:
    """Write only D_dis of masked tokens, from a copy of D_dis of all tokens."""
    check_launch(x=x, mask=mask)
    _redistribute_embeddings_(x, mask, dims, gh, gw, size)
