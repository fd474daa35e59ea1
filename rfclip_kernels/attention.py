"""Attention that re-weights columns by group, without a T x T matrix: equations 9 to 12 and 14 of the paper.

Refocused attention, for the row of a patch, with keys in T (target), S (distraction) and R (the rest, CLS included):

    out = o_R + (1 - beta) o_S + (1 + beta m_S / m_T) o_T,   m_G the softmax mass of a group and o_G its sum of p v

The keys of each image are ordered on the device, T first, and swept in two runs of an online softmax. Only T's factor
depends on the whole row, so the second run adds S and R to one accumulator, and two accumulators are enough. The runs
merge through their maxima and sums. What S loses is given to T as `beta m_S` times T's own softmax, which needs no
division by a mass that might underflow, and rows keep summing to 1 by construction.

Proxy attention, for patches: (1 / L) sum over l of softmax(k_l k_l^T) v, CLS being a key whose value counts as 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from rfclip_kernels.checks import check_number, refuse_gradients, tensor_sizes

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
def softmax_step(b_s, b_max, b_sum, b_acc):
    """One step of the online softmax, in base 2: b_s [BM, BN] logits. Returns p, and the rescaled state."""
    b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
    b_shrink = tl.exp2(b_max - b_new)
    b_p = tl.exp2(b_s - b_new[:, None])  # [BM, BN]
    return b_p, b_new, b_sum * b_shrink + tl.sum(b_p, axis=1), b_acc * b_shrink[:, None], b_shrink


@triton.jit
def refocused_attention_kernel(
    q_ptr,  # [B, H, T, D]
    k_ptr,  # [B, H, T, D]
    v_ptr,  # [B, H, T, D]
    order_ptr,  # [B, T] int32, the keys of T first
    taken_ptr,  # [B, T] bool, in that order: is the key one of S
    count_ptr,  # [B] int32, the number of keys in T
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
    p_k = k_ptr + i_b * stride_kb + i_h * stride_kh + o_d[:, None] * stride_kd
    p_v = v_ptr + i_b * stride_vb + i_h * stride_vh + o_d[None, :] * stride_vd
    p_order, p_taken = order_ptr + i_b * T, taken_ptr + i_b * T
    n_target = tl.load(count_ptr + i_b)
    # The row of CLS, and every row of an image without target, stays as it is.
    b_beta = tl.where((o_m > 0) & (n_target > 0), beta, 0.0)  # [BM]

    b_max = tl.full([BM], -1e30, tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, BD], tl.float32)
    for start in range(0, n_target, BN):
        o_n = start + tl.arange(0, BN)
        m_n = o_n < n_target
        i_k = tl.load(p_order + o_n, mask=m_n, other=0)
        b_k = tl.load(p_k + i_k[None, :] * stride_kt, mask=m_d[:, None] & m_n[None, :], other=0.0)  # [BD, BN]
        # [BM, BD] @ [BD, BN] -> [BM, BN]
        b_s = tl.where(m_n[None, :], dot(b_q, b_k, PRECISION) * scale, float("-inf"))
        b_p, b_max, b_sum, b_acc, b_shrink = softmax_step(b_s, b_max, b_sum, b_acc)
        b_v = tl.load(p_v + i_k[:, None] * stride_vt, mask=m_n[:, None] & m_d[None, :], other=0.0)
        b_acc += dot(b_p.to(b_v.dtype), b_v, PRECISION)  # [BM, BN] @ [BN, BD] -> [BM, BD]

    b_max_rest = tl.full([BM], -1e30, tl.float32)
    b_sum_rest = tl.zeros([BM], tl.float32)
    b_sum_taken = tl.zeros([BM], tl.float32)  # of S alone
    b_acc_rest = tl.zeros([BM, BD], tl.float32)
    for start in range(n_target, T, BN):
        o_n = start + tl.arange(0, BN)
        m_n = o_n < T
        i_k = tl.load(p_order + o_n, mask=m_n, other=0)
        m_taken = tl.load(p_taken + o_n, mask=m_n, other=0) != 0
        b_k = tl.load(p_k + i_k[None, :] * stride_kt, mask=m_d[:, None] & m_n[None, :], other=0.0)
        b_s = tl.where(m_n[None, :], dot(b_q, b_k, PRECISION) * scale, float("-inf"))
        b_p, b_max_rest, b_sum_rest, b_acc_rest, b_shrink = softmax_step(b_s, b_max_rest, b_sum_rest, b_acc_rest)
        b_sum_taken = b_sum_taken * b_shrink + tl.sum(tl.where(m_taken[None, :], b_p, 0.0), axis=1)
        b_p = tl.where(m_taken[None, :], b_p * (1 - b_beta)[:, None], b_p)
        b_v = tl.load(p_v + i_k[:, None] * stride_vt, mask=m_n[:, None] & m_d[None, :], other=0.0)
        b_acc_rest += dot(b_p.to(b_v.dtype), b_v, PRECISION)

    b_top = tl.maximum(b_max, b_max_rest)
    b_target, b_rest = tl.exp2(b_max - b_top), tl.exp2(b_max_rest - b_top)
    b_given = b_beta * b_sum_taken * b_rest / tl.where(b_sum > 0, b_sum, 1.0)
    b_out = b_acc_rest * b_rest[:, None] + b_acc * (b_target + b_given)[:, None]
    b_out = b_out / (b_sum * b_target + b_sum_rest * b_rest)[:, None]
    p_out = out_ptr + ((i_b * T + o_m[:, None]) * H + i_h) * D + o_d[None, :]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_q)


@triton.jit
def proxy_attention_kernel(
    k_ptr,  # [L, B, H, T, D]
    v_ptr,  # [B, H, T, D]
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
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    o_m = 1 + tl.program_id(0) * BM + tl.arange(0, BM)  # rows of patches
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    m_m = (o_m < T)[:, None] & m_d[None, :]
    p_v = v_ptr + i_b * stride_vb + i_h * stride_vh + o_d[None, :] * stride_vd
    p_k = k_ptr + i_b * stride_kb + i_h * stride_kh
    b_out = tl.zeros([BM, BD], tl.float32)
    for _layer in range(0, L):
        b_q = tl.load(p_k + o_m[:, None] * stride_kt + o_d[None, :] * stride_kd, mask=m_m, other=0.0)  # [BM, BD]
        b_max = tl.full([BM], -1e30, tl.float32)
        b_sum = tl.zeros([BM], tl.float32)
        b_acc = tl.zeros([BM, BD], tl.float32)
        for start in range(0, T, BN):
            o_n = start + tl.arange(0, BN)
            m_n = o_n < T
            m_k = m_d[:, None] & m_n[None, :]
            b_k = tl.load(p_k + o_n[None, :] * stride_kt + o_d[:, None] * stride_kd, mask=m_k, other=0.0)  # [BD, BN]
            b_s = tl.where(m_n[None, :], dot(b_q, b_k, PRECISION) * scale, float("-inf"))
            b_p, b_max, b_sum, b_acc, b_shrink = softmax_step(b_s, b_max, b_sum, b_acc)
            m_v = (m_n & (o_n > 0))[:, None] & m_d[None, :]  # the value of CLS counts as 0
            b_v = tl.load(p_v + o_n[:, None] * stride_vt, mask=m_v, other=0.0)
            b_acc += dot(b_p.to(b_v.dtype), b_v, PRECISION)
        b_out += b_acc / b_sum[:, None]
        p_k += stride_kl
    p_out = out_ptr + ((i_b * (T - 1) + o_m[:, None] - 1) * H + i_h) * D + o_d[None, :]
    tl.store(p_out, (b_out / L).to(out_ptr.dtype.element_ty), mask=m_m)


def launch_options(D: int, dtype: torch.dtype, hip: bool) -> dict[str, int]:
    """Tile sizes, warps and stages for a head dimension; `python -m rfclip_kernels.report` finds no spill in any."""
    single = dtype == torch.float32
    return {
        "BM": 64 if not single else 32 if D <= 64 else 16,
        "BN": 32,
        "BD": max(16, triton.next_power_of_2(D)),
        "num_warps": 8 if single or D > 64 else 4,
        "num_stages": 1 if hip else 2,
    }


def precision(hip: bool) -> str:
    """How fp32 tiles are multiplied: three tf32 products on NVIDIA's tensor cores, whose error is that of fp32."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    return "ieee" if hip else "tf32x3"


