"""The graph cut that finds defocused tokens: equation 8 of the paper, and the threshold below it.

(Deg - W) y = lambda Deg y,  W = (S + S^T) / 2,  Deg = diag(W 1);  with u = Deg^1/2 y, u is the eigenvector of the
second largest eigenvalue of M = Deg^-1/2 W Deg^-1/2, and that of the largest is known: Deg^1/2 1.

Two launches make what the steps need: 2 W and Deg by rows, then of Deg the known vector, the scales and the start.
Fifteen Lanczos steps build an orthonormal basis of the Krylov space of M, orthogonal to the known vector. A step is one
launch: each program orthogonalizes the new vector against the basis (twice, which is enough), for which it reads
[16, N] a few times, and multiplies its own rows of M with it. A last launch takes the leading eigenvector of the
15 x 15 matrix that M is in this basis, by squaring it sixteen times, and orients y. No step waits for the host or for
another program. Started from the vector of the block before, which is close, the same steps come closer still.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from rfclip_kernels.krylov import BREAKDOWN, SQUARINGS, STEPS, ripple
from rfclip_kernels.launch import check_launch, on_device, strides, wrap_triton

BASIS = STEPS + 1  # the known vector, and one a step
BLOCK_ROWS = 32
BLOCK_COLUMNS = 128
SQUARE_ROWS = 16  # of the matrix that is made, in tiles that are read twice
SQUARE_COLUMNS = 64


@triton.jit(do_not_specialize=["N"])
def affinity_kernel(
    similarity_ptr,  # [B, N, N] any floating-point dtype
    affinity_ptr,  # [B, N, N] fp32 contiguous, 2 W
    degree_ptr,  # [B, N] fp32, Deg
    N,
    stride_sb,
    stride_sm,
    stride_sn,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    i_b = tl.program_id(1).to(tl.int64)
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    p_similarity = similarity_ptr + i_b * stride_sb
    b_degree = tl.zeros([BM], tl.float32)
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        mask = (o_m < N)[:, None] & (o_n < N)[None, :]
        p_row = p_similarity + o_m[:, None] * stride_sm + o_n[None, :] * stride_sn
        p_column = p_similarity + o_n[None, :] * stride_sm + o_m[:, None] * stride_sn
        b_affinity = tl.load(p_row, mask=mask, other=0.0).to(tl.float32)
        b_affinity += tl.load(p_column, mask=mask, other=0.0).to(tl.float32)
        tl.store(affinity_ptr + (i_b * N + o_m[:, None]) * N + o_n[None, :], b_affinity, mask=mask)
        b_degree += tl.sum(b_affinity, axis=1)
    tl.store(degree_ptr + i_b * N + o_m, b_degree / 2, mask=o_m < N)


@triton.jit(do_not_specialize=["N"])
def start_kernel(
    degree_ptr,  # [B, N] fp32, Deg
    start_ptr,  # [B, N], near y, where GIVEN
    inv_sqrt_ptr,  # [B, N] fp32, Deg^-1/2, 0 for a token without any similarity
    scale_ptr,  # [B, N] fp32, (2 Deg)^-1/2
    w_ptr,  # [B, N] fp32, the vector to start from
    basis_ptr,  # [B, R, N] fp32, whose first vector is written: the known one
    diagonal_ptr,  # [B, R] fp32, filled with 0
    beside_ptr,  # [B, R] fp32, filled with 0
    N,
    ripple,  # of what is added to a given start
    stride_sb,
    stride_sn,
    GIVEN: tl.constexpr,
    R: tl.constexpr,
    BN: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    o_r = tl.arange(0, R)
    tl.store(diagonal_ptr + i_b * R + o_r, tl.zeros([R], tl.float32))
    tl.store(beside_ptr + i_b * R + o_r, tl.zeros([R], tl.float32))
    p_start = start_ptr + i_b * stride_sb
    b_known, b_given = tl.zeros([BN], tl.float32), tl.zeros([BN], tl.float32)
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        b_degree = tl.load(degree_ptr + i_b * N + o_n, mask=o_n < N, other=0.0)
        b_known += b_degree
        if GIVEN:
            b_start = tl.load(p_start + o_n * stride_sn, mask=o_n < N, other=0.0).to(tl.float32)
            b_given += b_start * b_start * b_degree
    known = tl.maximum(tl.sqrt(tl.sum(b_known, axis=0)), 1e-12)
    given = tl.maximum(tl.sqrt(tl.sum(b_given, axis=0)), 1e-12)
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        b_degree = tl.load(degree_ptr + i_b * N + o_n, mask=o_n < N, other=0.0)
        b_root = tl.sqrt(b_degree)
        b_inv_sqrt = tl.where(b_degree > 0, 1.0 / tl.where(b_degree > 0, b_root, 1.0), 0.0)
        tl.store(inv_sqrt_ptr + i_b * N + o_n, b_inv_sqrt, mask=o_n < N)
        tl.store(scale_ptr + i_b * N + o_n, b_inv_sqrt * 0.7071067811865476, mask=o_n < N)
        tl.store(basis_ptr + i_b * R * N + o_n, b_root / known, mask=o_n < N)
        # As `start_of_cut` has it: a vector that no eigenvector is orthogonal to, or a little of it.
        b_turn = (o_n + 1).to(tl.float32) * 0.6180339887
        b_w = b_turn - tl.floor(b_turn) - 0.5
        if GIVEN:
            b_start = tl.load(p_start + o_n * stride_sn, mask=o_n < N, other=0.0).to(tl.float32)
            b_w = b_start * b_root / given + ripple * b_w
        tl.store(w_ptr + i_b * N + o_n, b_w, mask=o_n < N)


@triton.jit
def load_basis(p_basis, o_n, N, count, R: tl.constexpr):
    """The first `count` basis vectors at the tokens o_n, [R, BN]."""
    o_r = tl.arange(0, R)
    mask = (o_r < count)[:, None] & (o_n < N)[None, :]
    return tl.load(p_basis + o_r[:, None] * N + o_n[None, :], mask=mask, other=0.0)


@triton.jit
def combine(b_coefficients, b_basis):
    return tl.sum(b_coefficients[:, None] * b_basis, axis=0)  # [R] @ [R, BN] -> [BN]


@triton.jit
def remainder(p_w, p_basis, o_n, N, step, b_first, b_second, R: tl.constexpr):
    """w at the tokens o_n, less its projections on the basis and less those of what was left."""
    b_basis = load_basis(p_basis, o_n, N, step, R)
    b_w = tl.load(p_w + o_n, mask=o_n < N, other=0.0)
    return b_w - combine(b_first, b_basis) - combine(b_second, b_basis)


@triton.jit(do_not_specialize=["step"])
def lanczos_kernel(
    affinity_ptr,  # [B, N, N] fp32 contiguous, 2 W
    scale_ptr,  # [B, N] fp32, (2 Deg)^-1/2
    w_ptr,  # [B, N] fp32, M times the last basis vector, or the start
    basis_ptr,  # [B, R, N] fp32, the vectors before `step`; that of `step` is written
    diagonal_ptr,  # [B, R] fp32, of M in the basis: that before `step` is written
    beside_ptr,  # [B, R] fp32, beside the diagonal: the length of the new vector, 0 where the basis has ended
    out_ptr,  # [B, N] fp32, M times the new vector
    N,
    step,
    R: tl.constexpr,
    BREAKDOWN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    i_b = tl.program_id(1).to(tl.int64)
    p_w, p_basis, p_scale = w_ptr + i_b * N, basis_ptr + i_b * R * N, scale_ptr + i_b * N
    b_first, b_second = tl.zeros([R], tl.float32), tl.zeros([R], tl.float32)
    b_square = tl.zeros([BN], tl.float32)
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        b_w = tl.load(p_w + o_n, mask=o_n < N, other=0.0)
        b_first += tl.sum(load_basis(p_basis, o_n, N, step, R) * b_w[None, :], axis=1)
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        b_basis = load_basis(p_basis, o_n, N, step, R)
        b_w = tl.load(p_w + o_n, mask=o_n < N, other=0.0) - combine(b_first, b_basis)
        b_second += tl.sum(b_basis * b_w[None, :], axis=1)
        b_square += b_w * b_w
    length = tl.sqrt(tl.maximum(tl.sum(b_square, axis=0) - tl.sum(b_second * b_second, axis=0), 0.0))
    length = tl.where(length > BREAKDOWN, length, 0.0)
    factor = tl.where(length > 0, 1.0 / tl.where(length > 0, length, 1.0), 0.0)

    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    b_own = factor * remainder(p_w, p_basis, o_m, N, step, b_first, b_second, R)
    tl.store(p_basis + step * N + o_m, b_own, mask=o_m < N)
    if tl.program_id(0) == 0:
        o_r = tl.arange(0, R)
        tl.store(diagonal_ptr + i_b * R + o_r, b_first, mask=o_r == step - 1)
        tl.store(beside_ptr + i_b * R + step, length)
    p_affinity = affinity_ptr + (i_b * N + o_m[:, None]) * N
    b_out = tl.zeros([BM], tl.float32)
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        b_w = factor * remainder(p_w, p_basis, o_n, N, step, b_first, b_second, R)
        b_w *= tl.load(p_scale + o_n, mask=o_n < N, other=0.0)
        m_affinity = (o_m < N)[:, None] & (o_n < N)[None, :]
        b_out += tl.sum(tl.load(p_affinity + o_n[None, :], mask=m_affinity, other=0.0) * b_w[None, :], axis=1)
    b_out *= tl.load(p_scale + o_m, mask=o_m < N, other=0.0)
    tl.store(out_ptr + i_b * N + o_m, b_out, mask=o_m < N)


@triton.jit(do_not_specialize=["N"])
def ritz_kernel(
    scale_ptr,  # [B, N] fp32, Deg^-1/2
    w_ptr,  # [B, N] fp32, M times the last basis vector
    basis_ptr,  # [B, R, N] fp32
    diagonal_ptr,  # [B, R] fp32
    beside_ptr,  # [B, R] fp32
    out_ptr,  # [B, N] fp32, y
    N,
    R: tl.constexpr,
    SQUARINGS: tl.constexpr,
    BN: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    o_r = tl.arange(0, R)
    p_w, p_basis, p_scale = w_ptr + i_b * N, basis_ptr + i_b * R * N, scale_ptr + i_b * N
    b_last = tl.zeros([R], tl.float32)
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        b_w = tl.load(p_w + o_n, mask=o_n < N, other=0.0)
        b_last += tl.sum(load_basis(p_basis, o_n, N, R, R) * b_w[None, :], axis=1)
    b_diagonal = tl.where(o_r == R - 1, b_last, tl.load(diagonal_ptr + i_b * R + o_r))
    b_beside = tl.load(beside_ptr + i_b * R + o_r)
    # 2 is added to M, so that the leading eigenvalue is the one largest in size. The known vector, and what follows the
    # end of the basis, are left with 0.
    b_diagonal = tl.where((o_r > 0) & (b_beside > 0), b_diagonal + 2, 0.0)
    b_beside = tl.where(o_r > 1, b_beside, 0.0)
    on = o_r[:, None] == o_r[None, :]
    b_power = tl.where(on, b_diagonal[:, None], 0.0)  # [R, R]
    b_power += tl.where(o_r[:, None] == o_r[None, :] + 1, b_beside[:, None], 0.0)
    b_power += tl.where(o_r[:, None] + 1 == o_r[None, :], b_beside[None, :], 0.0)
    for _squaring in range(SQUARINGS):
        b_power = b_power / tl.maximum(tl.max(tl.max(tl.abs(b_power), axis=1), axis=0), 1e-30)
        b_power = tl.sum(b_power[:, None, :] * b_power[None, :, :], axis=2)  # symmetric
    i_largest = tl.argmax(tl.sum(tl.where(on, b_power, 0.0), axis=1), axis=0)
    b_ritz = tl.sum(tl.where(o_r[None, :] == i_largest, b_power, 0.0), axis=1)
    b_ritz = b_ritz / tl.maximum(tl.sqrt(tl.sum(b_ritz * b_ritz, axis=0)), 1e-30)

    b_top, b_bottom = tl.zeros([BN], tl.float32), tl.zeros([BN], tl.float32)
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        b_y = combine(b_ritz, load_basis(p_basis, o_n, N, R, R)) * tl.load(p_scale + o_n, mask=o_n < N, other=0.0)
        b_top, b_bottom = tl.maximum(b_top, b_y), tl.minimum(b_bottom, b_y)
    b_ritz *= tl.where(tl.max(b_top, axis=0) >= -tl.min(b_bottom, axis=0), 1.0, -1.0)
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        b_y = combine(b_ritz, load_basis(p_basis, o_n, N, R, R)) * tl.load(p_scale + o_n, mask=o_n < N, other=0.0)
        tl.store(out_ptr + i_b * N + o_n, b_y, mask=o_n < N)


@triton.jit(do_not_specialize=["N"])
def defocus_kernel(
    y_ptr,  # [B, N]
    out_ptr,  # [B, N] bool
    N,
    stride_yb,
    stride_yn,
    OTSU: tl.constexpr,
    BN: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    p_y = y_ptr + i_b * stride_yb
    b_sum = tl.zeros([BN], tl.float32)
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        b_sum += tl.load(p_y + o_n * stride_yn, mask=o_n < N, other=0.0).to(tl.float32)
    mean = tl.sum(b_sum) / N
    threshold = mean
    if OTSU:  # the value at which the classes "at most it" and "above it" differ most; the lowest of equals
        best = 0.0
        threshold = float("inf")
        for start in range(0, N, BN):
            o_n = start + tl.arange(0, BN)
            b_cut = tl.load(p_y + o_n * stride_yn, mask=o_n < N, other=float("inf")).to(tl.float32)
            b_low, b_low_sum, b_all_sum = tl.zeros([BN], tl.float32), tl.zeros([BN], tl.float32), 0.0
            for other in range(0, N):
                y = tl.load(p_y + other * stride_yn).to(tl.float32)
                b_low += tl.where(y <= b_cut, 1.0, 0.0)
                b_low_sum += tl.where(y <= b_cut, y - mean, 0.0)
                b_all_sum += y - mean
            b_high = N - b_low
            split = b_high > 0
            b_apart = b_low_sum / tl.maximum(b_low, 1.0) - (b_all_sum - b_low_sum) / tl.maximum(b_high, 1.0)
            b_variance = tl.where(split & (o_n < N), b_low * b_high * b_apart * b_apart, 0.0)
            highest = tl.max(b_variance, axis=0)
            at = tl.min(tl.where((b_variance == highest) & split, b_cut, float("inf")), axis=0)
            threshold = tl.where(highest > best, at, tl.where(highest == best, tl.minimum(at, threshold), threshold))
            best = tl.maximum(best, highest)
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        b_y = tl.load(p_y + o_n * stride_yn, mask=o_n < N, other=0.0).to(tl.float32)
        tl.store(out_ptr + i_b * N + o_n, b_y > threshold, mask=o_n < N)


@triton_op("rfclip::fiedler_vector", mutates_args={})
def _fiedler_vector(similarity: Tensor, start: Tensor | None) -> Tensor:
    B, N, _ = similarity.shape
    empty = partial(similarity.new_empty, dtype=torch.float32)
    affinity, basis = empty((B, N, N)), empty((B, BASIS, N))
    degree, inv_sqrt, scale, w, y = (empty((B, N)) for _ in range(5))
    diagonal, beside = empty((B, BASIS)), empty((B, BASIS))
    if B:
        with on_device(similarity):
            wrap_triton(affinity_kernel)[(triton.cdiv(N, SQUARE_ROWS), B)](
                similarity_ptr=similarity,
                affinity_ptr=affinity,
                degree_ptr=degree,
                N=N,
                **strides("s", similarity, "bmn"),
                BM=SQUARE_ROWS,
                BN=SQUARE_COLUMNS,
            )
            wrap_triton(start_kernel)[(B,)](
                degree_ptr=degree,
                start_ptr=degree if start is None else start,
                inv_sqrt_ptr=inv_sqrt,
                scale_ptr=scale,
                w_ptr=w,
                basis_ptr=basis,
                diagonal_ptr=diagonal,
                beside_ptr=beside,
                N=N,
                ripple=ripple(N),
                **strides("s", degree if start is None else start, "bn"),
                GIVEN=start is not None,
                R=BASIS,
                BN=BLOCK_COLUMNS,
            )
            for step in range(1, BASIS):
                out = empty((B, N))
                wrap_triton(lanczos_kernel)[(triton.cdiv(N, BLOCK_ROWS), B)](
                    affinity_ptr=affinity,
                    scale_ptr=scale,
                    w_ptr=w,
                    basis_ptr=basis,
                    diagonal_ptr=diagonal,
                    beside_ptr=beside,
                    out_ptr=out,
                    N=N,
                    step=step,
                    R=BASIS,
                    BREAKDOWN=BREAKDOWN,
                    BM=BLOCK_ROWS,
                    BN=BLOCK_COLUMNS,
                    num_warps=8,
                )
                w = out
            wrap_triton(ritz_kernel)[(B,)](
                scale_ptr=inv_sqrt,
                w_ptr=w,
                basis_ptr=basis,
                diagonal_ptr=diagonal,
                beside_ptr=beside,
                out_ptr=y,
                N=N,
                R=BASIS,
                SQUARINGS=SQUARINGS,
                BN=BLOCK_COLUMNS,
                num_warps=8,
            )
    return y


@triton_op("rfclip::defocus_mask", mutates_args={})
def _defocus_mask(fiedler: Tensor, threshold: str) -> Tensor:
    B, N = fiedler.shape
    out = fiedler.new_empty((B, N), dtype=torch.bool)
    if B:
        with on_device(fiedler):
            wrap_triton(defocus_kernel)[(B,)](
                y_ptr=fiedler,
                out_ptr=out,
                N=N,
                stride_yb=fiedler.stride(0),
                stride_yn=fiedler.stride(1),
                OTSU=threshold == "otsu",
                BN=BLOCK_COLUMNS,
            )
    return out


def launch_fiedler_vector(similarity: Tensor, start: Tensor | None) -> Tensor:
    """Fifteen Lanczos steps, started from `start` where it is given, such as the vector of the block before.

    Where fifteen steps cannot tell the second eigenvalue from the third, y is some vector of their eigenspaces.
    """
    check_launch(similarity=similarity, start=start)
    return _fiedler_vector(similarity, start)


def launch_defocus_mask(fiedler: Tensor, threshold: str) -> Tensor:
    """One program per image; "otsu" compares all pairs."""
    check_launch(fiedler=fiedler)
    return _defocus_mask(fiedler, threshold)
