"""Attention that re-weights columns by group, without a T x T matrix: equations 9 to 12 and 14 of the paper.

Refocused attention, for the row of a patch, with keys in T (target), S (distraction) and R (the rest, CLS included):

    out = o_R + (1 - beta) o_S + (1 + beta m_S / m_T) o_T,   m_G the softmax mass of a group and o_G its sum of p v

The patches of each image are ordered on the device, T first, and swept as keys in two runs of an online softmax. Only
T's factor depends on the whole row, so the second run adds S and R to one accumulator: two accumulators are enough. The
runs merge through their maxima and sums. What S loses is given to T as `beta m_S` times T's own softmax, which needs no
division by a mass that might underflow, and rows keep summing to 1 by construction. CLS is where a run starts, so that
the tiles hold the N keys of the patches, and N is rounder than N + 1.

Self-attention of a vector with itself, as the peers use it: softmax(u u^T + bias) v. The bias depends on the offset of
two patches on the grid, and is read from a table of offsets. Proxy attention is the same sweep, L times into one
accumulator: (1 / L) sum over l of softmax(k_l k_l^T) v for the rows of patches, the value of CLS counting as 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from rfclip_kernels.checks import (
    check_head_dimension,
    check_launch,
    on_device,
    proxy_inputs,
    refocused_inputs,
    refuse_heads,
    self_inputs,
)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """The product of two tiles, in fp32.

    PRECISION is that of fp32 inputs, or "interpreter": that one reads bf16 as raw integers, so both are widened first.
    """
    if PRECISION == "interpreter":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def softmax_step(b_s, b_max, b_sum):
    """One step of the online softmax, in base 2: b_s [BM, BN] logits, above the -1e30 of a maximum over nothing.

    Returns p, the new maximum and sum, and the factor that what was accumulated before has to take.
    """
    b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
    b_shrink = tl.exp2(b_max - b_new)
    b_p = tl.exp2(b_s - b_new[:, None])  # [BM, BN]
    return b_p, b_new, b_sum * b_shrink + tl.sum(b_p, axis=1), b_shrink


@triton.jit
def cls_logits(b_q, p_k, m_d, scale):
    """The logits of the key of CLS, which p_k points to: [BM]."""
    b_k = tl.load(p_k, mask=m_d, other=0.0).to(tl.float32)  # [BD]
    return tl.sum(b_q.to(tl.float32) * b_k[None, :], axis=1) * scale


@triton.jit(do_not_specialize=["H", "T"])
def refocused_attention_kernel(
    q_ptr,  # [B, H, T, D]
    k_ptr,  # [B, H, T, D]
    v_ptr,  # [B, H, T, D]
    order_ptr,  # [B, N] int32, the patches of T first, numbered as tokens
    taken_ptr,  # [B, N] bool, in that order: is the patch one of S
    count_ptr,  # [B] int32, the number of patches in T
    cls_ptr,  # [B] bool, is CLS in T
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
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    m_q = (o_m < T)[:, None] & m_d[None, :]
    p_q = q_ptr + i_b * stride_qb + i_h * stride_qh + o_m[:, None] * stride_qt + o_d[None, :] * stride_qd
    b_q = tl.load(p_q, mask=m_q, other=0.0)  # [BM, BD]
    p_k = k_ptr + i_b * stride_kb + i_h * stride_kh + o_d * stride_kd
    p_v = v_ptr + i_b * stride_vb + i_h * stride_vh + o_d * stride_vd
    N = T - 1
    p_order, p_taken = order_ptr + i_b * N, taken_ptr + i_b * N
    n_target = tl.load(count_ptr + i_b)
    with_cls = tl.load(cls_ptr + i_b) != 0
    # The row of CLS, and every row of an image without target, stays as it is.
    b_beta = tl.where((o_m > 0) & ((n_target > 0) | with_cls), beta, 0.0)  # [BM]
    b_cls = cls_logits(b_q, p_k, m_d, scale)
    b_v_cls = tl.load(p_v, mask=m_d, other=0.0).to(tl.float32)  # [BD]

    b_max = tl.where(with_cls, b_cls, -1e30)
    b_sum = tl.zeros([BM], tl.float32) + tl.where(with_cls, 1.0, 0.0)
    b_acc = tl.zeros([BM, BD], tl.float32) + tl.where(with_cls, b_v_cls, 0.0)[None, :]
    for start in range(0, n_target, BN):
        o_n = start + tl.arange(0, BN)
        m_n = o_n < n_target
        i_k = tl.load(p_order + o_n, mask=m_n, other=0)
        m_k = m_d[:, None] & m_n[None, :]
        b_k = tl.load(p_k[:, None] + i_k[None, :] * stride_kt, mask=m_k, other=0.0)  # [BD, BN]
        # [BM, BD] @ [BD, BN] -> [BM, BN]
        b_s = tl.where(m_n[None, :], dot(b_q, b_k, PRECISION) * scale, float("-inf"))
        b_p, b_max, b_sum, b_shrink = softmax_step(b_s, b_max, b_sum)
        b_v = tl.load(p_v[None, :] + i_k[:, None] * stride_vt, mask=m_n[:, None] & m_d[None, :], other=0.0)
        b_acc = b_acc * b_shrink[:, None] + dot(b_p.to(b_v.dtype), b_v, PRECISION)  # [BM, BN] @ [BN, BD] -> [BM, BD]

    b_max_rest = tl.where(with_cls, -1e30, b_cls)
    b_sum_rest = tl.zeros([BM], tl.float32) + tl.where(with_cls, 0.0, 1.0)
    b_sum_taken = tl.zeros([BM], tl.float32)  # of S alone
    b_acc_rest = tl.zeros([BM, BD], tl.float32) + tl.where(with_cls, 0.0, b_v_cls)[None, :]
    for start in range(n_target, N, BN):
        o_n = start + tl.arange(0, BN)
        m_n = o_n < N
        i_k = tl.load(p_order + o_n, mask=m_n, other=0)
        m_taken = tl.load(p_taken + o_n, mask=m_n, other=0) != 0
        m_k = m_d[:, None] & m_n[None, :]
        b_k = tl.load(p_k[:, None] + i_k[None, :] * stride_kt, mask=m_k, other=0.0)
        b_s = tl.where(m_n[None, :], dot(b_q, b_k, PRECISION) * scale, float("-inf"))
        b_p, b_max_rest, b_sum_rest, b_shrink = softmax_step(b_s, b_max_rest, b_sum_rest)
        b_sum_taken = b_sum_taken * b_shrink + tl.sum(tl.where(m_taken[None, :], b_p, 0.0), axis=1)
        b_p = tl.where(m_taken[None, :], b_p * (1 - b_beta)[:, None], b_p)
        b_v = tl.load(p_v[None, :] + i_k[:, None] * stride_vt, mask=m_n[:, None] & m_d[None, :], other=0.0)
        b_acc_rest = b_acc_rest * b_shrink[:, None] + dot(b_p.to(b_v.dtype), b_v, PRECISION)

    b_top = tl.maximum(b_max, b_max_rest)
    b_target, b_rest = tl.exp2(b_max - b_top), tl.exp2(b_max_rest - b_top)
    b_given = b_beta * b_sum_taken * b_rest / tl.where(b_sum > 0, b_sum, 1.0)
    b_out = b_acc_rest * b_rest[:, None] + b_acc * (b_target + b_given)[:, None]
    b_out = b_out / (b_sum * b_target + b_sum_rest * b_rest)[:, None]
    p_out = out_ptr + ((i_b * T + o_m[:, None]) * H + i_h) * D + o_d[None, :]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_q)


@triton.jit(do_not_specialize=["H", "T"])
def self_attention_kernel(
    u_ptr,  # [L, B, H, T, D]
    v_ptr,  # [B, H, T, D]
    bias_ptr,  # [2 gh - 1, 2 gw - 1] fp32 contiguous, read where BIAS
    out_ptr,  # [B, T - FIRST, H, D] contiguous
    L,
    H,
    T,
    gh,
    gw,
    scale,  # times log2(e)
    stride_ul,
    stride_ub,
    stride_uh,
    stride_ut,
    stride_ud,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_vd,
    BIAS: tl.constexpr,
    FIRST: tl.constexpr,  # 1 drops the row and the column of CLS after the softmax
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    o_m = FIRST + tl.program_id(0) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    m_m = (o_m < T)[:, None] & m_d[None, :]
    p_v = v_ptr + i_b * stride_vb + i_h * stride_vh + o_d * stride_vd
    p_u = u_ptr + i_b * stride_ub + i_h * stride_uh + o_d * stride_ud
    b_cls = tl.load(p_v, mask=m_d & (FIRST == 0), other=0.0).to(tl.float32)  # [BD]
    # The bias of patches m and n is at (row_m - row_n + gh - 1) (2 gw - 1) + column_m - column_n + gw - 1.
    i_m = o_m - 1
    to_m = (i_m // gw + gh - 1) * (2 * gw - 1) + i_m % gw + gw - 1
    m_biased = (i_m >= 0) & (o_m < T)  # the row of CLS has none
    b_out = tl.zeros([BM, BD], tl.float32)
    for _layer in range(0, L):
        b_q = tl.load(p_u[None, :] + o_m[:, None] * stride_ut, mask=m_m, other=0.0)  # [BM, BD]
        b_max = cls_logits(b_q, p_u, m_d, scale)
        b_sum = tl.full([BM], 1.0, tl.float32)
        b_acc = tl.zeros([BM, BD], tl.float32) + b_cls[None, :]
        for start in range(1, T, BN):
            o_n = start + tl.arange(0, BN)
            m_n = o_n < T
            m_k = m_d[:, None] & m_n[None, :]
            b_k = tl.load(p_u[:, None] + o_n[None, :] * stride_ut, mask=m_k, other=0.0)  # [BD, BN]
            b_s = dot(b_q, b_k, PRECISION) * scale
            if BIAS:
                i_n = o_n - 1
                from_n = i_n // gw * (2 * gw - 1) + i_n % gw
                m_bias = m_biased[:, None] & m_n[None, :]
                b_s += tl.load(bias_ptr + to_m[:, None] - from_n[None, :], mask=m_bias, other=0.0) * LOG2E
            b_p, b_max, b_sum, b_shrink = softmax_step(tl.where(m_n[None, :], b_s, float("-inf")), b_max, b_sum)
            b_v = tl.load(p_v[None, :] + o_n[:, None] * stride_vt, mask=m_n[:, None] & m_d[None, :], other=0.0)
            b_acc = b_acc * b_shrink[:, None] + dot(b_p.to(b_v.dtype), b_v, PRECISION)
        b_out += b_acc / b_sum[:, None]
        p_u += stride_ul
    p_out = out_ptr + ((i_b * (T - FIRST) + o_m[:, None] - FIRST) * H + i_h) * D + o_d[None, :]
    tl.store(p_out, (b_out / L).to(out_ptr.dtype.element_ty), mask=m_m)


def launch_options(D: int, dtype: torch.dtype, hip: bool) -> dict[str, int]:
    """Tile sizes, warps and stages for a head dimension; `python -m rfclip_kernels.report` finds no spill in any."""
    if dtype == torch.float32:
        rows, columns, warps = (32 if D <= 64 else 16), 32, 8
    else:
        rows, columns, warps = (64, 32, 4) if D <= 64 else (32, 64, 4)
    return {
        "BM": rows,
        "BN": columns,
        "BD": max(16, triton.next_power_of_2(D)),
        "num_warps": warps,
        "num_stages": 1 if hip else 2,
    }


def precision(hip: bool) -> str:
    """How fp32 tiles are multiplied: three tf32 products on NVIDIA's tensor cores, whose error is that of fp32."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    return "ieee" if hip else "tf32x3"