@triton_op("rfclip::refocused_attention", mutates_args={})
def _refocused_attention(
    q: Tensor, k: Tensor, v: Tensor, distraction: Tensor, target: Tensor, beta: float, scale: float
) -> Tensor:
    B, H, T, D = q.shape
    taken = torch.nn.functional.pad(distraction, (1, 0))  # [B, T]
    given = torch.nn.functional.pad(target, (T - target.shape[1], 0)) & ~taken
    order = torch.argsort(~given, dim=1, stable=True)
    out = q.new_empty((B, T, H, D))
    hip = torch.version.hip is not None
    options = launch_options(D, q.dtype, hip)
    if B:
        wrap_triton(refocused_attention_kernel)[(triton.cdiv(T, options["BM"]), B * H)](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            order_ptr=order.to(torch.int32),
            taken_ptr=taken.gather(1, order),
            count_ptr=given.sum(dim=1, dtype=torch.int32),
            out_ptr=out,
            H=H,
            T=T,
            beta=beta,
            scale=scale * LOG2E.value,
            **strides("q", q, "bhtd"),
            **strides("k", k, "bhtd"),
            **strides("v", v, "bhtd"),
            D=D,
            PRECISION=precision(hip),
            **options,
        )
    return out


@triton_op("rfclip::proxy_attention", mutates_args={})
def _proxy_attention(keys: Tensor, v: Tensor, scale: float) -> Tensor:
    L, B, H, T, D = keys.shape
    out = v.new_empty((B, T - 1, H, D))
    hip = torch.version.hip is not None
    options = launch_options(D, v.dtype, hip)
    if B:
        wrap_triton(proxy_attention_kernel)[(triton.cdiv(T - 1, options["BM"]), B * H)](
            k_ptr=keys,
            v_ptr=v,
            out_ptr=out,
            L=L,
            H=H,
            T=T,
            scale=scale * LOG2E.value,
            **strides("k", keys, "lbhtd"),
            **strides("v", v, "bhtd"),
            D=D,
            PRECISION=precision(hip),
            **options,
        )
    return out


