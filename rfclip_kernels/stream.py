"""What a block does to the residual stream between its matrix products, in one pass each.

    add_layer_norm         x <- x + branch,  y = (x - mean) / sqrt(var + eps) * weight + bias
    repaired_layer_norm    the same, T_dis being found and repaired in x + branch before the norm: equations 6 and 13
    candidate_layer_norm   the same, the tokens that equation 6 finds being marked and left as they are
    quick_gelu             x / (1 + exp(-1.702 x))

A program has one token. A repair needs its neighbours' D_dis before any update: it reads them from x and branch, which
are not written, and adds them up once more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import LOG2E
from .distraction import dimensions, mean_of_neighbours, neighbours, token_score
from .launch import check_launch, interpreted, on_device, operator, strides, wrap_triton

BLOCK_NUMBERS = 1024


@triton.jit
def rounded(b_x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Values in another dtype, rounded to nearest, which a GPU does by itself; the interpreter cuts bf16 off."""
    if INTERPRETED and dtype == tl.bfloat16 and b_x.dtype != tl.bfloat16:
        bits = b_x.to(tl.float32).to(tl.uint32, bitcast=True)
        b_x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return b_x.to(dtype)


@triton.jit
def joined(p_x, p_branch, mask, BRANCH: tl.constexpr, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """x, or x + branch rounded to a dtype, in fp32."""
    b_x = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
    if BRANCH:
        b_x += tl.load(p_branch, mask=mask, other=0.0).to(tl.float32)
    return rounded(b_x, dtype, INTERPRETED).to(tl.float32)


@triton.jit
def store_norm(p_out, b_x, weight_ptr, bias_ptr, d, eps, stride_o, stride_w, stride_b, INTERPRETED: tl.constexpr):
    """The norm of one token b_x [BD], which is 0 from d on."""
    o_d = tl.arange(0, b_x.shape[0])
    m_d = o_d < d
    count = tl.cast(d, tl.float32)
    b_x = tl.where(m_d, b_x - tl.div_rn(tl.sum(b_x, axis=0), count), 0.0)  # equal values become 0, exactly
    b_y = b_x * tl.rsqrt(tl.div_rn(tl.sum(b_x * b_x, axis=0), count) + eps)
    b_y *= tl.load(weight_ptr + o_d * stride_w, mask=m_d, other=0.0).to(tl.float32)
    b_y += tl.load(bias_ptr + o_d * stride_b, mask=m_d, other=0.0).to(tl.float32)
    tl.store(p_out + o_d * stride_o, rounded(b_y, p_out.dtype.element_ty, INTERPRETED), mask=m_d)


@triton.jit(do_not_specialize=["T", "gw"])
def layer_norm_kernel(
    x_ptr,  # [B, T, d]
    branch_ptr,  # [B, T, d], read where BRANCH
    weight_ptr,  # [d]
    bias_ptr,  # [d]
    sum_ptr,  # [B, T, d] contiguous
    out_ptr,  # [B, T, d] contiguous
    mask_ptr,  # [B, N] bool, written where SCORE
    before_ptr,  # [B, N, |D_dis|] contiguous, D_dis of x + branch, written where SCORE without REPAIR
    T,
    gw,
    d,
    threshold,
    eps,
    stride_xb,
    stride_xt,
    stride_xd,
    stride_rb,
    stride_rt,
    stride_rd,
    stride_w,
    stride_b,
    BRANCH: tl.constexpr,
    SCORE: tl.constexpr,
    REPAIR: tl.constexpr,
    PREFIX: tl.constexpr,
    DIMS: tl.constexpr,  # tuple of int
    SHIFTED: tl.constexpr,
    SIZE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BD: tl.constexpr,
    BJ: tl.constexpr,
    BP: tl.constexpr,
):
    threshold, eps = tl.cast(threshold, tl.float32), tl.cast(eps, tl.float32)  # fp64 from some Inductors
    i_b, i_t = (tl.program_id(0) // T).to(tl.int64), tl.program_id(0) % T
    o_d = tl.arange(0, BD)
    m_d = o_d < d
    dtype: tl.constexpr = sum_ptr.dtype.element_ty
    p_x, p_branch = x_ptr + i_b * stride_xb, branch_ptr + i_b * stride_rb
    p_own, p_joining = p_x + i_t * stride_xt, p_branch + i_t * stride_rt
    p_sum = sum_ptr + (i_b * T + i_t) * d
    b_x = joined(p_own + o_d * stride_xd, p_joining + o_d * stride_rd, m_d, BRANCH, dtype, INTERPRETED)  # [BD]
    tl.store(p_sum + o_d, b_x.to(dtype), mask=m_d)
    if SCORE:
        N, i_n, o_j = T - PREFIX, i_t - PREFIX, tl.arange(0, BJ)
        b_dims, m_j = dimensions(DIMS, BJ), o_j < len(DIMS)
        b_own = joined(p_own + b_dims * stride_xd, p_joining + b_dims * stride_rd, o_j >= 0, BRANCH, dtype, INTERPRETED)
        distracts = (token_score(b_x, b_own, m_d, SHIFTED) > threshold) & (i_n >= 0)
        tl.store(mask_ptr + i_b * N + i_n, distracts, mask=i_n >= 0)
        if not REPAIR:
            if i_n >= 0:
                tl.store(before_ptr + (i_b * N + i_n) * len(DIMS) + o_j, b_own.to(dtype), mask=m_j)
        elif distracts:
            i_near, m_near = neighbours(i_n, N // gw, gw, SIZE, BP)
            i_near, m_near = PREFIX + i_near[None, :], m_near[None, :] & m_j[:, None]  # [BJ, BP]
            p_near = p_x + i_near * stride_xt + b_dims[:, None] * stride_xd
            p_nearby = p_branch + i_near * stride_rt + b_dims[:, None] * stride_rd
            b_mean, b_exists = mean_of_neighbours(joined(p_near, p_nearby, m_near, BRANCH, dtype, INTERPRETED), m_near)
            tl.debug_barrier()  # other threads wrote these dimensions, and read them next
            tl.store(p_sum + b_dims, rounded(b_mean, dtype, INTERPRETED), mask=b_exists)
            tl.debug_barrier()
            b_x = tl.load(p_sum + o_d, mask=m_d, other=0.0).to(tl.float32)
    p_out = out_ptr + (i_b * T + i_t) * d
    store_norm(p_out, b_x, weight_ptr, bias_ptr, d, eps, 1, stride_w, stride_b, INTERPRETED)


@triton.jit
def quick_gelu_kernel(
    x_ptr,  # [n]
    out_ptr,  # [n]
    n,
    BN: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    b_x = tl.load(x_ptr + o_n, mask=o_n < n, other=0.0).to(tl.float32)
    b_out = b_x / (1.0 + tl.exp2(b_x * (-1.702 * LOG2E)))
    tl.store(out_ptr + o_n, b_out.to(out_ptr.dtype.element_ty), mask=o_n < n)


@operator("layer_norm")
def _layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    score: bool,
    repair: bool,
    dims: list[int],
    threshold: float,
    gw: int,
    shifted: bool,
    size: int,
    prefix: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, d = x.shape
    dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    total, out = (x.new_empty((B, T, d), dtype=dtype) for _ in range(2))
    mask = x.new_empty((B, T - prefix if score else 0), dtype=torch.bool)
    before = x.new_empty((B, T - prefix if score and not repair else 0, len(dims)), dtype=dtype)
    given = x if branch is None else branch
    if B:
        with on_device(x):
            wrap_triton(layer_norm_kernel)[(B * T,)](
                x_ptr=x,
                branch_ptr=given,
                weight_ptr=weight,
                bias_ptr=bias,
                sum_ptr=total,
                out_ptr=out,
                mask_ptr=mask,
                before_ptr=before,
                T=T,
                gw=gw,
                d=d,
                threshold=threshold,
                eps=eps,
                **strides("x", x, "btd"),
                **strides("r", given, "btd"),
                stride_w=weight.stride(0),
                stride_b=bias.stride(0),
                BRANCH=branch is not None,
                SCORE=score,
                REPAIR=repair,
                PREFIX=prefix,
                DIMS=tuple(dims),
                SHIFTED=shifted,
                SIZE=size,
                INTERPRETED=interpreted(),
                BD=triton.next_power_of_2(d),
                BJ=triton.next_power_of_2(max(1, len(dims))),
                BP=triton.next_power_of_2(size**2),
            )
    return total, out, mask, before


@operator("quick_gelu_", "out")
def _quick_gelu_(x: Tensor, out: Tensor) -> None:
    if x.numel():
        with on_device(x):
            wrap_triton(quick_gelu_kernel)[(triton.cdiv(x.numel(), BLOCK_NUMBERS),)](
                x_ptr=x, out_ptr=out, n=x.numel(), BN=BLOCK_NUMBERS
            )


def launch_add_layer_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """One launch."""
    check_launch(x=x, branch=branch, weight=weight, bias=bias)
    return _layer_norm(x, branch, weight, bias, eps, False, False, [], 0.0, 1, True, 1, 0)[:2]


def launch_repaired_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dims: list[int],
    threshold: float,
    gh: int,
    gw: int,
    shifted: bool,
    size: int,
    prefix: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch, which leaves x and branch as they are."""
    check_launch(x=x, branch=branch, weight=weight, bias=bias)
    return _layer_norm(x, branch, weight, bias, eps, True, True, dims, threshold, gw, shifted, size, prefix)[:3]


def launch_candidate_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dims: list[int],
    threshold: float,
    shifted: bool,
    prefix: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One launch."""
    check_launch(x=x, branch=branch, weight=weight, bias=bias)
    return _layer_norm(x, branch, weight, bias, eps, True, False, dims, threshold, 1, shifted, 1, prefix)


def launch_quick_gelu(x: Tensor, inplace: bool) -> Tensor:
    """One launch, and a copy or two of what is not contiguous."""
    check_launch(x=x)
    within = inplace and x.is_contiguous()
    out = x if within else torch.empty_like(x, memory_format=torch.contiguous_format)
    _quick_gelu_(x.contiguous(), out)
    return x.copy_(out) if inplace and not within else out
