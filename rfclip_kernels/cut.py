"""The graph cut that finds defocused tokens: equation 8 of the paper, and the threshold below it.

(Deg - W) y = lambda Deg y,  W = (S + S^T) / 2,  Deg = diag(W 1);  so y is the second eigenvector of M = Deg^-1 W, the
first being 1, and M is symmetric in the inner product <a, b> = a^T Deg b.

A round takes three vectors Y and makes y of the space that they and four more products span:

    Z = M Y,  R0 = Z less its part in span(1, Y),  Ri = M R(i-1);  basis K = (1, Y, R0, R1, R2, R3), sixteen vectors,
    whose products with M are known: M K = (1, Z, R1, R2, R3, R4)

Nothing is orthogonalized on the way: the inner products of all vectors are taken at once, and Cholesky's factor of
those of K makes it orthonormal, T K, without what is new only up to rounding. In it M is a matrix [16, 16]. Squaring
that leaves its leading eigenvector, t, and y = t T M K, which is one product nearer than t T K. The next round starts
from y and from two more rows of a lower power. There are five rounds, or three from a vector near y. In a tower three
are enough for the first block, and one for every other, from the three vectors that the block before ended with.

Up to 256 patches one launch does it all, one program an image, and an image without distraction ends at once. Above, a
product is a launch, whose programs take some rows of W each and read W once, and so is the end of a round. Degrees come
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

WIDTH, DEPTH = 3, 5  # vectors that are multiplied at once, and how often in a round
BASIS = 16  # 1 and WIDTH * DEPTH others
ROUNDS, FROM_START = 5, 3  # that resolve y, and those that a start leaves
TOWER_ROUNDS, TOWER_FROM_START = 3, 1  # that resolve the mask of the defocused tokens
RESTART = 3  # squarings of the projected matrix before the next round's start is taken from it
SQUARINGS = 12  # that its leading eigenvector takes
NEW = 1e-2  # the squared length of what a vector adds to the basis, over its own, is more than this
ROUNDING = tl.constexpr(1e-11)  # the squared length of R0 over that of Y, if it is more than rounding
WHOLE = 256  # patches that one program takes
BLOCK_ROWS, BLOCK_COLUMNS = 16, 256  # of W that a program multiplies at a time
WHOLE_COLUMNS = 128  # if it takes all rows in turn, which needs registers for more than that
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
def inner(b_rows, b_others):
    return tl.sum(b_rows[:, None, :] * b_others[None, :, :], axis=2)  # [P, K] @ [R, K]^T -> [P, R]


@triton.jit
def combine(b_coefficients, b_rows):
    return tl.sum(b_coefficients[:, :, None] * b_rows[None, :, :], axis=1)  # [P, R] @ [R, BN] -> [P, BN]


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
def orthonormal(b_gram, NEW: tl.constexpr):
    """T with T gram T^T = 1: Cholesky's factor, inverted. Rows of vectors with nothing new are 0.

    They fade out between 2 NEW and NEW, so that what one thread rounds differently than another changes nothing much.
    """
    R: tl.constexpr = b_gram.shape[0]
    o_r = tl.arange(0, R)
    b_length = diagonal(b_gram)
    b_unit = tl.where(b_length > 0, 1.0 / tl.sqrt(tl.where(b_length > 0, b_length, 1.0)), 0.0)
    b_gram = b_gram * b_unit[:, None] * b_unit[None, :]
    b_t = tl.where(o_r[:, None] == o_r[None, :], 1.0, 0.0)
    for i in range(R):
        b_row = row_of(b_gram, i)
        pivot = tl.sum(tl.where(o_r == i, b_row, 0.0))
        factor = tl.sqrt(tl.minimum(tl.maximum(pivot / NEW - 1.0, 0.0), 1.0) / tl.maximum(pivot, NEW))
        b_row, b_own = factor * b_row, factor * row_of(b_t, i)
        b_below = tl.where(o_r > i, b_row, 0.0)
        b_t = tl.where((o_r == i)[:, None], b_own[None, :], b_t - b_below[:, None] * b_own[None, :])
        b_gram -= b_below[:, None] * b_row[None, :]
    return b_t * b_unit[None, :]


# The vectors of an image are rows of a matrix [7 * WIDTH, N], Y, Z, R0 .. R4. As lanes they follow a lane of ones.


@triton.jit
def load_lanes(p_vectors, o_lane, o_n, N, LANES: tl.constexpr):
    """Some lanes, of the first LANES, at the patches o_n; the others are 0."""
    mask = ((o_lane > 0) & (o_lane < LANES))[:, None] & (o_n < N)[None, :]
    b_lanes = tl.load(p_vectors + (o_lane - 1)[:, None] * N + o_n[None, :], mask=mask, other=0.0)
    return tl.where((o_lane == 0)[:, None] & (o_n < N)[None, :], 1.0, b_lanes)


@triton.jit
def store_rows(p_rows, b_rows, o_n, N, WIDTH: tl.constexpr):
    """The first WIDTH rows of a tile at the patches o_n."""
    o_p = tl.arange(0, b_rows.shape[0])
    tl.store(p_rows + o_p[:, None] * N + o_n[None, :], b_rows, mask=(o_p < WIDTH)[:, None] & (o_n < N)[None, :])


@triton.jit
def start_lanes(p_start, stride_tw, stride_tn, o_n, N, GIVEN: tl.constexpr):
    """1 and the first Y, [4, BN]: what is given, and vectors that no eigenvector is orthogonal to."""
    o_p = tl.arange(0, 4)
    # What follows the point in multiples of the roots of 5, 2 and 3, as integers: every program finds the same bits.
    b_root = tl.where(o_p == 1, 0x3C6EF372, tl.where(o_p == 2, 0x6A09E667, 0xBB67AE85)).to(tl.uint32)
    b_turn = b_root[:, None] * (o_n + 1).to(tl.uint32)[None, :]
    b_y = (b_turn >> 8).to(tl.float32) * (1 / (1 << 24)) - 0.5
    if GIVEN > 0:
        m_given = (o_p > 0) & (o_p <= GIVEN)
        p_given = p_start + (o_p - 1)[:, None] * stride_tw + o_n[None, :] * stride_tn
        b_given = tl.load(p_given, mask=m_given[:, None] & (o_n < N)[None, :], other=0.0).to(tl.float32)
        b_y = tl.where(m_given[:, None], b_given + 1e-12 * b_y, b_y)  # of a start of zeros, this is left
    return tl.where((o_n < N)[None, :], tl.where((o_p == 0)[:, None], 1.0, b_y), 0.0)


@triton.jit
def first_factors(p_vectors, p_start, stride_tw, stride_tn, o_n, N, begins, GIVEN: tl.constexpr):
    """1 and Y, [4, BN]: the start, or what the round before left."""
    if begins:
        b_x = start_lanes(p_start, stride_tw, stride_tn, o_n, N, GIVEN)
    else:
        b_x = load_lanes(p_vectors, tl.arange(0, 4), o_n, N, 4)
    return b_x


@triton.jit
def store_gram(p_gram, b_lanes, b_degree):
    """The inner products of lanes [LANES, BM] over the rows of one program."""
    LANES: tl.constexpr = b_lanes.shape[0]
    o_r = tl.arange(0, LANES)
    tl.store(p_gram + o_r[:, None] * LANES + o_r[None, :], inner(b_lanes * b_degree[None, :], b_lanes))


@triton.jit
def sum_grams(p_gram, o_r, o_k, tiles, LANES: tl.constexpr, BT: tl.constexpr):
    """The inner products of the lanes o_r with the lanes o_k over all rows."""
    b_sum = tl.zeros([BT, o_r.shape[0], o_k.shape[0]], tl.float32)
    for first in range(0, tiles, BT):
        o_t = first + tl.arange(0, BT)
        p_tile = p_gram + o_t[:, None, None] * LANES * LANES + o_r[None, :, None] * LANES + o_k[None, None, :]
        b_sum += tl.load(p_tile, mask=(o_t < tiles)[:, None, None], other=0.0)
    return tl.sum(b_sum, axis=0)


@triton.jit
def remainder(p_gram, tiles):
    """What makes R0 of 1, Y and Z, [4, 4]: Z less these multiples of 1 and Y."""
    o_p = tl.arange(0, 4)
    b_t = orthonormal(sum_grams(p_gram, o_p, o_p, tiles, 8, 32), 1e-6)
    b_part = sum_grams(p_gram, o_p + 4, o_p, tiles, 8, 32)  # of the three of Z
    return combine(inner(b_part, b_t), b_t)


@triton.jit
def factors(p_vectors, b_part, o_n, N, step, second, WIDTH: tl.constexpr):
    """What a product after the first multiplies, [4, BN]: R0 in the second, and then what the one before made."""
    o_p = tl.arange(0, 4)
    o_lane = tl.where(o_p < WIDTH, o_p + 1 + WIDTH * (1 + tl.where(step > 1, step, 0)), 100)
    b_x = load_lanes(p_vectors, o_lane, o_n, N, 100)
    if second:
        b_x -= combine(b_part, load_lanes(p_vectors, o_p, o_n, N, 4))
    return b_x


@triton.jit
def row_products(p_affinity, b_x, o_m, o_n, N, SW):
    """The rows o_m of W times b_x [4, BN], before they are summed: [4, BM, BN]."""
    mask = (o_m < N)[:, None] & (o_n < N)[None, :]
    b_affinity = tl.load(p_affinity + o_m[:, None] * SW + o_n[None, :], mask=mask, other=0.0).to(tl.float32)
    return b_x[:, None, :] * b_affinity[None, :, :]


@triton.jit
def first_product(
    p_affinity,  # [N, SW] floating-point, W
    p_start,  # [GIVEN, N]
    p_vectors,  # [7 * WIDTH, N] fp32
    p_degree,  # [N] fp32
    p_gram,  # [tiles, 8, 8] fp32
    i_m,
    N,
    SW,
    stride_tw,
    stride_tn,
    begins,  # whether Y is the start
    GIVEN: tl.constexpr,
    WIDTH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Some rows of Z and of Deg."""
    o_p, o_m = tl.arange(0, 4), i_m * BM + tl.arange(0, BM)
    b_out = tl.zeros([4, BM, BN], tl.float32)
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        b_x = first_factors(p_vectors, p_start, stride_tw, stride_tn, o_n, N, begins, GIVEN)
        b_out += row_products(p_affinity, b_x, o_m, o_n, N, SW)
    b_product = tl.sum(b_out, axis=2)
    b_degree = row_of(b_product, 0)
    b_product = tl.where(b_degree > 0, b_product / tl.where(b_degree > 0, b_degree, 1.0)[None, :], 0.0)
    b_x = first_factors(p_vectors, p_start, stride_tw, stride_tn, o_m, N, begins, GIVEN)
    tl.store(p_degree + o_m, b_degree, mask=o_m < N)
    mask = (o_p > 0)[:, None] & (o_m < N)[None, :]
    if begins:
        tl.store(p_vectors + (o_p - 1)[:, None] * N + o_m[None, :], b_x, mask=mask)
    tl.store(p_vectors + (o_p - 1 + WIDTH)[:, None] * N + o_m[None, :], b_product, mask=mask)
    tl.debug_barrier()
    store_gram(p_gram + i_m * 64, load_lanes(p_vectors, tl.arange(0, 8), o_m, N, 7), b_degree)