def on_hip() -> bool:
    return torch.version.hip is not None


def constants(D: int, dtype: torch.dtype) -> dict[str, object]:
    """Compile-time arguments and launch options of the kernels that multiply tiles [., D], D at most 128."""
    check_head_dimension(D)
    return launch_options(D, dtype, on_hip()) | {"D": D, "PRECISION": precision(on_hip())}


def strides(name: str, tensor: Tensor, axes: str) -> dict[str, int]:
    return {f"stride_{name}{axis}": stride for axis, stride in zip(axes, tensor.stride(), strict=True)}


@triton_op("rfclip::refocused_attention", mutates_args={})
def _refocused_attention(
    q: Tensor, k: Tensor, v: Tensor, distraction: Tensor, target: Tensor, beta: float, scale: float
) -> Tensor:
    B, H, T, D = q.shape
    with_cls = target[:, 0] if target.shape[1] == T else target.new_zeros(B)
    given = (target[:, -(T - 1) :] & ~distraction).contiguous()  # [B, N]; what is made of it is contiguous, too
    order = torch.argsort(~given, dim=1, stable=True)
    out = q.new_empty((B, T, H, D))
    options = constants(D, q.dtype)
    if B:
        with on_device(q):
            wrap_triton(refocused_attention_kernel)[(triton.cdiv(T, options["BM"]), B * H)](
                q_ptr=q,
                k_ptr=k,
                v_ptr=v,
                order_ptr=order.to(torch.int32) + 1,
                taken_ptr=distraction.gather(1, order),
                count_ptr=given.sum(dim=1, dtype=torch.int32),
                cls_ptr=with_cls.contiguous(),
                out_ptr=out,
                H=H,
                T=T,
                beta=beta,
                scale=scale * LOG2E.value,
                **strides("q", q, "bhtd"),
                **strides("k", k, "bhtd"),
                **strides("v", v, "bhtd"),
                **options,
            )
    return out