def strides(name: str, tensor: Tensor, axes: str) -> dict[str, int]:
    return {f"stride_{name}{axis}": stride for axis, stride in zip(axes, tensor.stride(), strict=True)}


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
        ValueError: as the reference; an input is float64 or requires a gradient.
    """
    sizes = tensor_sizes("q", q, "B H T D")
    tensor_sizes("k", k, "B H T D", sizes, q.dtype)
    tensor_sizes("v", v, "B H T D", sizes, q.dtype)
    tensor_sizes("distraction", distraction, "B N", sizes, torch.bool)
    tensor_sizes("target", target, "B N | B T", sizes, torch.bool)
    check_number("beta", beta, 0, 1)
    scale = sizes["D"] ** -0.5 if scale is None else scale
    check_number("scale", scale)
    refuse_gradients(q=q, k=k, v=v)
    return _refocused_attention(q, k, v, distraction, target, float(beta), float(scale)).transpose(1, 2)


def proxy_attention(keys: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """`rfclip.reference.proxy_attention` as L flash sweeps into one accumulator.

    Args:
        keys, v: [L, B, H, T, D] and [B, H, T, D] of one dtype, fp32, fp16 or bf16, with any strides.
        scale: as the reference.

    Returns:
        [B, H, N, D] of that dtype, a view of memory laid out [B, N, H, D]. Logits, softmax and sums are fp32.

    Raises:
        ValueError: as the reference; an input is float64 or requires a gradient.
    """
    sizes = tensor_sizes("keys", keys, "L B H T D")
    tensor_sizes("v", v, "B H T D", sizes, keys.dtype)
    scale = sizes["D"] ** -0.5 if scale is None else scale
    check_number("scale", scale)
    refuse_gradients(keys=keys, v=v)
    return _proxy_attention(keys, v, float(scale)).transpose(1, 2)
