"""The joint criterion of ViT-L/14, and the repair of the few tokens that meet it: the paper's appendix A, equation 13.

    a[j]  = (1 / (H N)) sum over h and patch queries i of softmax_j(q_h,i . k_h,j)
    T_dis = the candidates j with a[j] > threshold
    x[i, j] <- mean of x[n, j] over the neighbours n of i, for i in T_dis and j in D_dis
    y[i] <- the norm of x[i],  out[i] <- y[i] weight^T + bias,  for i in T_dis

Only the columns of candidates are summed, and only rows in T_dis are computed again. Which these are is known on the
device alone: every program lists them, and those that have nothing to do end. A program of the first kernel has the
rows of one block: it takes their log-sum-exp, and multiplies once more for the columns of the candidates. It leaves a
sum for each of them, and the next kernel adds up those of all blocks and heads, always in the same order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .attention import BLOCK_PATCHES, LOG2E, constants, dot, image_head_rows, positive, precision
from .distraction import dimensions, list_marked, mean_of_neighbours, neighbours
from .launch import check_launch, interpreted, on_device, operator, strides, wrap_triton
from .similarity import row_logsumexp
from .stream import rounded, store_norm

BLOCK_SUMS = 128


@triton.jit(do_not_specialize=["H", "T"])
def received_attention_kernel(
    q_ptr,  # [B, H, T, D]
    k_ptr,  # [B, H, T, D]
    candidates_ptr,  # [B, N] bool contiguous, read where CHOOSE
    list_ptr,  # [B, H * blocks of rows, N] int32, a list of them for each program, written where CHOOSE
    sums_ptr,  # [B, H * blocks of rows, N] fp32, written for candidates
    H,
    T,
    scale,  # times log2(e)
    stride_qb,
    stride_qh,
    stride_qt,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kd,
    CHOOSE: tl.constexpr,
    BLOCK: tl.constexpr,
    PREFIX: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    scale = positive(scale)
    N = T - PREFIX
    i_b, i_h, i_m = image_head_rows(H, N, BM)
    p_list = list_ptr + tl.program_id(0).to(tl.int64) * N
    n_columns = N
    if CHOOSE:
        n_columns = list_marked(candidates_ptr + i_b * N, p_list, 0, N, N, BLOCK)
        if n_columns == 0:
            return
    o_m = i_m * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_m, m_d = o_m < N, o_d < D
    p_q = q_ptr + i_b * stride_qb + i_h * stride_qh + (PREFIX + o_m[:, None]) * stride_qt + o_d[None, :] * stride_qd
    b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0)  # [BM, BD]
    p_k = k_ptr + i_b * stride_kb + i_h * stride_kh + o_d * stride_kd
    b_lse = row_logsumexp(b_q, p_k, m_d, T, scale, stride_kt, PREFIX, BN, PRECISION)
    p_sums = sums_ptr + ((i_b * H + i_h) * tl.cdiv(N, BM) + i_m) * N
    for start in range(0, n_columns, BN):
        o_n = start + tl.arange(0, BN)
        m_n = o_n < n_columns
        i_n = tl.load(p_list + o_n, mask=m_n, other=0) if CHOOSE else o_n
        m_k = m_d[:, None] & m_n[None, :]
        b_k = tl.load(p_k[:, None] + (PREFIX + i_n[None, :]) * stride_kt, mask=m_k, other=0.0)  # [BD, BN]
        b_p = tl.exp2(tl.fma(dot(b_q, b_k, PRECISION), scale, -b_lse[:, None]))  # [BM, BN]
        tl.store(p_sums + i_n, tl.sum(tl.where(m_m[:, None], b_p, 0.0), axis=0), mask=m_n)


@triton.jit(do_not_specialize=["H", "T", "gw", "P"])
def joint_repair_kernel(
    candidates_ptr,  # [B, N] bool contiguous
    sums_ptr,  # [B, P, N] fp32 contiguous, as the kernel above leaves them
    before_ptr,  # [B, N, |D_dis|] contiguous, the values of x before the update
    weight_ptr,  # [d]
    bias_ptr,  # [d]
    x_ptr,  # [B, T, d], updated
    y_ptr,  # [B, T, d], updated
    mask_ptr,  # [B, N] bool
    H,
    T,
    gw,
    P,
    d,
    threshold,
    eps,
    stride_w,
    stride_b,
    stride_xb,
    stride_xt,
    stride_xd,
    stride_yb,
    stride_yt,
    stride_yd,
    PREFIX: tl.constexpr,
    DIMS: tl.constexpr,  # tuple of int
    SIZE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
    BJ: tl.constexpr,
    BP: tl.constexpr,
):
    threshold, eps = tl.cast(threshold, tl.float32), tl.cast(eps, tl.float32)  # fp64 from some Inductors
    N = T - PREFIX
    i_b, i_n = (tl.program_id(0) // N).to(tl.int64), tl.program_id(0) % N
    distracts = tl.load(candidates_ptr + i_b * N + i_n) != 0
    if distracts:
        b_sum = tl.zeros([BS], tl.float32)
        for start in range(0, P, BS):
            o_p = start + tl.arange(0, BS)
            b_sum += tl.load(sums_ptr + (i_b * P + o_p) * N + i_n, mask=o_p < P, other=0.0)
        distracts = tl.div_rn(tl.sum(b_sum, axis=0), (H * N).to(tl.float32)) > threshold
    tl.store(mask_ptr + i_b * N + i_n, distracts)
    if distracts:
        i_near, m_near = neighbours(i_n, N // gw, gw, SIZE, BP)
        o_j, o_d = tl.arange(0, BJ), tl.arange(0, BD)
        m_near = m_near[None, :] & (o_j < len(DIMS))[:, None]  # [BJ, BP]
        p_near = before_ptr + (i_b * N + i_near[None, :]) * len(DIMS) + o_j[:, None]
        b_mean, b_exists = mean_of_neighbours(tl.load(p_near, mask=m_near, other=0.0), m_near)
        p_x = x_ptr + i_b * stride_xb + (PREFIX + i_n) * stride_xt
        p_y = y_ptr + i_b * stride_yb + (PREFIX + i_n) * stride_yt
        b_mean = rounded(b_mean, x_ptr.dtype.element_ty, INTERPRETED)
        tl.store(p_x + dimensions(DIMS, BJ) * stride_xd, b_mean, mask=b_exists)
        tl.debug_barrier()  # other threads wrote what is read next
        b_x = tl.load(p_x + o_d * stride_xd, mask=o_d < d, other=0.0).to(tl.float32)
        store_norm(p_y, b_x, weight_ptr, bias_ptr, d, eps, stride_yd, stride_w, stride_b, INTERPRETED)


@triton.jit(do_not_specialize=["T"])
def project_tokens_kernel(
    y_ptr,  # [B, T, d]
    mask_ptr,  # [B, N] bool contiguous
    weight_ptr,  # [e, d]
    bias_ptr,  # [e], read where BIAS
    list_ptr,  # [programs, BM] int32, the tokens of each program
    out_ptr,  # [B, T, e], updated
    T,
    d,
    e,
    stride_yb,
    stride_yt,
    stride_yd,
    stride_we,
    stride_wd,
    stride_b,
    stride_ob,
    stride_ot,
    stride_oe,
    BIAS: tl.constexpr,
    PREFIX: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BM: tl.constexpr,  # tokens
    BN: tl.constexpr,  # columns
    BD: tl.constexpr,  # dimensions that are multiplied at a time
    PRECISION: tl.constexpr,
):
    N, columns = T - PREFIX, tl.cdiv(e, BN)
    i_group, i_e = tl.program_id(0) // columns, tl.program_id(0) % columns
    i_b, i_m = (i_group // tl.cdiv(N, BM)).to(tl.int64), i_group % tl.cdiv(N, BM)
    p_list = list_ptr + tl.program_id(0).to(tl.int64) * BM
    n_tokens = list_marked(mask_ptr + i_b * N, p_list, i_m * BM, BM, N, BLOCK)
    if i_m * BM >= n_tokens:
        return
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    o_m, o_e, o_d = i_m * BM + tl.arange(0, BM), i_e * BN + tl.arange(0, BN), tl.arange(0, BD)
    m_m, m_e = o_m < n_tokens, o_e < e
    i_t = PREFIX + tl.load(p_list + tl.arange(0, BM), mask=m_m, other=0)
    p_y = y_ptr + i_b * stride_yb + i_t[:, None] * stride_yt
    p_weight = weight_ptr + o_e[None, :] * stride_we
    b_out = tl.zeros([BM, BN], tl.float32)
    for start in range(0, d, BD):
        i_d = start + o_d
        b_y = tl.load(p_y + i_d[None, :] * stride_yd, mask=m_m[:, None] & (i_d < d)[None, :], other=0.0)  # [BM, BD]
        m_w = (i_d < d)[:, None] & m_e[None, :]
        b_w = tl.load(p_weight + i_d[:, None] * stride_wd, mask=m_w, other=0.0)  # [BD, BN]
        b_out += dot(rounded(b_y, dtype, INTERPRETED), rounded(b_w, dtype, INTERPRETED), PRECISION)
    if BIAS:
        b_out += tl.load(bias_ptr + o_e * stride_b, mask=m_e, other=0.0).to(tl.float32)[None, :]
    p_out = out_ptr + i_b * stride_ob + i_t[:, None] * stride_ot + o_e[None, :] * stride_oe
    tl.store(p_out, rounded(b_out, dtype, INTERPRETED), mask=m_m[:, None] & m_e[None, :])


@operator("received_attention")
def _received_attention(q: Tensor, k: Tensor, candidates: Tensor | None, scale: float, prefix: int) -> Tensor:
    """Sums over blocks of rows, [B, heads and blocks, N]; all of them together are H N a."""
    B, H, T, D = q.shape
    N, options = T - prefix, constants("received_attention", q, prefix)
    blocks = triton.cdiv(N, options["BM"])
    sums = q.new_empty((B, H * blocks, N), dtype=torch.float32)
    listed = q.new_empty((0,) if candidates is None else sums.shape, dtype=torch.int32)
    if B:
        with on_device(q):
            wrap_triton(received_attention_kernel)[(blocks * B * H,)](
                q_ptr=q,
                k_ptr=k,
                candidates_ptr=q if candidates is None else candidates,
                list_ptr=listed,
                sums_ptr=sums,
                H=H,
                T=T,
                scale=scale * LOG2E.value,
                **strides("q", q, "bhtd"),
                **strides("k", k, "bhtd"),
                CHOOSE=candidates is not None,
                BLOCK=BLOCK_PATCHES,
                PREFIX=prefix,
                **options,
            )
    return sums


@operator("joint_repair_", "x", "y")
def _joint_repair_(
    x: Tensor,
    y: Tensor,
    before: Tensor,
    candidates: Tensor,
    sums: Tensor,
    heads: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dims: list[int],
    threshold: float,
    gw: int,
    size: int,
    prefix: int,
) -> Tensor:
    B, T, d = x.shape
    mask = candidates.new_empty((B, T - prefix))
    if B:
        with on_device(x):
            wrap_triton(joint_repair_kernel)[(B * (T - prefix),)](
                candidates_ptr=candidates,
                sums_ptr=sums,
                before_ptr=before,
                weight_ptr=weight,
                bias_ptr=bias,
                x_ptr=x,
                y_ptr=y,
                mask_ptr=mask,
                H=heads,
                T=T,
                gw=gw,
                P=sums.shape[1],
                d=d,
                threshold=threshold,
                eps=eps,
                stride_w=weight.stride(0),
                stride_b=bias.stride(0),
                **strides("x", x, "btd"),
                **strides("y", y, "btd"),
                PREFIX=prefix,
                DIMS=tuple(dims),
                SIZE=size,
                INTERPRETED=interpreted(),
                BS=BLOCK_SUMS,
                BD=triton.next_power_of_2(d),
                BJ=triton.next_power_of_2(len(dims)),
                BP=triton.next_power_of_2(size**2),
            )
    return mask


def projection_options(out: Tensor) -> dict[str, int]:
    """Tile sizes, warps and stages of `project_tokens_kernel`; `make report` checks that none of them spills."""
    rows, depth = (32, 32) if out.dtype == torch.float32 else (64, 64)
    stages = 1 if tiles.architecture(out.device).startswith("gfx") else 4
    return {"BM": rows, "BN": 64, "BD": depth, "num_warps": 4, "num_stages": stages}


@operator("project_tokens_", "out")
def _project_tokens_(y: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, prefix: int) -> None:
    B, T, e = out.shape
    options = projection_options(out)
    rows, columns = options["BM"], options["BN"]
    programs = triton.cdiv(e, columns) * triton.cdiv(T - prefix, rows) * B
    if B:
        given = weight if bias is None else bias
        with on_device(y):
            wrap_triton(project_tokens_kernel)[(programs,)](
                y_ptr=y,
                mask_ptr=mask,
                weight_ptr=weight,
                bias_ptr=given,
                list_ptr=y.new_empty((programs, rows), dtype=torch.int32),
                out_ptr=out,
                T=T,
                d=y.shape[2],
                e=e,
                **strides("y", y, "btd"),
                **strides("w", weight, "ed"),
                stride_b=given.stride(0),
                **strides("o", out, "bte"),
                BIAS=bias is not None,
                PREFIX=prefix,
                BLOCK=BLOCK_PATCHES,
                INTERPRETED=interpreted(),
                PRECISION=precision(out),
                **options,
            )


def launch_received_attention(q: Tensor, k: Tensor, scale: float, prefix: int) -> Tensor:
    """One launch, whose sums PyTorch adds up; no matrix is stored."""
    check_launch(q.shape[-1], q=q, k=k)
    _, H, T, _ = q.shape
    return _received_attention(q, k, None, scale, prefix).sum(dim=1) / (H * (T - prefix))


def launch_joint_repair(
    x: Tensor,
    y: Tensor,
    before: Tensor,
    candidates: Tensor,
    q: Tensor,
    k: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dims: list[int],
    threshold: float,
    gh: int,
    gw: int,
    size: int,
    scale: float,
    prefix: int,
) -> Tensor:
    """Two launches, the second of which updates x and y in place."""
    check_launch(q.shape[-1], q=q, k=k, x=x, y=y, before=before, candidates=candidates, weight=weight, bias=bias)
    candidates = candidates.contiguous()
    sums = _received_attention(q, k, candidates, scale, prefix)
    given = (before.contiguous(), candidates, sums, q.shape[1], weight, bias)
    return _joint_repair_(x, y, *given, eps, dims, threshold, gw, size, prefix)


def launch_project_tokens(
    y: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, prefix: int
) -> None:
    """One launch, in place."""
    check_launch(y=y, mask=mask, weight=weight, bias=bias, out=out)
    _project_tokens_(y, mask.contiguous(), weight, bias, out, prefix)
