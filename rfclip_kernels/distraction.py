"""Find distraction tokens and repair their embeddings from their neighbours: equations 6 and 13 of the paper.

phi[i] = max over j in D_dis of f[i, j] / sum_k f[i, k],  f = x - min_k x[k] per token
x[i, j] <- mean of x[n, j] over the size x size neighbours n of i, for i in T_dis and j in D_dis
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_launch, on_device, operator, wrap_triton


@triton.jit
def dimensions(DIMS: tl.constexpr, BJ: tl.constexpr):
    """D_dis as offsets [BJ], the first of them repeated."""
    o_j = tl.arange(0, BJ)
    b_dims = tl.full([BJ], DIMS[0], tl.int32)
    for j in tl.static_range(1, len(DIMS)):
        b_dims = tl.where(o_j == j, DIMS[j], b_dims)
    return b_dims


@triton.jit
def token_score(b_x, b_own, m_d, SHIFTED: tl.constexpr):
    """phi of one token, from all of its values b_x [BD] and those in D_dis, b_own [BJ], in fp32."""
    least = tl.min(tl.where(m_d, b_x, float("inf")), axis=0) if SHIFTED else 0.0
    total = tl.sum(tl.where(m_d, b_x - least, 0.0), axis=0)
    # Dividing by a negative sum, which only values that are not shifted have, turns the order round.
    most = tl.where(total > 0, tl.max(b_own, axis=0), tl.min(b_own, axis=0)) - least
    return tl.where(total == 0, 0.0, tl.div_rn(most, tl.where(total == 0, 1.0, total)))


@triton.jit
def neighbours(i_n, gh, gw, SIZE: tl.constexpr, BP: tl.constexpr):
    """The patches around patch i_n and whether they exist, [BP]."""
    place = tl.arange(0, BP)
    row, column = i_n // gw + place // SIZE - SIZE // 2, i_n % gw + place % SIZE - SIZE // 2
    m_near = (row >= 0) & (row < gh) & (column >= 0) & (column < gw) & (place < SIZE * SIZE)
    return row * gw + column, m_near & (place != SIZE * SIZE // 2)


@triton.jit
def mean_of_neighbours(b_near, m_near):
    """The means of values [BJ, BP], and where there are any, [BJ]."""
    b_count = tl.sum(m_near.to(tl.float32), axis=1)
    return tl.div_rn(tl.sum(b_near.to(tl.float32), axis=1), tl.maximum(b_count, 1.0)), b_count > 0


@triton.jit
def list_marked(p_mask, p_list, first, most, N, BLOCK: tl.constexpr):
    """List `most` of the marked patches of an image [N] in memory, in ascending order, from the one numbered `first`.

    The memory belongs to the program alone. Returns the number of all marked patches.
    """
    n_marked = 0
    for start in range(0, N, BLOCK):
        o_n = start + tl.arange(0, BLOCK)
        b_marked = (tl.load(p_mask + o_n, mask=o_n < N, other=0) != 0).to(tl.int32)
        o_place = n_marked + tl.cumsum(b_marked, 0) - 1 - first
        tl.store(p_list + o_place, o_n, mask=(b_marked > 0) & (o_place >= 0) & (o_place < most))
        n_marked += tl.sum(b_marked, axis=0)
    tl.debug_barrier()  # other threads wrote what is read next
    return n_marked


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
    BD: tl.constexpr,
    BJ: tl.constexpr,
):
    threshold = tl.cast(threshold, tl.float32)  # fp64 from some Inductors
    i_b, i_n = (tl.program_id(0) // N).to(tl.int64), tl.program_id(0) % N
    o_d = tl.arange(0, BD)
    p_x = x_ptr + i_b * stride_xb + i_n * stride_xn
    b_x = tl.load(p_x + o_d * stride_xd, mask=o_d < d, other=0.0).to(tl.float32)
    b_own = tl.load(p_x + dimensions(DIMS, BJ) * stride_xd).to(tl.float32)
    phi = token_score(b_x, b_own, o_d < d, SHIFTED)
    tl.store(out_ptr + i_b * N + i_n, phi > threshold if MASK else phi)


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
    BJ: tl.constexpr,
    BP: tl.constexpr,
):
    N = gh * gw
    i_b, i_n = (tl.program_id(0) // N).to(tl.int64), tl.program_id(0) % N
    if tl.load(mask_ptr + i_b * stride_mb + i_n * stride_mn) != 0:
        i_near, m_near = neighbours(i_n, gh, gw, SIZE, BP)
        o_j = tl.arange(0, BJ)
        m_near = m_near[None, :] & (o_j < len(DIMS))[:, None]  # [BJ, BP]
        p_near = before_ptr + (i_b * N + i_near[None, :]) * len(DIMS) + o_j[:, None]
        b_mean, b_exists = mean_of_neighbours(tl.load(p_near, mask=m_near, other=0.0), m_near)
        p_x = x_ptr + i_b * stride_xb + i_n * stride_xn + dimensions(DIMS, BJ) * stride_xd
        tl.store(p_x, b_mean.to(x_ptr.dtype.element_ty), mask=b_exists)


@operator("distraction_scores")
def _distraction_scores(x: Tensor, dims: list[int], threshold: float | None, shifted: bool) -> Tensor:
    B, N, d = x.shape
    out = x.new_empty((B, N), dtype=torch.float32 if threshold is None else torch.bool)
    if B:
        with on_device(x):
            wrap_triton(distraction_scores_kernel)[(B * N,)](
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
                BD=triton.next_power_of_2(d),
                BJ=triton.next_power_of_2(len(dims)),
            )
    return out


@operator("redistribute_embeddings_", "x")
def _redistribute_embeddings_(x: Tensor, mask: Tensor, dims: list[int], gh: int, gw: int, size: int) -> None:
    B, N, _ = x.shape
    if B:
        with on_device(x):
            wrap_triton(redistribute_kernel)[(B * N,)](
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
                BJ=triton.next_power_of_2(len(dims)),
                BP=triton.next_power_of_2(size**2),
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
