"""The graph cut that finds defocused tokens: equation 8 of the paper, and the threshold below it.

(Deg - W) y = lambda Deg y,  W = (S + S^T) / 2,  Deg = diag(W 1);  with u = Deg^1/2 y, u is the eigenvector of the
second largest eigenvalue of M = Deg^-1/2 W Deg^-1/2, and that of the largest is known: Deg^1/2 1.

A round of block Lanczos: five times, three vectors are orthogonalized against the basis (twice, which is enough), made
orthonormal, added to it and multiplied with M. The basis, whose first vector is the known one, then has sixteen. In it
M is a matrix [16, 16]. Squaring that sixteen times leaves its leading eigenvector, which is u; squaring it five times
leaves its largest eigenvalues, so that the first three vectors, multiplied by this, start the next round. There are
five, or three from the vector of the block before.

One launch makes W. Up to 256 patches, another does all the rest, one program an image. Above, a product is a launch:
each program orthogonalizes the whole vectors, for which it reads [16 + 3, N] thrice, and multiplies its own rows of W.
Nothing waits for the host.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from rfclip_kernels.launch import check_launch, on_device, strides, wrap_triton

WIDTH, DEPTH = 3, 5  # vectors that are multiplied at once, and how often in a round
BASIS = 16  # the known vector and WIDTH * DEPTH others
ROUNDS, WARM_ROUNDS = 5, 3  # without a start, and with one
RESTART = 5  # squarings of the projected matrix that the next round's start takes
SQUARINGS = 16  # that its leading eigenvector takes
BREAKDOWN = 1e-5  # what is new in a vector must be more than this
WHOLE = 256  # patches that one program takes
BLOCK_ROWS = 64  # of the matrix that a program multiplies
BLOCK_COLUMNS = 64
SQUARE_ROWS = 16  # of a tile of the matrix that is made of S


@triton.jit(do_not_specialize=["N"])
def affinity_kernel(
    similarity_ptr,  # [B, N, N] any floating-point dtype
    affinity_ptr,  # [B, N, SW] fp32, W
    degree_ptr,  # [B, N] fp32, Deg
    N,
    SW,
    stride_sb,
    stride_sm,
    stride_sn,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    i_b = (tl.program_id(0) // tl.cdiv(N, BM)).to(tl.int64)
    o_m = tl.program_id(0) % tl.cdiv(N, BM) * BM + tl.arange(0, BM)
    p_similarity = similarity_ptr + i_b * stride_sb
    b_degree = tl.zeros([BM], tl.float32)
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        mask = (o_m < N)[:, None] & (o_n < N)[None, :]
        p_row = p_similarity + o_m[:, None] * stride_sm + o_n[None, :] * stride_sn
        p_column = p_similarity + o_n[None, :] * stride_sm + o_m[:, None] * stride_sn
        b_affinity = tl.load(p_row, mask=mask, other=0.0).to(tl.float32)
        b_affinity = (b_affinity + tl.load(p_column, mask=mask, other=0.0).to(tl.float32)) / 2
        tl.store(affinity_ptr + (i_b * N + o_m[:, None]) * SW + o_n[None, :], b_affinity, mask=mask)
        b_degree += tl.sum(b_affinity, axis=1)
    tl.store(degree_ptr + i_b * N + o_m, b_degree, mask=o_m < N)


@triton.jit
def load_vectors(p_rows, o_n, N, count, R: tl.constexpr):
    """The first `count` vectors at the tokens o_n, [R, BN], and zeros."""
    o_r = tl.arange(0, R)
    mask = (o_r < count)[:, None] & (o_n < N)[None, :]
    return tl.load(p_rows + o_r[:, None] * N + o_n[None, :], mask=mask, other=0.0)


@triton.jit
def store_vectors(p_rows, b_rows, o_n, N, count):
    """The first `count` rows of a tile at the tokens o_n."""
    o_r = tl.arange(0, b_rows.shape[0])
    tl.store(p_rows + o_r[:, None] * N + o_n[None, :], b_rows, mask=(o_r < count)[:, None] & (o_n < N)[None, :])


@triton.jit
def inner(b_rows, b_others):
    return tl.sum(b_rows[:, None, :] * b_others[None, :, :], axis=2)  # [P, BN] @ [R, BN]^T -> [P, R]


@triton.jit
def combine(b_coefficients, b_rows):
    return tl.sum(b_coefficients[:, :, None] * b_rows[None, :, :], axis=1)  # [P, R] @ [R, BN] -> [P, BN]


@triton.jit
def row_of(b_rows, i):
    """Row i of a tile."""
    o_r = tl.arange(0, b_rows.shape[0])
    return tl.sum(tl.where(o_r[:, None] == i, b_rows, 0.0), axis=0)


@triton.jit
def start_rows(
    p_degree,  # [N] fp32, Deg
    p_start,  # [N], near y, read where GIVEN
    stride_tn,
    p_y,  # [WIDTH, N] fp32, written
    p_basis,  # [R, N]: the first vector is written, Deg^1/2, not normalized
    o_m,
    N,
    GIVEN: tl.constexpr,
    WIDTH: tl.constexpr,
    P: tl.constexpr,
):
    b_degree = tl.load(p_degree + o_m, mask=o_m < N, other=0.0)
    tl.store(p_basis + o_m, tl.sqrt(b_degree), mask=o_m < N)
    o_p = tl.arange(0, P)
    # Vectors that no eigenvector is orthogonal to: multiples of the roots of 5, 2 and 3, less their floor.
    b_root = tl.sqrt(tl.where(o_p == 0, 5.0, tl.where(o_p == 1, 2.0, 3.0)))
    b_turn = b_root[:, None] * (o_m + 1).to(tl.float32)[None, :]
    b_y = b_turn - tl.floor(b_turn) - 0.5
    if GIVEN:
        b_start = tl.load(p_start + o_m * stride_tn, mask=o_m < N, other=0.0).to(tl.float32) * tl.sqrt(b_degree)
        b_y = tl.where((o_p == 0)[:, None], b_start[None, :], b_y)
    store_vectors(p_y, b_y, o_m, N, WIDTH)


@triton.jit
def projections(p_basis, p_y, N, count, WIDTH: tl.constexpr, P: tl.constexpr, R: tl.constexpr, BN: tl.constexpr):
    """Of y on the first `count` vectors of the basis, [P, R], and the squared lengths of both, [P] and [R]."""
    b_c, b_length, b_norm = tl.zeros([P, R], tl.float32), tl.zeros([P], tl.float32), tl.zeros([R], tl.float32)
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        b_basis, b_y = load_vectors(p_basis, o_n, N, count, R), load_vectors(p_y, o_n, N, WIDTH, P)
        b_c += inner(b_y, b_basis)
        b_length += tl.sum(b_y * b_y, axis=1)
        b_norm += tl.sum(b_basis * b_basis, axis=1)
    return b_c, b_length, b_norm


@triton.jit
def orthonormal(b_gram, b_length, WIDTH: tl.constexpr, BREAKDOWN: tl.constexpr):
    """T with T gram T^T = 1: Cholesky's factor, inverted. Rows of vectors with nothing new are 0.

    New is what is more than the rounding of a vector of squared length b_length, and of the gram matrix.
    """
    o_p = tl.arange(0, b_gram.shape[0])
    b_t = tl.where(o_p[:, None] == o_p[None, :], 1.0, 0.0)
    b_least = tl.maximum(tl.sum(b_gram * b_t, axis=0), b_length * BREAKDOWN) * BREAKDOWN
    for i in tl.static_range(WIDTH):
        b_row = row_of(b_gram, i)
        pivot, least = tl.sum(tl.where(o_p == i, b_row, 0.0)), tl.sum(tl.where(o_p == i, b_least, 0.0))
        factor = tl.where(pivot > least, 1.0 / tl.sqrt(tl.where(pivot > least, pivot, 1.0)), 0.0)
        b_row, b_own = factor * b_row, factor * row_of(b_t, i)
        b_below = tl.where(o_p > i, b_row, 0.0)
        b_t = tl.where((o_p == i)[:, None], b_own[None, :], b_t - b_below[:, None] * b_own[None, :])
        b_gram -= b_below[:, None] * b_row[None, :]
    return tl.where((o_p < WIDTH)[:, None], b_t, 0.0)


@triton.jit
def coefficients(
    p_basis,  # [R, N]
    p_y,  # [WIDTH, N], M times the vectors of the step before, or the vectors to start from
    p_projected,  # [R, R]: M in the basis, whose columns of the step before are written
    N,
    step,
    writes,  # whether this program writes p_projected
    WIDTH: tl.constexpr,
    BREAKDOWN: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    BN: tl.constexpr,
):
    """What makes y orthonormal and orthogonal to the basis, for `new_vectors`, and the mean of Deg."""
    count = 1 + WIDTH * step
    b_first, b_length, b_norm = projections(p_basis, p_y, N, count, WIDTH, P, R, BN)
    b_weight = tl.where(b_norm > 0, 1.0 / tl.where(b_norm > 0, b_norm, 1.0), 0.0)
    b_first *= b_weight[None, :]
    b_second, b_gram = tl.zeros([P, R], tl.float32), tl.zeros([P, P], tl.float32)
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        b_basis = load_vectors(p_basis, o_n, N, count, R)
        b_y = load_vectors(p_y, o_n, N, WIDTH, P) - combine(b_first, b_basis)
        b_second += inner(b_y, b_basis)
        b_gram += inner(b_y, b_y)
    b_gram -= inner(b_second * b_weight[None, :], b_second)
    b_second *= b_weight[None, :]
    if writes & (step > 0):
        store_columns(p_projected, b_first + b_second, count - WIDTH, WIDTH)
    b_t = orthonormal(b_gram, b_length, WIDTH, BREAKDOWN)
    return b_first, b_second, b_t, tl.sum(tl.where(tl.arange(0, R) == 0, b_norm, 0.0)) / N


@triton.jit
def store_columns(p_matrix, b_columns, first, WIDTH: tl.constexpr):
    """The first WIDTH rows of a tile [P, R] as columns of a matrix [R, R]."""
    P: tl.constexpr = b_columns.shape[0]
    R: tl.constexpr = b_columns.shape[1]
    o_p, o_r = tl.arange(0, P), tl.arange(0, R)
    p_columns = p_matrix + o_r[None, :] * R + (first + o_p)[:, None]
    tl.store(p_columns, b_columns, mask=tl.broadcast_to((o_p < WIDTH)[:, None], [P, R]))


@triton.jit
def new_vectors(
    p_basis, p_y, o_n, N, count, b_first, b_second, b_t, WIDTH: tl.constexpr, P: tl.constexpr, R: tl.constexpr
):
    """The next vectors of the basis at the tokens o_n, [P, BN]."""
    b_basis = load_vectors(p_basis, o_n, N, count, R)
    b_y = load_vectors(p_y, o_n, N, WIDTH, P) - combine(b_first, b_basis)
    return combine(b_t, b_y - combine(b_second, b_basis))


@triton.jit
def products(b_x, p_affinity, o_m, o_n, N, SW):
    """The rows o_m of W times b_x [P, BN], before they are summed: [P, BM, BN]."""
    mask = (o_m < N)[:, None] & (o_n < N)[None, :]
    b_affinity = tl.load(p_affinity + o_m[:, None] * SW + o_n[None, :], mask=mask, other=0.0)
    return b_x[:, None, :] * b_affinity[None, :, :]


@triton.jit
def scales(p_basis, o_n, N, mean):
    """(Deg / mean)^-1/2 at the tokens o_n, 0 for a token without any similarity."""
    b_root = tl.load(p_basis + o_n, mask=o_n < N, other=0.0)
    return tl.where(b_root > 0, tl.sqrt(mean) / tl.where(b_root > 0, b_root, 1.0), 0.0)


@triton.jit
def powers(
    p_basis,
    p_y,
    p_projected,
    N,
    WIDTH: tl.constexpr,
    BREAKDOWN: tl.constexpr,
    RESTART: tl.constexpr,
    SQUARINGS: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    BN: tl.constexpr,
):
    """In the basis, the vectors to go on from and y, [P, R] and [R]; and the squared lengths of the basis [R]."""
    o_p, o_r = tl.arange(0, P), tl.arange(0, R)
    b_c, _length, b_norm = projections(p_basis, p_y, N, R, WIDTH, P, R, BN)
    tl.debug_barrier()
    store_columns(p_projected, b_c, R - WIDTH, WIDTH)
    tl.debug_barrier()
    # A column lacks the rows of later steps: M is symmetric. Without the known vector, and without those of length 0.
    low, high = tl.minimum(o_r[:, None], o_r[None, :]), tl.maximum(o_r[:, None], o_r[None, :])
    on, own = (b_norm > 0) & (o_r > 0), o_r[:, None] == o_r[None, :]
    b_power = tl.load(p_projected + low * R + high, mask=on[:, None] & on[None, :], other=0.0)
    # 2 is added to M, so that the leading eigenvalue is the one largest in size.
    b_power += tl.where(own & on[:, None], 2.0, 0.0)
    for _squaring in range(RESTART):
        b_power = squared(b_power)
    b_next = combine(tl.where(o_p[:, None] + 1 == o_r[None, :], 1.0, 0.0), b_power)  # without the known vector
    b_next = combine(orthonormal(inner(b_next, b_next), tl.zeros([P], tl.float32), WIDTH, BREAKDOWN), b_next)
    for _squaring in range(RESTART, SQUARINGS):
        b_power = squared(b_power)
    i_largest = tl.argmax(tl.sum(tl.where(own, b_power, 0.0), axis=1), axis=0)
    b_ritz = row_of(b_power, i_largest)
    return b_next, b_ritz / tl.maximum(tl.sqrt(tl.sum(b_ritz * b_ritz, axis=0)), 1e-30), b_norm


@triton.jit
def squared(b_power):
    """A symmetric matrix squared, its largest entry having been made 1."""
    b_power = b_power / tl.maximum(tl.max(tl.max(tl.abs(b_power), axis=1), axis=0), 1e-30)
    return inner(b_power, b_power)


@triton.jit
def restart(p_basis, p_y, b_next, N, WIDTH: tl.constexpr, R: tl.constexpr, BN: tl.constexpr):
    """The vectors that the next round starts from."""
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        store_vectors(p_y, combine(b_next, load_vectors(p_basis, o_n, N, R, R)), o_n, N, WIDTH)


@triton.jit
def finish(p_basis, p_fiedler, b_ritz, b_norm, N, R: tl.constexpr, BN: tl.constexpr):
    """y, its largest entry being positive."""
    mean = tl.sum(tl.where(tl.arange(0, R) == 0, b_norm, 0.0)) / N  # of Deg
    b_top, b_bottom = tl.zeros([BN], tl.float32), tl.zeros([BN], tl.float32)
    for start in range(0, N, BN):
        b_y = cut_values(p_basis, start + tl.arange(0, BN), N, b_ritz, mean, R)
        b_top, b_bottom = tl.maximum(b_top, b_y), tl.minimum(b_bottom, b_y)
    sign = tl.where(tl.max(b_top, axis=0) >= -tl.min(b_bottom, axis=0), 1.0, -1.0)
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        tl.store(p_fiedler + o_n, sign * cut_values(p_basis, o_n, N, b_ritz, mean, R), mask=o_n < N)


@triton.jit
def cut_values(p_basis, o_n, N, b_ritz, mean, R: tl.constexpr):
    """y at the tokens o_n, in either orientation."""
    b_basis = load_vectors(p_basis, o_n, N, R, R)
    b_inv_sqrt = scales(p_basis, o_n, N, mean) / tl.sqrt(tl.maximum(mean, 1e-30))
    return tl.sum(b_ritz[:, None] * b_basis, axis=0) * b_inv_sqrt


@triton.jit(do_not_specialize=["N"])
def cut_kernel(
    affinity_ptr,  # [B, N, SW] fp32, W
    degree_ptr,  # [B, N] fp32, Deg
    start_ptr,  # [B, N], near y, read where GIVEN
    vectors_ptr,  # [B, 2, WIDTH, N] fp32
    basis_ptr,  # [B, R, N] fp32
    projected_ptr,  # [B, R, R] fp32
    fiedler_ptr,  # [B, N] fp32, y
    N,
    SW,
    stride_tb,
    stride_tn,
    GIVEN: tl.constexpr,
    ROUNDS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    RESTART: tl.constexpr,
    SQUARINGS: tl.constexpr,
    BREAKDOWN: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    p_affinity, p_degree, p_start = affinity_ptr + i_b * N * SW, degree_ptr + i_b * N, start_ptr + i_b * stride_tb
    p_basis, p_projected = basis_ptr + i_b * R * N, projected_ptr + i_b * R * R
    p_y, p_fiedler = vectors_ptr + i_b * 2 * WIDTH * N, fiedler_ptr + i_b * N
    for start in range(0, N, BN):
        start_rows(p_degree, p_start, stride_tn, p_y, p_basis, start + tl.arange(0, BN), N, GIVEN, WIDTH, P)
    for i in range(ROUNDS * DEPTH):
        tl.debug_barrier()
        p_now, p_next, step = p_y + i % 2 * WIDTH * N, p_y + (i + 1) % 2 * WIDTH * N, i % DEPTH
        b_first, b_second, b_t, mean = coefficients(
            p_basis, p_now, p_projected, N, step, True, WIDTH, BREAKDOWN, P, R, BN
        )
        count = 1 + step * WIDTH
        p_x = p_basis + count * N
        for start in range(0, N, BN):
            o_n = start + tl.arange(0, BN)
            b_x = new_vectors(p_basis, p_now, o_n, N, count, b_first, b_second, b_t, WIDTH, P, R)
            store_vectors(p_x, b_x, o_n, N, WIDTH)
        tl.debug_barrier()
        for first in range(0, N, BM):
            o_m = first + tl.arange(0, BM)
            b_out = tl.zeros([P, BM, BN], tl.float32)
            for start in range(0, N, BN):
                o_n = start + tl.arange(0, BN)
                b_x = load_vectors(p_x, o_n, N, WIDTH, P) * scales(p_basis, o_n, N, mean)[None, :]
                b_out += products(b_x, p_affinity, o_m, o_n, N, SW)
            b_scale = scales(p_basis, o_m, N, mean) / tl.maximum(mean, 1e-30)
            store_vectors(p_next, tl.sum(b_out, axis=2) * b_scale[None, :], o_m, N, WIDTH)
        if step == DEPTH - 1:
            tl.debug_barrier()
            b_next, b_ritz, b_norm = powers(
                p_basis, p_next, p_projected, N, WIDTH, BREAKDOWN, RESTART, SQUARINGS, P, R, BN
            )
            if i < ROUNDS * DEPTH - 1:
                restart(p_basis, p_next, b_next, N, WIDTH, R, BN)
            else:
                finish(p_basis, p_fiedler, b_ritz, b_norm, N, R, BN)


@triton.jit(do_not_specialize=["N"])
def cut_start_kernel(
    degree_ptr,  # this and all that follows as in cut_kernel
    start_ptr,
    vectors_ptr,
    basis_ptr,
    N,
    stride_tb,
    stride_tn,
    GIVEN: tl.constexpr,
    WIDTH: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    BN: tl.constexpr,
):
    i_b = (tl.program_id(0) // tl.cdiv(N, BN)).to(tl.int64)
    o_n = tl.program_id(0) % tl.cdiv(N, BN) * BN + tl.arange(0, BN)
    p_y, p_basis, p_start = vectors_ptr + i_b * 2 * WIDTH * N, basis_ptr + i_b * R * N, start_ptr + i_b * stride_tb
    start_rows(degree_ptr + i_b * N, p_start, stride_tn, p_y, p_basis, o_n, N, GIVEN, WIDTH, P)


@triton.jit(do_not_specialize=["N", "i"])
def cut_product_kernel(
    affinity_ptr,
    vectors_ptr,
    basis_ptr,
    projected_ptr,
    N,
    SW,
    i,  # counts the products
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    BREAKDOWN: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    i_b, i_m = (tl.program_id(0) // tl.cdiv(N, BM)).to(tl.int64), tl.program_id(0) % tl.cdiv(N, BM)
    p_affinity, p_basis = affinity_ptr + i_b * N * SW, basis_ptr + i_b * R * N
    p_y, step, count = vectors_ptr + i_b * 2 * WIDTH * N, i % DEPTH, 1 + i % DEPTH * WIDTH
    p_now, p_next = p_y + i % 2 * WIDTH * N, p_y + (i + 1) % 2 * WIDTH * N
    p_projected = projected_ptr + i_b * R * R
    b_first, b_second, b_t, mean = coefficients(
        p_basis, p_now, p_projected, N, step, i_m == 0, WIDTH, BREAKDOWN, P, R, BN
    )
    o_m = i_m * BM + tl.arange(0, BM)
    b_out = tl.zeros([P, BM, BN], tl.float32)
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        b_x = new_vectors(p_basis, p_now, o_n, N, count, b_first, b_second, b_t, WIDTH, P, R)
        b_out += products(b_x * scales(p_basis, o_n, N, mean)[None, :], p_affinity, o_m, o_n, N, SW)
    b_scale = scales(p_basis, o_m, N, mean) / tl.maximum(mean, 1e-30)
    store_vectors(p_next, tl.sum(b_out, axis=2) * b_scale[None, :], o_m, N, WIDTH)
    b_x = new_vectors(p_basis, p_now, o_m, N, count, b_first, b_second, b_t, WIDTH, P, R)
    store_vectors(p_basis + count * N, b_x, o_m, N, WIDTH)


@triton.jit(do_not_specialize=["N", "i"])
def cut_round_kernel(
    vectors_ptr,
    basis_ptr,
    projected_ptr,
    fiedler_ptr,
    N,
    i,  # counts the products so far
    LAST: tl.constexpr,  # the round; y is written
    WIDTH: tl.constexpr,
    RESTART: tl.constexpr,
    SQUARINGS: tl.constexpr,
    BREAKDOWN: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    BN: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    p_basis, p_y = basis_ptr + i_b * R * N, vectors_ptr + (i_b * 2 + i % 2) * WIDTH * N
    p_projected = projected_ptr + i_b * R * R
    b_next, b_ritz, b_norm = powers(p_basis, p_y, p_projected, N, WIDTH, BREAKDOWN, RESTART, SQUARINGS, P, R, BN)
    if LAST:
        finish(p_basis, fiedler_ptr + i_b * N, b_ritz, b_norm, N, R, BN)
    else:
        restart(p_basis, p_y, b_next, N, WIDTH, R, BN)


@triton_op("rfclip::fiedler_vector", mutates_args={})
def _fiedler_vector(similarity: Tensor, start: Tensor | None) -> Tensor:
    B, N, _ = similarity.shape
    SW = triton.cdiv(N, 16) * 16  # so that every row is aligned
    empty = partial(similarity.new_empty, dtype=torch.float32)
    affinity, degree, y = empty((B, N, SW)), empty((B, N)), empty((B, N))
    vectors, basis, projected = empty((B, 2, WIDTH, N)), empty((B, BASIS, N)), empty((B, BASIS, BASIS))
    given, rounds = (degree, ROUNDS) if start is None else (start, WARM_ROUNDS)
    state = {
        "vectors_ptr": vectors,
        "basis_ptr": basis,
        "N": N,
        "WIDTH": WIDTH,
        "P": triton.next_power_of_2(WIDTH),
        "R": BASIS,
    }
    begun = {"degree_ptr": degree, "start_ptr": given, **strides("t", given, "bn"), "GIVEN": start is not None}
    projection = {"projected_ptr": projected, "BREAKDOWN": BREAKDOWN}
    multiplied = {"affinity_ptr": affinity, "SW": SW, "DEPTH": DEPTH, "BM": BLOCK_ROWS, "num_warps": 8}
    ended = {"fiedler_ptr": y, "RESTART": RESTART, "SQUARINGS": SQUARINGS}
    if B:
        with on_device(similarity):
            wrap_triton(affinity_kernel)[(triton.cdiv(N, SQUARE_ROWS) * B,)](
                similarity_ptr=similarity,
                affinity_ptr=affinity,
                degree_ptr=degree,
                N=N,
                SW=SW,
                **strides("s", similarity, "bmn"),
                BM=SQUARE_ROWS,
                BN=BLOCK_COLUMNS,
                num_warps=8,
            )
            if N <= WHOLE:
                wrap_triton(cut_kernel)[(B,)](
                    **state, **begun, **projection, **multiplied, **ended, ROUNDS=rounds, BN=BLOCK_COLUMNS
                )
                return y
            wrap_triton(cut_start_kernel)[(triton.cdiv(N, BLOCK_COLUMNS) * B,)](**state, **begun, BN=BLOCK_COLUMNS)
            for i in range(rounds * DEPTH):
                wrap_triton(cut_product_kernel)[(triton.cdiv(N, BLOCK_ROWS) * B,)](
                    **state, **projection, **multiplied, i=i, BN=BLOCK_COLUMNS
                )
                if i % DEPTH == DEPTH - 1:
                    last = i == rounds * DEPTH - 1
                    wrap_triton(cut_round_kernel)[(B,)](
                        **state, **projection, **ended, i=i + 1, LAST=last, BN=BLOCK_COLUMNS
                    )
    return y


def launch_fiedler_vector(similarity: Tensor, start: Tensor | None) -> Tensor:
    """Five rounds, or three from a start, which takes the place of one of the vectors that the first begins with.

    Where they cannot tell the second eigenvalue from the third, y is some vector of their eigenspaces.
    """
    check_launch(similarity=similarity, start=start)
    return _fiedler_vector(similarity, start)