@triton_op("rfclip::self_attention", mutates_args={})
def _self_attention(u: Tensor, v: Tensor, bias: Tensor | None, scale: float, first: int) -> Tensor:
    L, B, H, T, D = u.shape
    gh, gw = (1, 1) if bias is None else ((side + 1) // 2 for side in bias.shape)
    out = v.new_empty((B, T - first, H, D))
    options = constants(D, v.dtype)
    if B:
        with on_device(v):
            wrap_triton(self_attention_kernel)[(triton.cdiv(T - first, options["BM"]), B * H)](
                u_ptr=u,
                v_ptr=v,
                bias_ptr=out if bias is None else bias.float().contiguous(),
                out_ptr=out,
                L=L,
                H=H,
                T=T,
                gh=gh,
                gw=gw,
                scale=scale * LOG2E.value,
                **strides("u", u, "lbhtd"),
                **strides("v", v, "bhtd"),
                BIAS=bias is not None,
                FIRST=first,
                **options,
            )
    return out


def refocused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    distraction: Tensor,
    target: Tensor,
    beta: float,
    *,
    scale: float | None = None,
) -> Tensor:
    """`rfclip.reference.refocused_attention` as one flash sweep over keys ordered by group.

    Args:
        q, k, v: [B, H, T, D] of one dtype, fp32, fp16 or bf16, with any strides: views of a packed projection are read
            in place.
        distraction, target, beta, scale: as the reference.

    Returns:
        [B, H, T, D] of that dtype, a view of memory laid out [B, T, H, D], as the output projection reads it. Logits,
        softmax and sums are fp32. Where the reference leaves a row unchanged because its mass on the target underflows,
        this gives what exact arithmetic gives.

    Raises:
        ValueError: as the reference, and as `rfclip_kernels.checks.check_launch`.
    """
    scale = refocused_inputs(q, k, v, distraction, target, beta, scale)
    check_launch(q=q, k=k, v=v, distraction=distraction, target=target)
    return _refocused_attention(q, k, v, distraction, target, float(beta), scale).transpose(1, 2)


