"""The graph cut that finds defocused tokens: equation 8 of the paper, and the threshold below it.

(Deg - W) y = lambda Deg y,  W = (S + S^T) / 2,  Deg = diag(W 1);  so y is the second eigenvector of M = Deg^-1 W, the
first being 1, and M is symmetric in the inner product <a, b> = a^T Deg b.

A round takes five vectors Y and makes y of the space that they and three products span:

    Z = M Y,  R0 = Z less most of its part in span(1, Y),  R1 = M R0,  R2 = M R1;
    basis K = (1, Y, R0, R1), sixteen vectors, whose products with M are known: M K = (1, Z, R1, R2)

Nothing is orthogonalized on the way: the inner products of all vectors are taken at once, and Cholesky's factor of
those of K makes it orthonormal, T K, without what is new only up to rounding. In it M is a matrix [16, 16]. Squaring
that leaves its leading eigenvector, t, and y = t T M K, which is one product nearer than t T K. The next round starts
from y and from four more rows of a lower power. There are five rounds, or three from a vector near y. In a tower three
are enough for the first block, and one for every other, from the five vectors that the block before ended with.

W in fp16 is multiplied by tensor cores: a vector is the sum of two in fp16, the second 2^11 times too large, so that
their products add up to those of fp32. Vectors are multiplied by N, which makes their entries about 1.

Up to 256 patches one launch does it all, one program an image, and an image without distraction ends at once. Above,
every product is a launch, whose programs take some rows of W each, and so are R0 and the end of a round. Degrees come
out of a round's first product, which multiplies 1 as well. Nothing waits for the host.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from rfclip_kernels.attention import fp16_unit, order_patches, ordered_patches
from rfclip_kernels.defocus import launch_defocus_mask
from rfclip_kernels.launch import check_launch, on_device, strides, wrap_triton
from rfclip_kernels.similarity import empty_affinity

WIDTH = 5  # vectors that are multiplied at once
GROUPS = 5  # of 1 and WIDTH vectors: Y, Z, R0, R1, R2; the last three have 0 in place of 1
ROUNDS, FROM_START = 5, 3  # that resolve y, and those that a start leaves
TOWER_ROUNDS, TOWER_FROM_START = 3, 1  # that resolve the mask of the defocused tokens
RESTART = 3  # squarings of the projected matrix before the next round's start is taken from it
SQUARINGS = 12  # that its leading eigenvector takes
NEW = 1e-2  # the squared length of what a vector adds to the basis, over its own, is more than this
ROUNDING = tl.constexpr(1e-11)  # the squared length of R0 over that of Y, if it is more than rounding
WHOLE = 256  # patches that one program takes
FEW, ALL = tl.constexpr(8 * 16), tl.constexpr(2 * 16 * 16)  # inner products of a tile of rows, for R0 and for y
BLOCK_ROWS, BLOCK_COLUMNS = 32, 64  # of W that a program multiplies at a time
SQUARE = 64  # the side of a tile of W that is made of S


@triton.jit(do_not_specialize=["N"])
def affinity_kernel(
    similarity_ptr,  # [B, N, N] any floating-point dtype
    affinity_ptr,  # [B, N, SW] fp32, W times its unit, as in all that follows
    N,
    SW,
    stride_sb,
    stride_sm,
    stride_sn,
    BN: tl.constexpr,
):
    tiles = tl.cdiv(N, BN)
    i_b, i_tile = (tl.program_id(0) // (tiles * tiles)).to(tl.int64), tl.program_id(0) % (tiles * tiles)
    o_m, o_n = i_tile // tiles * BN + tl.arange(0, BN), i_tile % tiles * BN + tl.arange(0, BN)
    mask = (o_m < N)[:, None] & (o_n < N)[None, :]
    p_similarity = similarity_ptr + i_b * stride_sb
    p_row = p_similarity + o_m[:, None] * stride_sm + o_n[None, :] * stride_sn
    p_column = p_similarity + o_n[None, :] * stride_sm + o_m[:, None] * stride_sn
    b_sum = tl.load(p_row, mask=mask, other=0.0).to(tl.float32) + tl.load(p_column, mask=mask, other=0.0).to(tl.float32)
    tl.store(affinity_ptr + (i_b * N + o_m[:, None]) * SW + o_n[None, :], b_sum * (fp16_unit(N) / 2), mask=mask)


@triton.jit
def multiply(b_left, b_right):
    """The product of two tiles in fp32."""
    return tl.dot(b_left, b_right, input_precision="ieee")


@triton.jit
def row_of(b_rows, i):
    """Row i of a tile."""
    o_r = tl.arange(0, b_rows.shape[0])
    return tl.sum(tl.where(o_r[:, None] == i, b_rows, 0.0), axis=0)


@triton.jit
def diagonal(b_square):
    o_r = tl.arange(0, b_square.shape[0])
    return tl.sum(tl.where(o_r[:, None] == o_r[None, :], b_square, 0.0), axis=1)


@triton.jit
def orthonormal(b_gram, NEW: tl.constexpr, COUNT: tl.constexpr):
    """T with T gram T^T = 1 for the first COUNT vectors: Cholesky's factor, inverted. Vectors with nothing new give 0.

    They fade out between 2 NEW and NEW, so that what one thread rounds differently than another changes nothing much.
    """
    R: tl.constexpr = b_gram.shape[0]
    o_r = tl.arange(0, R)
    b_length = diagonal(b_gram)
    b_unit = tl.where(b_length > 0, 1.0 / tl.sqrt(tl.where(b_length > 0, b_length, 1.0)), 0.0)
    b_gram = b_gram * b_unit[:, None] * b_unit[None, :]
    b_t = tl.where(o_r[:, None] == o_r[None, :], 1.0, 0.0)
    for i in range(COUNT):
        b_row = row_of(b_gram, i)
        pivot = tl.sum(tl.where(o_r == i, b_row, 0.0))
        factor = tl.sqrt(tl.minimum(tl.maximum(pivot / NEW - 1.0, 0.0), 1.0) / tl.maximum(pivot, NEW))
        b_row, b_own = factor * b_row, factor * row_of(b_t, i)
        b_below = tl.where(o_r > i, b_row, 0.0)
        b_t = tl.where((o_r == i)[:, None], b_own[None, :], b_t - b_below[:, None] * b_own[None, :])
        b_gram -= b_below[:, None] * b_row[None, :]
    return b_t * b_unit[None, :]


# The vectors of an image are a matrix [GROUPS, N, 8]: in a row of a group, 1 or 0, WIDTH vectors and zeros.


@triton.jit
def load_lanes(p_vectors, o_lane, o_n, N):
    """Column o_lane % 8 of group o_lane // 8, for some patches: [BM, lanes]."""
    p_lane = p_vectors + (o_lane // 8)[None, :] * N * 8 + (o_lane % 8)[None, :]
    return tl.load(p_lane + o_n[:, None] * 8, mask=(o_n < N)[:, None], other=0.0)


@triton.jit
def store_group(p_vectors, group, b_x, o_n, N, first, WIDTH: tl.constexpr):
    """The vectors of b_x [BM, 8] after a column of `first`, and zeros."""
    o_p = tl.arange(0, 8)
    b_x = tl.where((o_p == 0)[None, :], first, tl.where((o_p <= WIDTH)[None, :], b_x, 0.0))
    tl.store(p_vectors + (group * N + o_n[:, None]) * 8 + o_p[None, :], b_x, mask=(o_n < N)[:, None])


@triton.jit
def start_group(p_start, stride_tw, stride_tn, o_n, N, GIVEN: tl.constexpr, WIDTH: tl.constexpr):
    """1 and the first Y, [BM, 8]: what is given, and vectors that no eigenvector is orthogonal to."""
    o_p = tl.arange(0, 8)
    # What follows the point in multiples of the roots of 5, 2, 3, 7 and 11, as integers: every program finds the same.
    b_root = tl.where(o_p == 1, 0x3C6EF372, tl.where(o_p == 2, 0x6A09E667, 0xBB67AE85))
    b_root = tl.where(o_p == 4, 0xA54FF53A, tl.where(o_p == 5, 0x510E527F, b_root)).to(tl.uint32)
    b_turn = (o_n + 1).to(tl.uint32)[:, None] * b_root[None, :]
    b_y = (b_turn >> 8).to(tl.float32) * (1 / (1 << 24)) - 0.5
    if GIVEN > 0:
        m_given = (o_p > 0) & (o_p <= GIVEN)
        p_given = p_start + (o_p - 1)[None, :] * stride_tw + o_n[:, None] * stride_tn
        b_given = N * tl.load(p_given, mask=m_given[None, :] & (o_n < N)[:, None], other=0.0).to(tl.float32)
        b_y = tl.where(m_given[None, :], b_given + 1e-5 * b_y, b_y)  # of a start of zeros, this is left
    b_y = tl.where((o_p == 0)[None, :], 1.0, tl.where((o_p <= WIDTH)[None, :], b_y, 0.0))
    return tl.where((o_n < N)[:, None], b_y, 0.0)


@triton.jit
def halves(b_x, dtype: tl.constexpr):
    """What W is multiplied with for vectors b_x [BM, 8]: two tiles side by side, [BM, 16]."""
    if dtype == tl.float32:
        b_high, b_low = b_x, 0.0 * b_x
    else:
        b_high = tl.minimum(tl.maximum(b_x, -65504.0), 65504.0).to(tl.float16)
        b_low = ((b_x - b_high.to(tl.float32)) * 2048.0).to(tl.float16)
    return tl.reshape(tl.join(b_high, b_low), [b_x.shape[0], 16])


@triton.jit
def row_products(
    p_affinity,  # [N, SW] fp16 or fp32, W
    p_start,  # [GIVEN, N]
    p_group,  # [N, 8] fp32
    o_m,
    N,
    SW,
    stride_tw,
    stride_tn,
    FROM_START: tl.constexpr,
    GIVEN: tl.constexpr,
    WIDTH: tl.constexpr,
    BN: tl.constexpr,
):
    """The rows o_m of W times the start or a group, [BM, 8]."""
    dtype: tl.constexpr = p_affinity.dtype.element_ty
    b_out = tl.zeros([o_m.shape[0], 16], tl.float32)
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        mask = (o_m < N)[:, None] & (o_n < N)[None, :]
        b_affinity = tl.load(p_affinity + o_m[:, None] * SW + o_n[None, :], mask=mask, other=0.0)
        if FROM_START:
            b_x = start_group(p_start, stride_tw, stride_tn, o_n, N, GIVEN, WIDTH)
        else:
            b_x = load_lanes(p_group, tl.arange(0, 8), o_n, N)
        b_out = tl.dot(b_affinity, halves(b_x, dtype), b_out, input_precision="ieee")
    b_high, b_low = tl.split(tl.reshape(b_out, [o_m.shape[0], 8, 2]))
    return b_high + b_low / 2048.0


@triton.jit
def over_degree(b_x, b_degree):
    """Deg^-1 b_x."""
    m_linked = b_degree > 0
    return tl.where(m_linked[:, None], b_x / tl.where(m_linked, b_degree, 1.0)[:, None], 0.0)


@triton.jit
def first_gram(p_few, p_vectors, p_degree, o_m, N):
    """The inner products of 1 and Y with 1, Y, 1 and Z over some rows: [8, 16]."""
    o_r = tl.arange(0, 16)
    b_degree = tl.load(p_degree + o_m, mask=o_m < N, other=0.0)
    b_x = load_lanes(p_vectors, o_r, o_m, N)
    b_gram = multiply(tl.trans(b_x * b_degree[:, None]), b_x)
    tl.store(p_few + o_r[:, None] * 16 + o_r[None, :], b_gram, mask=(o_r < 8)[:, None])


@triton.jit
def parts(p_few, tiles, BT: tl.constexpr):
    """a with Z - (1, Y) a next to orthogonal to 1 and Y, [8, 8], nearer the nearer these are to orthogonal."""
    o_r = tl.arange(0, 8)
    b_sum = tl.reshape(sum_tiles(p_few, tiles, BT, FEW), [8, 2, 8])
    b_gram, b_products = tl.split(tl.permute(b_sum, (0, 2, 1)))
    b_length = diagonal(b_gram)
    b_over = tl.where(b_length > 0, 1.0 / tl.where(b_length > 0, b_length, 1.0), 0.0)
    b_part = b_products * b_over[:, None]
    b_rest = b_products - tl.sum(b_gram[:, :, None] * b_part[None, :, :], axis=1)
    return tl.where((o_r > 0)[None, :], b_part + b_rest * b_over[:, None], 0.0)


@triton.jit
def store_residual(p_vectors, b_part, o_m, N, WIDTH: tl.constexpr):
    """Some rows of R0."""
    o_r = tl.arange(0, 8)
    b_y, b_z = load_lanes(p_vectors, o_r, o_m, N), load_lanes(p_vectors, 8 + o_r, o_m, N)
    b_z -= tl.sum(b_y[:, :, None] * b_part[None, :, :], axis=1)
    store_group(p_vectors, 2, b_z, o_m, N, 0.0, WIDTH)


@triton.jit
def basis_lanes(image, WIDTH: tl.constexpr):
    """The lanes of K, or of M K: [16]."""
    o_r = tl.arange(0, 16)
    o_part = (o_r - 1) // WIDTH
    o_group = o_part + (o_part > 0) + image
    return tl.where(o_r == 0, 0, o_group * 8 + (o_r - 1) % WIDTH + 1)


@triton.jit
def last_gram(p_all, p_vectors, p_degree, o_m, N, WIDTH: tl.constexpr):
    """The inner products of K with K, and of M K with K, over some rows: [2, 16, 16]."""
    o_r = tl.arange(0, 16)
    b_degree = tl.load(p_degree + o_m, mask=o_m < N, other=0.0)
    b_basis = load_lanes(p_vectors, basis_lanes(0, WIDTH), o_m, N)
    b_images = load_lanes(p_vectors, basis_lanes(1, WIDTH), o_m, N)
    b_weighted = b_basis * b_degree[:, None]
    p_gram = p_all + o_r[:, None] * 16 + o_r[None, :]
    tl.store(p_gram, multiply(tl.trans(b_basis), b_weighted))
    tl.store(p_gram + 256, multiply(tl.trans(b_images), b_weighted))


@triton.jit
def sum_tiles(p_gram, tiles, BT: tl.constexpr, SIZE: tl.constexpr):
    """Inner products over all rows: [SIZE]."""
    o_s = tl.arange(0, SIZE)
    b_sum = tl.zeros([BT, SIZE], tl.float32)
    for first in range(0, tiles, BT):
        o_t = first + tl.arange(0, BT)
        b_sum += tl.load(p_gram + o_t[:, None] * SIZE + o_s[None, :], mask=(o_t < tiles)[:, None], other=0.0)
    return tl.sum(b_sum, axis=0)


@triton.jit
def squared(b_power, times: tl.constexpr):
    """A symmetric matrix squared up to four times, its largest entry having been made 1."""
    b_power = b_power / tl.maximum(tl.max(tl.max(tl.abs(b_power), axis=1), axis=0), 1e-30)
    for _squaring in tl.static_range(times):
        b_power = multiply(b_power, b_power)
    return b_power


@triton.jit
def ritz_coefficients(
    p_all,
    tiles,
    BT: tl.constexpr,
    WIDTH: tl.constexpr,
    RESTART: tl.constexpr,
    SQUARINGS: tl.constexpr,
    NEW: tl.constexpr,
):
    """What makes the next Y, whose first vector is y, of M K: [16, 16], a column each."""
    o_r = tl.arange(0, 16)
    b_both = tl.permute(tl.reshape(sum_tiles(p_all, tiles, BT, ALL), [2, 16, 16]), (1, 2, 0))
    b_gram, b_images = tl.split(b_both)
    # Programs round a small R0 differently, so that R1 is not quite its product: their inner products with others are
    # taken from the products of those, and an R0 that is nothing but rounding is left out.
    m_first = (o_r > WIDTH) & (o_r <= 2 * WIDTH)
    b_images = tl.where(m_first[:, None] & (m_first[None, :] == 0), tl.trans(b_images), b_images)
    b_length = diagonal(b_gram)
    b_before = tl.sum(tl.where(o_r[None, :] + WIDTH == o_r[:, None], b_length[None, :], 0.0), axis=1)
    m_sound = (m_first == 0) | (b_length > ROUNDING * b_before)
    b_t = orthonormal(tl.where(m_sound[:, None] & m_sound[None, :], b_gram, 0.0), NEW, 16)
    b_projected = multiply(multiply(b_t, b_images), tl.trans(b_t))
    # Without 1, and without vectors that were left out. 1 is added, so that no eigenvalue is negative.
    on = (o_r > 0) & (diagonal(b_t) > 0)
    b_power = tl.where(on[:, None] & on[None, :], (b_projected + tl.trans(b_projected)) / 2, 0.0)
    b_power += tl.where(on[:, None] & (o_r[:, None] == o_r[None, :]), 1.0, 0.0)
    b_power = squared(b_power, RESTART)
    m_next = (o_r[:, None] + 1 == o_r[None, :]) & ((o_r > 0) & (o_r < WIDTH))[:, None]
    b_lower = multiply(tl.where(m_next, 1.0, 0.0), b_power)
    for _four in tl.static_range((SQUARINGS - RESTART) // 4):
        b_power = squared(b_power, 4)
    b_power = squared(b_power, (SQUARINGS - RESTART) % 4)
    b_ritz = row_of(b_power, tl.argmax(diagonal(b_power), axis=0))
    b_next = tl.where((o_r == 0)[:, None], b_ritz[None, :], b_lower)
    b_own = orthonormal(multiply(b_next, tl.trans(b_next)), 1e-6, WIDTH)
    return tl.trans(multiply(multiply(b_own, b_next), b_t))


@triton.jit
def next_vectors(p_vectors, b_ritz, o_n, N, WIDTH: tl.constexpr):
    """The next Y at some patches, [BM, 16]: as many columns as there are vectors."""
    return multiply(load_lanes(p_vectors, basis_lanes(1, WIDTH), o_n, N), b_ritz)


@triton.jit
def restart(p_vectors, b_ritz, N, WIDTH: tl.constexpr, BF: tl.constexpr):
    """The next Y."""
    o_p = tl.arange(0, 16)
    for start in range(0, N, BF):
        o_n = start + tl.arange(0, BF)
        b_y = N * next_vectors(p_vectors, b_ritz, o_n, N, WIDTH)
        p_y = p_vectors + o_n[:, None] * 8 + 1 + o_p[None, :]
        tl.store(p_y, b_y, mask=(o_n < N)[:, None] & (o_p < WIDTH)[None, :])


@triton.jit
def finish(
    p_vectors,
    p_degree,
    b_ritz,
    p_out,  # [WIDTH, N] fp32, y and the others
    p_distraction,  # [N] bool, read where TARGET
    p_target,  # [N] bool
    N,
    stride_dn,
    TARGET: tl.constexpr,
    WIDTH: tl.constexpr,
    BF: tl.constexpr,
    BP: tl.constexpr,
):
    """y, of length 1, its largest entry being positive, and the defocused tokens."""
    o_p, o_v = tl.arange(0, 16), tl.arange(0, 8)
    b_top, b_bottom = tl.zeros([BF], tl.float32), tl.zeros([BF], tl.float32)
    b_sum, b_length = tl.zeros([BF], tl.float32), tl.zeros([BF], tl.float32)
    for start in range(0, N, BF):
        o_n = start + tl.arange(0, BF)
        b_degree = tl.load(p_degree + o_n, mask=o_n < N, other=0.0)
        b_next = tl.where((b_degree > 0)[:, None], next_vectors(p_vectors, b_ritz, o_n, N, WIDTH), 0.0)
        p_next = p_out + o_p[None, :] * N + o_n[:, None]
        tl.store(p_next, b_next, mask=(o_p < WIDTH)[None, :] & (o_n < N)[:, None])
        b_y = tl.sum(tl.where((o_p == 0)[None, :], b_next, 0.0), axis=1)
        b_top, b_bottom = tl.maximum(b_top, b_y), tl.minimum(b_bottom, b_y)
        b_sum += b_y
        b_length += b_degree * b_y * b_y
    length = tl.sqrt(tl.sum(b_length, axis=0) / fp16_unit(N))
    scale = tl.where(length > 0, 1.0 / tl.where(length > 0, length, 1.0), 0.0)
    scale = tl.where(tl.max(b_top, axis=0) >= -tl.min(b_bottom, axis=0), scale, -scale)
    mean = scale * tl.sum(b_sum, axis=0) / N
    tl.debug_barrier()
    for start in range(0, N, BP):
        o_n = start + tl.arange(0, BP)
        p_next = p_out + o_v[:, None] * N + o_n[None, :]
        mask = (o_v < WIDTH)[:, None] & (o_n < N)[None, :]
        b_next = scale * tl.load(p_next, mask=mask, other=0.0)
        tl.store(p_next, b_next, mask=mask)
        if TARGET:
            m_free = tl.load(p_distraction + o_n * stride_dn, mask=o_n < N, other=1) == 0
            tl.store(p_target + o_n, m_free & (row_of(b_next, 0) > mean), mask=o_n < N)


@triton.jit(do_not_specialize=["N", "stride_tb", "stride_tw", "stride_db"])
def cut_kernel(
    affinity_ptr,  # [B, N, SW] fp16 or fp32, W
    start_ptr,  # [B, GIVEN, N]
    distraction_ptr,  # [B, N] bool
    vectors_ptr,  # [B, GROUPS, N, 8] fp32
    degree_ptr,  # [B, N] fp32
    gram_ptr,  # [B, tiles, FEW + ALL] fp32
    out_ptr,  # [B, WIDTH, N] fp32
    target_ptr,  # [B, N] bool
    order_ptr,  # [B, N + 1] int32
    N,
    SW,
    stride_ab,
    stride_tb,
    stride_tw,
    stride_tn,
    stride_db,
    stride_dn,
    GIVEN: tl.constexpr,
    TARGET: tl.constexpr,
    ROUNDS: tl.constexpr,
    COLD: tl.constexpr,  # rounds of an image whose start is zero
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    RESTART: tl.constexpr,
    SQUARINGS: tl.constexpr,
    NEW: tl.constexpr,
    BN: tl.constexpr,
    BF: tl.constexpr,
    WHOLE: tl.constexpr,  # at least N
):
    i_b, tiles = tl.program_id(0).to(tl.int64), tl.cdiv(N, BF)
    p_affinity, p_start = affinity_ptr + i_b * stride_ab, start_ptr + i_b * stride_tb
    p_vectors, p_degree = vectors_ptr + i_b * GROUPS * N * 8, degree_ptr + i_b * N
    p_few = gram_ptr + i_b * tiles * (FEW + ALL)
    p_all, p_out = p_few + tiles * FEW, out_ptr + i_b * WIDTH * N
    p_distraction, p_target = distraction_ptr + i_b * stride_db, target_ptr + i_b * N
    p_order, o_n = order_ptr + i_b * (N + 1), tl.arange(0, WHOLE)
    rounds = ROUNDS
    if GIVEN > 0:
        b_given = tl.load(p_start + o_n * stride_tn, mask=o_n < N, other=0.0).to(tl.float32)
        rounds = tl.where(tl.max(tl.abs(b_given), axis=0) > 0, ROUNDS, COLD)
    if TARGET:
        o_p = tl.arange(0, 8)
        m_taken = tl.load(p_distraction + o_n * stride_dn, mask=o_n < N, other=0) != 0
        rounds = tl.where(tl.max(m_taken.to(tl.int32), axis=0) > 0, rounds, 0)
        p_next = p_out + o_p[:, None] * N + o_n[None, :]
        tl.store(p_next, tl.zeros([8, WHOLE], tl.float32), mask=(o_p < WIDTH)[:, None] & (o_n < N)[None, :])
        tl.store(p_target + o_n, m_taken & (o_n < 0), mask=o_n < N)
    if rounds > 0:
        b_x = start_group(p_start, stride_tw, stride_tn, o_n, N, GIVEN, WIDTH)
        store_group(p_vectors, 0, b_x, o_n, N, 1.0, WIDTH)
    for i in range(rounds):
        tl.debug_barrier()
        b_x = row_products(p_affinity, p_start, p_vectors, o_n, N, SW, stride_tw, stride_tn, False, GIVEN, WIDTH, BN)
        b_degree = tl.sum(tl.where((tl.arange(0, 8) == 0)[None, :], b_x, 0.0), axis=1)
        tl.store(p_degree + o_n, b_degree, mask=o_n < N)
        store_group(p_vectors, 1, over_degree(b_x, b_degree), o_n, N, 1.0, WIDTH)
        tl.debug_barrier()
        for i_m in range(tiles):
            first_gram(p_few + i_m * FEW, p_vectors, p_degree, i_m * BF + tl.arange(0, BF), N)
        tl.debug_barrier()
        b_part = parts(p_few, tiles, 4)
        for i_m in range(tiles):
            store_residual(p_vectors, b_part, i_m * BF + tl.arange(0, BF), N, WIDTH)
        for step in range(2, GROUPS - 1):
            tl.debug_barrier()
            p_group = p_vectors + step * N * 8
            b_x = row_products(p_affinity, p_start, p_group, o_n, N, SW, stride_tw, stride_tn, False, GIVEN, WIDTH, BN)
            store_group(p_vectors, step + 1, over_degree(b_x, b_degree), o_n, N, 0.0, WIDTH)
        tl.debug_barrier()
        for i_m in range(tiles):
            last_gram(p_all + i_m * ALL, p_vectors, p_degree, i_m * BF + tl.arange(0, BF), N, WIDTH)
        tl.debug_barrier()
        b_ritz = ritz_coefficients(p_all, tiles, 4, WIDTH, RESTART, SQUARINGS, NEW)
        if i < rounds - 1:
            restart(p_vectors, b_ritz, N, WIDTH, BF)
        else:
            finish(p_vectors, p_degree, b_ritz, p_out, p_distraction, p_target, N, stride_dn, TARGET, WIDTH, BF, WHOLE)
    if TARGET:
        tl.debug_barrier()
        order_patches(p_distraction, stride_dn, p_target, 1, p_order, N, WHOLE)


@triton.jit(do_not_specialize=["N", "stride_tb", "stride_tw"])
def cut_first_kernel(
    affinity_ptr,  # this and all that follows as in cut_kernel
    start_ptr,
    vectors_ptr,
    degree_ptr,
    gram_ptr,
    N,
    SW,
    stride_ab,
    stride_tb,
    stride_tw,
    stride_tn,
    BEGINS: tl.constexpr,  # whether Y is the start
    GIVEN: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Some rows of Deg and Z."""
    tiles = tl.cdiv(N, BM)
    i_b, i_m = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    p_affinity, p_start = affinity_ptr + i_b * stride_ab, start_ptr + i_b * stride_tb
    p_vectors, p_degree = vectors_ptr + i_b * GROUPS * N * 8, degree_ptr + i_b * N
    o_m = i_m * BM + tl.arange(0, BM)
    b_x = row_products(p_affinity, p_start, p_vectors, o_m, N, SW, stride_tw, stride_tn, BEGINS, GIVEN, WIDTH, BN)
    b_degree = tl.sum(tl.where((tl.arange(0, 8) == 0)[None, :], b_x, 0.0), axis=1)
    tl.store(p_degree + o_m, b_degree, mask=o_m < N)
    store_group(p_vectors, 1, over_degree(b_x, b_degree), o_m, N, 1.0, WIDTH)
    if BEGINS:
        b_y = start_group(p_start, stride_tw, stride_tn, o_m, N, GIVEN, WIDTH)
        store_group(p_vectors, 0, b_y, o_m, N, 1.0, WIDTH)
    tl.debug_barrier()
    first_gram(gram_ptr + i_b * tiles * (FEW + ALL) + i_m * FEW, p_vectors, p_degree, o_m, N)


@triton.jit(do_not_specialize=["N"])
def cut_residual_kernel(
    vectors_ptr, gram_ptr, N, WIDTH: tl.constexpr, GROUPS: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr
):
    """Some rows of R0."""
    tiles, blocks = tl.cdiv(N, BM), tl.cdiv(N, BF)
    i_b, i_m = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    b_part = parts(gram_ptr + i_b * tiles * (FEW + ALL), tiles, 32)
    store_residual(vectors_ptr + i_b * GROUPS * N * 8, b_part, i_m * BF + tl.arange(0, BF), N, WIDTH)


@triton.jit(do_not_specialize=["N"])
def cut_next_kernel(
    affinity_ptr,
    vectors_ptr,
    degree_ptr,
    gram_ptr,
    N,
    SW,
    stride_ab,
    STEP: tl.constexpr,  # 2 or 3, the group that is multiplied
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Some rows of R1 or R2."""
    tiles = tl.cdiv(N, BM)
    i_b, i_m = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    p_vectors, p_degree = vectors_ptr + i_b * GROUPS * N * 8, degree_ptr + i_b * N
    p_affinity, p_group = affinity_ptr + i_b * stride_ab, p_vectors + STEP * N * 8
    o_m = i_m * BM + tl.arange(0, BM)
    b_x = row_products(p_affinity, p_group, p_group, o_m, N, SW, 0, 0, False, 0, WIDTH, BN)
    b_degree = tl.load(p_degree + o_m, mask=o_m < N, other=0.0)
    store_group(p_vectors, STEP + 1, over_degree(b_x, b_degree), o_m, N, 0.0, WIDTH)
    if STEP == GROUPS - 2:
        tl.debug_barrier()
        p_all = gram_ptr + i_b * tiles * (FEW + ALL) + tiles * FEW
        last_gram(p_all + i_m * ALL, p_vectors, p_degree, o_m, N, WIDTH)


@triton.jit(do_not_specialize=["N", "stride_db"])
def cut_round_kernel(
    distraction_ptr,
    vectors_ptr,
    degree_ptr,
    gram_ptr,
    out_ptr,
    target_ptr,
    order_ptr,
    N,
    stride_db,
    stride_dn,
    LAST: tl.constexpr,
    TARGET: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    RESTART: tl.constexpr,
    SQUARINGS: tl.constexpr,
    NEW: tl.constexpr,
    BM: tl.constexpr,
    BF: tl.constexpr,
    BP: tl.constexpr,
):
    """The end of a round."""
    i_b, tiles = tl.program_id(0).to(tl.int64), tl.cdiv(N, BM)
    p_vectors, p_degree = vectors_ptr + i_b * GROUPS * N * 8, degree_ptr + i_b * N
    p_distraction, p_target = distraction_ptr + i_b * stride_db, target_ptr + i_b * N
    p_all = gram_ptr + i_b * tiles * (FEW + ALL) + tiles * FEW
    b_ritz = ritz_coefficients(p_all, tiles, 16, WIDTH, RESTART, SQUARINGS, NEW)
    if LAST:
        p_out = out_ptr + i_b * WIDTH * N
        finish(p_vectors, p_degree, b_ritz, p_out, p_distraction, p_target, N, stride_dn, TARGET, WIDTH, BF, BP)
        if TARGET:
            tl.debug_barrier()
            order_patches(p_distraction, stride_dn, p_target, 1, order_ptr + i_b * (N + 1), N, BP)
    else:
        restart(p_vectors, b_ritz, N, WIDTH, BF)


def _cut(
    affinity: Tensor, start: Tensor | None, distraction: Tensor | None, cold: int, warm: int
) -> tuple[Tensor, Tensor, Tensor]:
    """y and four other vectors [B, 5, N]; the defocused tokens [B, N] and the patches in order, if there are masks."""
    B, N, _ = affinity.shape
    empty, tiles = partial(affinity.new_empty, dtype=torch.float32), triton.cdiv(N, BLOCK_ROWS)
    out, vectors, degree = empty((B, WIDTH, N)), empty((B, GROUPS, N, 8)), empty((B, N))
    target, order = empty((B, N), dtype=torch.bool), empty((B, N + 1), dtype=torch.int32)
    gram = empty((B, tiles, FEW.value + ALL.value))
    common = {"N": N, "WIDTH": WIDTH, "GROUPS": GROUPS}
    state = common | {"vectors_ptr": vectors, "degree_ptr": degree, "gram_ptr": gram}
    matrix = {"affinity_ptr": affinity, "SW": affinity.stride(1), "stride_ab": affinity.stride(0)}
    given = 0 if start is None else start.shape[1]
    begun = out if start is None else start
    beginning = {"start_ptr": begun, "GIVEN": given, **strides("t", begun, "bwn")}
    rounds = cold if start is None else warm
    taken = target if distraction is None else distraction
    ended = {"distraction_ptr": taken, **strides("d", taken, "bn"), "out_ptr": out, "target_ptr": target}
    ended |= {"order_ptr": order, "TARGET": distraction is not None}
    ended |= {"RESTART": RESTART, "SQUARINGS": SQUARINGS, "NEW": NEW}
    if N <= WHOLE and affinity.dtype != torch.float32:
        one = {"WHOLE": max(16, triton.next_power_of_2(N)), "BN": BLOCK_COLUMNS, "BF": BLOCK_ROWS}
        one |= {"ROUNDS": rounds, "COLD": cold, "num_warps": 8}
        wrap_triton(cut_kernel)[(B,)](**state | one, **matrix, **beginning, **ended)
        return out, target, order
    rows = (B * tiles,)
    blocks = {"BM": BLOCK_ROWS, "BN": BLOCK_COLUMNS, "num_warps": 4}
    for i in range(rounds):
        wrap_triton(cut_first_kernel)[rows](**state | blocks, **matrix, **beginning, BEGINS=i == 0)
        wrap_triton(cut_residual_kernel)[(B * triton.cdiv(N, 64),)](
            **common, vectors_ptr=vectors, gram_ptr=gram, BM=BLOCK_ROWS, BF=64, num_warps=4
        )
        for step in range(2, GROUPS - 1):
            wrap_triton(cut_next_kernel)[rows](**state | blocks, **matrix, STEP=step)
        last = i == rounds - 1
        wrap_triton(cut_round_kernel)[(B,)](
            **state, **ended, BM=BLOCK_ROWS, BF=256, BP=1024, LAST=last, num_warps=8
        )
    return out, target, order


@triton_op("rfclip::fiedler_vector", mutates_args={})
def _fiedler_vector(similarity: Tensor, start: Tensor | None) -> Tensor:
    B, N, _ = similarity.shape
    affinity = empty_affinity(similarity, N, torch.float32)
    if not B:
        return similarity.new_empty((B, N), dtype=torch.float32)
    with on_device(similarity):
        wrap_triton(affinity_kernel)[(triton.cdiv(N, SQUARE) ** 2 * B,)](
            similarity_ptr=similarity,
            affinity_ptr=affinity,
            N=N,
            SW=affinity.stride(1),
            **strides("s", similarity, "bmn"),
            BN=SQUARE,
            num_warps=8,
        )
        return _cut(affinity, None if start is None else start[:, None], None, ROUNDS, FROM_START)[0][:, 0]


@triton_op("rfclip::defocused_tokens", mutates_args={})
def _defocused_tokens(affinity: Tensor, distraction: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    B, N, _ = affinity.shape
    if not B:
        empty = partial(affinity.new_empty, dtype=torch.float32)
        return empty((0, WIDTH, N)), empty((0, N), dtype=torch.bool), empty((0, N + 1), dtype=torch.int32)
    with on_device(affinity):
        return _cut(affinity, start, distraction, TOWER_ROUNDS, TOWER_FROM_START)


def launch_fiedler_vector(similarity: Tensor, start: Tensor | None) -> Tensor:
    """Five rounds, or three from a start.

    Where they cannot tell the second eigenvalue from the third, y is some vector of their eigenspaces.
    """
    check_launch(similarity=similarity, start=start)
    return _fiedler_vector(similarity, start)


def launch_defocused_tokens(
    affinity: Tensor, distraction: Tensor, start: Tensor | None, threshold: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Three rounds, or one from the vectors that the block before ended with; "otsu" takes two launches more.

    Up to 256 patches, an image without distraction has no target, and vectors of zeros: the next block begins anew.
    """
    check_launch(affinity=affinity, distraction=distraction, start=start)
    vectors, target, order = _defocused_tokens(affinity, distraction, start)
    if threshold == "otsu":
        target = launch_defocus_mask(vectors[:, 0], distraction, threshold)
        order = ordered_patches(distraction, target)
    return vectors, target, order