@triton.jit
def next_product(
    p_affinity,
    p_vectors,
    p_degree,
    p_gram,  # [tiles, 32, 32] fp32
    b_part,
    i_m,
    N,
    SW,
    step,
    second,  # whether this is step 1
    last,  # and the last one
    WIDTH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Some rows of R1 to R4, and of R0."""
    o_m = i_m * BM + tl.arange(0, BM)
    b_out = tl.zeros([4, BM, BN], tl.float32)
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        b_x = factors(p_vectors, b_part, o_n, N, step, second, WIDTH)
        b_out += row_products(p_affinity, b_x, o_m, o_n, N, SW)
    b_degree = tl.load(p_degree + o_m, mask=o_m < N, other=0.0)
    b_scale = tl.where(b_degree > 0, 1.0 / tl.where(b_degree > 0, b_degree, 1.0), 0.0)
    if second:
        store_rows(p_vectors + 2 * WIDTH * N, factors(p_vectors, b_part, o_m, N, step, second, WIDTH), o_m, N, WIDTH)
    store_rows(p_vectors + (step + 2) * WIDTH * N, tl.sum(b_out, axis=2) * b_scale[None, :], o_m, N, WIDTH)
    if last:
        tl.debug_barrier()
        o_lane = tl.arange(0, 32)
        store_gram(p_gram + i_m * 1024, load_lanes(p_vectors, o_lane, o_m, N, 7 * WIDTH + 1), b_degree)


@triton.jit
def squared(b_power):
    """A symmetric matrix squared, its largest entry having been made 1."""
    b_power = b_power / tl.maximum(tl.max(tl.max(tl.abs(b_power), axis=1), axis=0), 1e-30)
    return inner(b_power, b_power)


@triton.jit
def ritz_coefficients(
    p_gram, tiles, WIDTH: tl.constexpr, RESTART: tl.constexpr, SQUARINGS: tl.constexpr, NEW: tl.constexpr
):
    """What makes the next Y, whose first vector is y, of M K: [4, 16]."""
    o_p, o_r = tl.arange(0, 4), tl.arange(0, 16)
    o_basis, o_image = tl.where(o_r <= WIDTH, o_r, o_r + WIDTH), products_lanes(WIDTH)
    b_gram = sum_grams(p_gram, o_basis, o_basis, tiles, 32, 16)
    # Programs round a small R0 differently, so that R1 is not quite its product: their inner products with others are
    # taken from the products of those, and an R0 that is nothing but rounding is left out.
    m_first = (o_r > WIDTH) & (o_r <= 2 * WIDTH)
    b_images = sum_grams(p_gram, o_image, o_basis, tiles, 32, 16)
    b_images = tl.where(m_first[:, None] & (m_first[None, :] == 0), tl.trans(b_images), b_images)
    b_length = diagonal(b_gram)
    b_before = tl.sum(tl.where(o_r[None, :] + WIDTH == o_r[:, None], b_length[None, :], 0.0), axis=1)
    m_sound = (m_first == 0) | (b_length > ROUNDING * b_before)
    b_t = orthonormal(tl.where(m_sound[:, None] & m_sound[None, :], b_gram, 0.0), NEW)
    b_projected = inner(inner(b_t, b_images), b_t)
    # Without 1, and without vectors that were left out. 1 is added, so that no eigenvalue is negative.
    on = (o_r > 0) & (diagonal(b_t) > 0)
    b_power = tl.where(on[:, None] & on[None, :], (b_projected + tl.trans(b_projected)) / 2, 0.0)
    b_power += tl.where(on[:, None] & (o_r[:, None] == o_r[None, :]), 1.0, 0.0)
    for _squaring in range(RESTART):
        b_power = squared(b_power)
    b_lower = inner(tl.where((o_p[:, None] + 1 == o_r[None, :]) & (o_p > 0)[:, None], 1.0, 0.0), b_power)
    for _squaring in range(RESTART, SQUARINGS):
        b_power = squared(b_power)
    b_ritz = row_of(b_power, tl.argmax(diagonal(b_power), axis=0))
    b_next = tl.where((o_p == 0)[:, None], b_ritz[None, :], tl.where((o_p < WIDTH)[:, None], b_lower, 0.0))
    return inner(combine(orthonormal(inner(b_next, b_next), 1e-6), b_next), tl.trans(b_t))


@triton.jit
def products_lanes(WIDTH: tl.constexpr):
    """The lanes of M K."""
    o_r = tl.arange(0, 16)
    return tl.where(o_r == 0, 0, tl.where(o_r <= WIDTH, o_r + WIDTH, o_r + 2 * WIDTH))


@triton.jit
def next_vectors(p_vectors, b_ritz, o_n, N, WIDTH: tl.constexpr):
    return combine(b_ritz, load_lanes(p_vectors, products_lanes(WIDTH), o_n, N, 7 * WIDTH + 1))


@triton.jit
def restart(p_vectors, b_ritz, N, WIDTH: tl.constexpr, BN: tl.constexpr):
    """The next Y."""
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        store_rows(p_vectors, next_vectors(p_vectors, b_ritz, o_n, N, WIDTH), o_n, N, WIDTH)


@triton.jit
def finish(
    p_vectors,
    p_degree,
    b_ritz,
    p_out,  # [WIDTH, N] fp32, y and the two others
    p_distraction,  # [N] bool, read where TARGET
    p_target,  # [N] bool
    N,
    stride_dn,
    TARGET: tl.constexpr,
    WIDTH: tl.constexpr,
    BN: tl.constexpr,
):
    """y, of length 1, its largest entry being positive, and the defocused tokens."""
    b_top, b_bottom = tl.zeros([BN], tl.float32), tl.zeros([BN], tl.float32)
    b_sum, b_length = tl.zeros([BN], tl.float32), tl.zeros([BN], tl.float32)
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        b_degree = tl.load(p_degree + o_n, mask=o_n < N, other=0.0)
        b_y = row_of(tl.where((b_degree > 0)[None, :], next_vectors(p_vectors, b_ritz, o_n, N, WIDTH), 0.0), 0)
        b_top, b_bottom = tl.maximum(b_top, b_y), tl.minimum(b_bottom, b_y)
        b_sum += b_y
        b_length += b_degree * b_y * b_y
    length = tl.sqrt(tl.sum(b_length, axis=0) / fp16_unit(N))
    scale = tl.where(length > 0, 1.0 / tl.where(length > 0, length, 1.0), 0.0)
    scale = tl.where(tl.max(b_top, axis=0) >= -tl.min(b_bottom, axis=0), scale, -scale)
    mean = scale * tl.sum(b_sum, axis=0) / N
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        b_degree = tl.load(p_degree + o_n, mask=o_n < N, other=0.0)
        b_next = next_vectors(p_vectors, b_ritz, o_n, N, WIDTH)
        b_next = scale * tl.where((b_degree > 0)[None, :], b_next, 0.0)
        store_rows(p_out, b_next, o_n, N, WIDTH)
        if TARGET:
            m_free = tl.load(p_distraction + o_n * stride_dn, mask=o_n < N, other=1) == 0
            tl.store(p_target + o_n, m_free & (row_of(b_next, 0) > mean), mask=o_n < N)


@triton.jit(do_not_specialize=["N", "stride_tb", "stride_tw", "stride_db"])
def cut_kernel(
    affinity_ptr,  # [B, N, SW] floating-point, W
    start_ptr,  # [B, GIVEN, N]
    distraction_ptr,  # [B, N] bool
    vectors_ptr,  # [B, 7 * WIDTH, N] fp32
    degree_ptr,  # [B, N] fp32
    gram_ptr,  # [B, tiles, 1088] fp32
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
    DEPTH: tl.constexpr,
    RESTART: tl.constexpr,
    SQUARINGS: tl.constexpr,
    NEW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WHOLE: tl.constexpr,  # at least N
):
    i_b, tiles = tl.program_id(0).to(tl.int64), tl.cdiv(N, BM)
    p_affinity, p_start = affinity_ptr + i_b * stride_ab, start_ptr + i_b * stride_tb
    p_vectors, p_degree = vectors_ptr + i_b * 7 * WIDTH * N, degree_ptr + i_b * N
    p_few = gram_ptr + i_b * tiles * 1088
    p_gram, p_out = p_few + tiles * 64, out_ptr + i_b * WIDTH * N
    p_distraction, p_target = distraction_ptr + i_b * stride_db, target_ptr + i_b * N
    p_order, o_n = order_ptr + i_b * (N + 1), tl.arange(0, WHOLE)
    rounds = ROUNDS
    if GIVEN > 0:
        b_given = tl.load(p_start + o_n * stride_tn, mask=o_n < N, other=0.0).to(tl.float32)
        rounds = tl.where(tl.max(tl.abs(b_given), axis=0) > 0, ROUNDS, COLD)
    if TARGET:
        m_taken = tl.load(p_distraction + o_n * stride_dn, mask=o_n < N, other=0) != 0
        rounds = tl.where(tl.max(m_taken.to(tl.int32), axis=0) > 0, rounds, 0)
        store_rows(p_out, tl.zeros([4, WHOLE], tl.float32), o_n, N, WIDTH)
        tl.store(p_target + o_n, m_taken & (o_n < 0), mask=o_n < N)
    for i in range(rounds):
        tl.debug_barrier()
        for i_m in range(tiles):
            first_product(
                p_affinity,
                p_start,
                p_vectors,
                p_degree,
                p_few,
                i_m,
                N,
                SW,
                stride_tw,
                stride_tn,
                i == 0,
                GIVEN,
                WIDTH,
                BM,
                BN,
            )
        tl.debug_barrier()
        b_part = remainder(p_few, tiles)
        for step in range(1, DEPTH):
            tl.debug_barrier()
            for i_m in range(tiles):
                next_product(
                    p_affinity,
                    p_vectors,
                    p_degree,
                    p_gram,
                    b_part,
                    i_m,
                    N,
                    SW,
                    step,
                    step == 1,
                    step == DEPTH - 1,
                    WIDTH,
                    BM,
                    BN,
                )
        tl.debug_barrier()
        b_ritz = ritz_coefficients(p_gram, tiles, WIDTH, RESTART, SQUARINGS, NEW)
        if i < rounds - 1:
            restart(p_vectors, b_ritz, N, WIDTH, BN)
        else:
            finish(p_vectors, p_degree, b_ritz, p_out, p_distraction, p_target, N, stride_dn, TARGET, WIDTH, BN)
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
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    tiles = tl.cdiv(N, BM)
    i_b, i_m = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    p_affinity, p_start = affinity_ptr + i_b * stride_ab, start_ptr + i_b * stride_tb
    p_vectors, p_degree = vectors_ptr + i_b * 7 * WIDTH * N, degree_ptr + i_b * N
    p_few = gram_ptr + i_b * tiles * 1088
    first_product(
        p_affinity, p_start, p_vectors, p_degree, p_few, i_m, N, SW, stride_tw, stride_tn, BEGINS, GIVEN, WIDTH, BM, BN
    )


@triton.jit(do_not_specialize=["N", "step"])
def cut_next_kernel(
    affinity_ptr,
    vectors_ptr,
    degree_ptr,
    gram_ptr,
    N,
    SW,
    stride_ab,
    step,  # 1 to DEPTH - 1
    SECOND: tl.constexpr,  # whether it is 1
    LAST: tl.constexpr,
    WIDTH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    tiles = tl.cdiv(N, BM)
    i_b, i_m = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    p_vectors, p_degree = vectors_ptr + i_b * 7 * WIDTH * N, degree_ptr + i_b * N
    p_few = gram_ptr + i_b * tiles * 1088
    p_affinity, p_gram = affinity_ptr + i_b * stride_ab, p_few + tiles * 64
    b_part = remainder(p_few, tiles) if SECOND else tl.zeros([4, 4], tl.float32)
    next_product(p_affinity, p_vectors, p_degree, p_gram, b_part, i_m, N, SW, step, SECOND, LAST, WIDTH, BM, BN)


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
    RESTART: tl.constexpr,
    SQUARINGS: tl.constexpr,
    NEW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    i_b, tiles = tl.program_id(0).to(tl.int64), tl.cdiv(N, BM)
    p_vectors, p_degree = vectors_ptr + i_b * 7 * WIDTH * N, degree_ptr + i_b * N
    p_distraction, p_target = distraction_ptr + i_b * stride_db, target_ptr + i_b * N
    p_gram = gram_ptr + i_b * tiles * 1088 + tiles * 64
    b_ritz = ritz_coefficients(p_gram, tiles, WIDTH, RESTART, SQUARINGS, NEW)
    if LAST:
        p_out = out_ptr + i_b * WIDTH * N
        finish(p_vectors, p_degree, b_ritz, p_out, p_distraction, p_target, N, stride_dn, TARGET, WIDTH, BN)
        if TARGET:
            tl.debug_barrier()
            order_patches(p_distraction, stride_dn, p_target, 1, order_ptr + i_b * (N + 1), N, BN)
    else:
        restart(p_vectors, b_ritz, N, WIDTH, BN)


def _cut(
    affinity: Tensor, start: Tensor | None, distraction: Tensor | None, cold: int, warm: int
) -> tuple[Tensor, Tensor, Tensor]:
    """y and two other vectors [B, 3, N]; the defocused tokens [B, N] and the patches in order, if there are masks."""
    B, N, _ = affinity.shape
    empty, tiles = partial(affinity.new_empty, dtype=torch.float32), triton.cdiv(N, BLOCK_ROWS)
    out, vectors, degree = empty((B, WIDTH, N)), empty((B, 7 * WIDTH, N)), empty((B, N))
    target, order = empty((B, N), dtype=torch.bool), empty((B, N + 1), dtype=torch.int32)
    state = {
        "vectors_ptr": vectors,
        "degree_ptr": degree,
        "gram_ptr": empty((B, tiles, 8 * 8 + 32 * 32)),
        "N": N,
        "WIDTH": WIDTH,
        "BM": BLOCK_ROWS,
        "BN": BLOCK_COLUMNS,
        "num_warps": 8,
    }
    matrix = {"affinity_ptr": affinity, "SW": affinity.stride(1), "stride_ab": affinity.stride(0)}
    given = 0 if start is None else start.shape[1]
    begun = out if start is None else start
    beginning = {"start_ptr": begun, "GIVEN": given, **strides("t", begun, "bwn")}
    rounds = cold if start is None else warm
    taken = target if distraction is None else distraction
    ended = {"distraction_ptr": taken, **strides("d", taken, "bn"), "out_ptr": out, "target_ptr": target}
    ended |= {"order_ptr": order, "TARGET": distraction is not None}
    ended |= {"RESTART": RESTART, "SQUARINGS": SQUARINGS, "NEW": NEW}
    rows = (B * tiles,)
    if N <= WHOLE:
        one = {"WHOLE": WHOLE, "BN": WHOLE_COLUMNS, "ROUNDS": rounds, "COLD": cold, "DEPTH": DEPTH}
        wrap_triton(cut_kernel)[(B,)](**state | one, **matrix, **beginning, **ended)
        return out, target, order
    for i in range(rounds):
        wrap_triton(cut_first_kernel)[rows](**state, **matrix, **beginning, BEGINS=i == 0)
        for step in range(1, DEPTH):
            places = {"step": step, "SECOND": step == 1, "LAST": step == DEPTH - 1}
            wrap_triton(cut_next_kernel)[rows](**state, **matrix, **places)
        wrap_triton(cut_round_kernel)[(B,)](**state, **ended, LAST=i == rounds - 1)
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