def self_attention(u: Tensor, v: Tensor, bias: Tensor | None = None, *, scale: float | None = None) -> Tensor:
    """`rfclip.reference.self_attention` as one flash sweep; the bias is looked up, and never a matrix in memory.

    Args:
        u, v: [B, H, T, D] of one dtype, fp32, fp16 or bf16, with any strides.
        bias, scale: as the reference.

    Returns:
        [B, H, T, D] of that dtype, a view of memory laid out [B, T, H, D]. Logits, softmax and sums are fp32.

    Raises:
        ValueError: as the reference, and as `rfclip_kernels.checks.check_launch`.
    """
    scale = self_inputs(u, v, bias, scale)
    check_launch(u=u, v=v, bias=bias)
    return _self_attention(u[None], v, bias, scale, 0).transpose(1, 2)


def proxy_attention(
    keys: Tensor, v: Tensor, *, scale: float | None = None, heads: None = None, count: int = 0
) -> Tensor:
    """`rfclip.reference.proxy_attention` as L flash sweeps into one accumulator.

    Args:
        keys, v: [L, B, H, T, D] and [B, H, T, D] of one dtype, fp32, fp16 or bf16, with any strides.
        scale: as the reference.
        heads, count: None and 0; nothing is kept for each head.

    Returns:
        [B, H, N, D] of that dtype, a view of memory laid out [B, N, H, D]. Logits, softmax and sums are fp32.

    Raises:
        ValueError: as the reference, and as `rfclip_kernels.checks.check_launch`.
    """
    scale = proxy_inputs(keys, v, scale, heads, count)
    check_launch(keys=keys, v=v)
    refuse_heads(heads)
    return _self_attention(keys, v, None, scale, 1).transpose(1, 2)
