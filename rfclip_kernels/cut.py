"""The graph cut that finds defocused tokens: equation 8 of the paper, and the threshold below it.

(Deg - W) y = lambda Deg y,  W = (S + S^T) / 2,  Deg = diag(W 1);  so y is the second eigenvector of M = Deg^-1 W, the
first being 1, and M is symmetric in the inner product <a, b> = a^T Deg b.

A round takes five vectors Y and makes y of the space that they and three products span:

    Z = M Y,  R0 = 256 (Z - Y theta),  R1 = M R0,  R2 = M R1,  theta the Rayleigh quotient of each vector;
    basis K = (1, Y, R0, R1), sixteen vectors, whose products with M are known: M K = (1, Y theta + R0 / 256, R1, R2)

Nothing is orthogonalized on the way: the inner products of all vectors are taken at once, and Cholesky's factor of
those of K makes it orthonormal, T K, without what is next to nothing new. In it M is a matrix [16, 16]. Squaring that
leaves its leading eigenvector, t, and y = t T M K, which is one product nearer than t T K. The next round starts from y
and from four more rows of a lower power. There are five rounds, or three from a vector near y. In a tower three are
enough for the first block, and one for every other, from the five vectors that the block before ended with.

W in fp16 is multiplied by tensor cores: a vector is the sum of two in fp16, the second 2^11 times too large, so that
their products add up to those of fp32. Vectors are multiplied by N, which makes their entries about 1.

Up to 256 patches one launch does it all, one program an image, and an image without distraction ends at once. Above,
every product is a launch, whose programs take some rows of W each, and so are the start, R0 and the end of a round.
Degrees come out of a round's first product, which multiplies 1 as well. Nothing waits for the host.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from rfclip_kernels import tiles as tables
from rfclip_kernels.attention import fp16_unit, order_patches, ordered_patches
from rfclip_kernels.defocus import launch_defocus_mask
from rfclip_kernels.launch import check_launch, on_device, strides, wrap_triton
from rfclip_kernels.similarity import empty_affinity

WIDTH = 5  # vectors that are multiplied at once
ROUNDS, FROM_START = 5, 3  # that resolve y, and those that a start leaves
TOWER_ROUNDS, TOWER_FROM_START = 3, 1  # that resolve the mask of the defocused tokens
RESTART = 3  # squarings of the projected matrix before the next round's start is taken from it
SQUARINGS = 12  # that its leading eigenvector takes
NEW = 1e-3  # the squared length of what a vector adds to the basis, over its own, is more than this
LIFT = tl.constexpr(256.0)  # R0 over what Z differs by: fp16 holds no small numbers
ROUNDING = tl.constexpr(1e-11)  # the squared length of Z - Y theta over that of Y, if it is more than rounding
SUMS, GRAM = tl.constexpr(2 * 8), tl.constexpr(32 * 32)  # what the programs of the first and the last product sum up
BLOCK_ROWS, BLOCK_COLUMNS = 32, 128  # of W in fp16 that a program multiplies at a time; in fp32 a quarter
BLOCK_VECTORS = 64  # patches whose vectors a program makes
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
def column_of(b_columns, i):
    """Column i of a tile."""
    o_c = tl.arange(0, b_columns.shape[1])
    return tl.sum(tl.where(o_c[None, :] == i, b_columns, 0.0), axis=1)


@triton.jit
def quotient(b_x, b_y):
    """b_x / b_y, or 0 where b_y is not positive."""
    return tl.where(b_y > 0, b_x / tl.where(b_y > 0, b_y, 1.0), 0.0)


@triton.jit
def orthonormal(b_gram, NEW: tl.constexpr, COUNT: tl.constexpr):
    """T with T gram T^T = 1 for the first COUNT vectors: Cholesky's factor, inverted. Vectors with nothing new give 0.

    They fade out between 2 NEW and NEW, so that what one thread rounds differently than another changes nothing much.
    """
    R: tl.constexpr = b_gram.shape[0]
    o_r, o_c = tl.arange(0, R), tl.arange(0, 2 * R)
    b_length = diagonal(b_gram)
    b_unit = quotient(1.0, tl.sqrt(b_length))
    b_one = tl.where(o_r[:, None] == o_r[None, :], 1.0, 0.0)
    # Both are eliminated at once: columns of gram alternate with those of T.
    b_both = tl.reshape(tl.join(b_gram * b_unit[:, None] * b_unit[None, :], b_one), [R, 2 * R])
    b_pivots = tl.sum(tl.where(o_c[None, :] == 2 * o_r[:, None], b_both, 0.0), axis=0)
    b_factor = tl.zeros([R], tl.float32)
    for i in range(COUNT):
        pivot = tl.sum(tl.where(o_c == 2 * i, b_pivots, 0.0), axis=0)
        over = tl.minimum(tl.maximum(pivot / NEW - 1.0, 0.0), 1.0) / tl.maximum(pivot, NEW)
        b_row, b_column = row_of(b_both, i), column_of(b_both, 2 * i)
        b_pivots -= over * b_row * b_row
        b_both -= tl.where(o_r > i, over * b_column, 0.0)[:, None] * b_row[None, :]
        b_factor = tl.where(o_r == i, tl.sqrt(over), b_factor)
    _gram, b_t = tl.split(tl.reshape(b_both, [R, R, 2]))
    return b_factor[:, None] * b_t * b_unit[None, :]


# Vectors lie in groups of eight columns: 1 or 0, WIDTH vectors, zeros. There are four, Y, R0, R1 and R2, whose columns
# alternate where all are taken at once: lane l is column l // 4.


@triton.jit
def lane_group(o_lane):
    return (o_lane % 4) // 2 + (o_lane % 2) * 2


@triton.jit
def load_group(p_vectors, group, o_n, N):
    """A group at some patches, [BM, 8]."""
    p_group = p_vectors + (group * N + o_n[:, None]) * 8 + tl.arange(0, 8)[None, :]
    return tl.load(p_group, mask=(o_n < N)[:, None], other=0.0)


@triton.jit
def store_group(p_vectors, group, b_x, o_n, N):
    tl.store(p_vectors + (group * N + o_n[:, None]) * 8 + tl.arange(0, 8)[None, :], b_x, mask=(o_n < N)[:, None])


@triton.jit
def load_lanes(p_vectors, o_n, N):
    """All groups at some patches, [BM, 32]."""
    o_lane = tl.arange(0, 32)
    p_lane = p_vectors + lane_group(o_lane)[None, :] * N * 8 + (o_lane // 4)[None, :]
    return tl.load(p_lane + o_n[:, None] * 8, mask=(o_n < N)[:, None], other=0.0)


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
    """Two tiles, side by side, that b_x [BM, C] is the sum of: [BM, 2 C]. The second is 2^11 times too large."""
    if dtype == tl.float32:
        b_high, b_low = b_x, 0.0 * b_x
    else:
        b_high = tl.minimum(tl.maximum(b_x, -65504.0), 65504.0).to(tl.float16)
        b_low = ((b_x - b_high.to(tl.float32)) * 2048.0).to(tl.float16)
    return tl.reshape(tl.join(b_high, b_low), [b_x.shape[0], 2 * b_x.shape[1]])


@triton.jit
def sum_halves(b_both):
    """What `halves` made, or was multiplied with, added up again: [BM, C]."""
    b_high, b_low = tl.split(tl.reshape(b_both, [b_both.shape[0], b_both.shape[1] // 2, 2]))
    return b_high + b_low / 2048.0


@triton.jit
def inner_products(b_lanes, b_degree, dtype: tl.constexpr):
    """Those of all lanes with all lanes, over the rows of a tile: [32, 32]."""
    b_weighted = b_lanes * b_degree[:, None]
    if dtype == tl.float32:
        b_gram = multiply(tl.trans(b_weighted), b_lanes)
    else:
        b_gram = sum_halves(tl.dot(tl.trans(halves(b_weighted, dtype)), halves(b_lanes, dtype)))
        b_gram = tl.trans(sum_halves(tl.trans(b_gram)))
    return b_gram


@triton.jit
def lanes_of_basis(p_theta, IMAGES: tl.constexpr, WIDTH: tl.constexpr):
    """What makes K of the lanes, or M K: [16, 32]."""
    o_r, o_lane = tl.arange(0, 16), tl.arange(0, 32)
    o_group, o_column = (o_r - 1) // WIDTH, tl.where(o_r > 0, (o_r - 1) % WIDTH + 1, 0)
    m_column = o_column[:, None] == (o_lane // 4)[None, :]
    m_own = m_column & (tl.where(o_r > 0, o_group, 0)[:, None] == lane_group(o_lane)[None, :])
    b_own = tl.where(m_own, 1.0, 0.0)
    if IMAGES:
        b_theta = tl.load(p_theta + o_column)
        b_own *= tl.where(o_r == 0, 1.0, tl.where(o_r <= WIDTH, b_theta, 0.0))[:, None]
        m_next = (
            m_column & ((o_r > 0) & (o_r <= 3 * WIDTH))[:, None] & (o_group[:, None] + 1 == lane_group(o_lane)[None, :])
        )
        b_own += tl.where(m_next, tl.where(o_r <= WIDTH, 1.0 / LIFT, 1.0)[:, None], 0.0)
    return b_own


@triton.jit
def squared(b_power, times: tl.constexpr):
    """A symmetric matrix squared up to four times, its largest entry having been made 1."""
    b_power = b_power / tl.maximum(tl.max(tl.max(tl.abs(b_power), axis=1), axis=0), 1e-30)
    for _squaring in tl.static_range(times):
        b_power = multiply(b_power, b_power)
    return b_power


@triton.jit
def ritz_coefficients(
    b_gram,  # [32, 32], of all lanes
    p_theta,
    WIDTH: tl.constexpr,
    RESTART: tl.constexpr,
    SQUARINGS: tl.constexpr,
    NEW: tl.constexpr,
):
    """What makes the next Y of the lanes, y in column 2, the others in 4 and so on: [32, 16]."""
    o_r = tl.arange(0, 16)
    b_basis, b_images = lanes_of_basis(p_theta, False, WIDTH), lanes_of_basis(p_theta, True, WIDTH)
    b_right = multiply(b_gram, tl.trans(b_basis))
    b_gram = multiply(b_basis, b_right)
    # An R0 that is nothing but rounding is left out.
    b_length = diagonal(b_gram)
    b_before = tl.sum(tl.where(o_r[None, :] + WIDTH == o_r[:, None], b_length[None, :], 0.0), axis=1)
    m_sound = (o_r <= WIDTH) | (o_r > 2 * WIDTH) | (b_length > ROUNDING * LIFT * LIFT * b_before)
    b_t = orthonormal(tl.where(m_sound[:, None] & m_sound[None, :], b_gram, 0.0), NEW, 16)
    b_projected = multiply(multiply(b_t, multiply(b_images, b_right)), tl.trans(b_t))
    # Without 1, and without vectors that were left out. 1 is added, so that no eigenvalue is negative.
    on = (o_r > 0) & (diagonal(b_t) > 0)
    b_power = tl.where(on[:, None] & on[None, :], (b_projected + tl.trans(b_projected)) / 2, 0.0)
    b_power += tl.where(on[:, None] & (o_r[:, None] == o_r[None, :]), 1.0, 0.0)
    b_power = squared(b_power, RESTART)
    b_lower = b_power
    for _four in tl.static_range((SQUARINGS - RESTART) // 4):
        b_power = squared(b_power, 4)
    b_power = squared(b_power, (SQUARINGS - RESTART) % 4)
    b_ritz = row_of(b_power, tl.argmax(diagonal(b_power), axis=0))
    # y, and what is left of the other vectors of Y.
    b_next = tl.where((o_r == 1)[:, None], b_ritz[None, :], b_lower)
    b_next = tl.where(((o_r > 0) & (o_r <= WIDTH))[:, None], b_next, 0.0)
    b_own = orthonormal(multiply(b_next, tl.trans(b_next)), 1e-6, WIDTH + 1)
    b_apart = tl.where(o_r[:, None] == 2 * o_r[None, :], 1.0, 0.0)
    return tl.trans(multiply(multiply(multiply(multiply(b_apart, b_own), b_next), b_t), b_images))


@triton.jit
def tail(b_y, b_degree, m_n, N):
    """What y is multiplied with to be of length 1 and positive at its largest entry, and its mean then."""
    length = tl.sqrt(tl.sum(b_degree * b_y * b_y, axis=0) / fp16_unit(N))
    scale = quotient(1.0, length)
    top, bottom = tl.max(tl.where(m_n, b_y, 0.0), axis=0), tl.min(tl.where(m_n, b_y, 0.0), axis=0)
    scale = tl.where(top >= -bottom, scale, -scale)
    return scale, scale * tl.sum(b_y, axis=0) / N


@triton.jit(do_not_specialize=["N", "stride_tb", "stride_tw", "stride_db"])
def cut_kernel(
    affinity_ptr,  # [B, N, SW] fp16, W
    start_ptr,  # [B, GIVEN, N]
    distraction_ptr,  # [B, N] bool
    theta_ptr,  # [B, 8] fp32
    out_ptr,  # [B, WIDTH, N] fp32, y and the others
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
    ROUNDS: tl.constexpr,
    COLD: tl.constexpr,  # rounds of an image whose start is zero
    WIDTH: tl.constexpr,
    RESTART: tl.constexpr,
    SQUARINGS: tl.constexpr,
    NEW: tl.constexpr,
    WHOLE: tl.constexpr,  # at least N
):
    i_b, o_n, o_p = tl.program_id(0).to(tl.int64), tl.arange(0, WHOLE), tl.arange(0, 8)
    m_n, m_p = o_n < N, (o_p > 0) & (o_p <= WIDTH)
    p_theta, p_out, p_target = theta_ptr + i_b * 8, out_ptr + i_b * WIDTH * N, target_ptr + i_b * N
    p_distraction = distraction_ptr + i_b * stride_db
    m_taken = tl.load(p_distraction + o_n * stride_dn, mask=m_n, other=0) != 0
    b_y = start_group(start_ptr + i_b * stride_tb, stride_tw, stride_tn, o_n, N, GIVEN, WIDTH)
    rounds = ROUNDS
    if GIVEN > 0:
        rounds = tl.where(tl.max(tl.max(tl.where(m_p[None, :], tl.abs(b_y), 0.0), axis=1), axis=0) > 1e-5, ROUNDS, COLD)
    rounds = tl.where(tl.max(m_taken.to(tl.int32), axis=0) > 0, rounds, 0)
    p_affinity = affinity_ptr + i_b * stride_ab + o_n[:, None] * SW + o_n[None, :]
    m_read = o_n < tl.where(rounds > 0, N, 0)
    b_affinity = tl.load(p_affinity, mask=m_read[:, None] & m_read[None, :], other=0.0)
    b_x, b_r0, b_r1, b_degree = b_y, b_y, b_y, tl.zeros([WHOLE], tl.float32)
    for i in range(3 * rounds):
        b_z = sum_halves(tl.dot(b_affinity, halves(b_x, affinity_ptr.dtype.element_ty)))
        if i % 3 == 0:
            b_degree = column_of(b_z, 0)
        b_z = tl.where(m_p[None, :], quotient(b_z, b_degree[:, None]), 0.0)
        if i % 3 == 0:
            b_weighted = b_y * b_degree[:, None]
            b_theta = quotient(tl.sum(b_weighted * b_z, axis=0), tl.sum(b_weighted * b_y, axis=0))
            tl.store(p_theta + o_p, b_theta)
            b_r0 = LIFT * (b_z - b_theta[None, :] * tl.where(m_p[None, :], b_y, 0.0))
            b_x = b_r0
        elif i % 3 == 1:
            b_r1 = b_z
            b_x = b_r1
        else:
            tl.debug_barrier()
            b_lanes = tl.reshape(tl.join(tl.join(b_y, b_r0), tl.join(b_r1, b_z)), [WHOLE, 32])
            b_gram = inner_products(b_lanes, b_degree / N, affinity_ptr.dtype.element_ty)
            b_ritz = ritz_coefficients(b_gram, p_theta, WIDTH, RESTART, SQUARINGS, NEW)
            b_first, b_last = tl.split(tl.permute(tl.reshape(b_ritz, [16, 2, 16]), (0, 2, 1)))
            b_next = multiply(tl.reshape(tl.join(b_y, b_r0), [WHOLE, 16]), b_first)
            b_next += multiply(tl.reshape(tl.join(b_r1, b_z), [WHOLE, 16]), b_last)
            b_next, _empty = tl.split(tl.reshape(b_next, [WHOLE, 8, 2]))
            b_y = tl.where((o_p == 0)[None, :] & m_n[:, None], 1.0, b_next)
            b_x = b_y
    b_y = tl.where(m_p[None, :] & (b_degree > 0)[:, None], b_y, 0.0)
    scale, mean = tail(column_of(b_y, 1), b_degree, m_n, N)
    b_y *= scale
    tl.store(p_out + (o_p - 1)[None, :] * N + o_n[:, None], b_y, mask=m_p[None, :] & m_n[:, None])
    tl.store(p_target + o_n, (m_taken == 0) & (column_of(b_y, 1) > mean), mask=m_n)
    tl.debug_barrier()
    order_patches(p_distraction, stride_dn, p_target, 1, order_ptr + i_b * (N + 1), N, WHOLE)


@triton.jit
def sum_tiles(p_tiles, tiles, BT: tl.constexpr, SIZE: tl.constexpr):
    """What the programs of a product have summed up over their rows, over all rows: [SIZE]."""
    o_s = tl.arange(0, SIZE)
    b_sum = tl.zeros([BT, SIZE], tl.float32)
    for first in range(0, tiles, BT):
        o_t = first + tl.arange(0, BT)
        b_sum += tl.load(p_tiles + o_t[:, None] * SIZE + o_s[None, :], mask=(o_t < tiles)[:, None], other=0.0)
    return tl.sum(b_sum, axis=0)


@triton.jit
def store_halves(p_halves, b_x, o_n, N):
    p_both = p_halves + o_n[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(p_both, halves(b_x, p_halves.dtype.element_ty), mask=(o_n < N)[:, None])


@triton.jit
def row_products(p_affinity, p_halves, o_m, N, SW, BN: tl.constexpr):
    """The rows o_m of W times a group, [BM, 8]."""
    b_out = tl.zeros([o_m.shape[0], 16], tl.float32)
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        mask = (o_m < N)[:, None] & (o_n < N)[None, :]
        b_affinity = tl.load(p_affinity + o_m[:, None] * SW + o_n[None, :], mask=mask, other=0.0)
        p_both = p_halves + o_n[:, None] * 16 + tl.arange(0, 16)[None, :]
        b_x = tl.load(p_both, mask=(o_n < N)[:, None], other=0.0)
        b_out = tl.dot(b_affinity, b_x, b_out, input_precision="ieee")
    return sum_halves(b_out)


@triton.jit(do_not_specialize=["N", "stride_tb", "stride_tw"])
def cut_start_kernel(
    start_ptr,  # [B, GIVEN, N]
    vectors_ptr,  # [B, 4, N, 8] fp32
    halves_ptr,  # [B, 2, N, 16], of W's dtype: those of the vectors that the next product, or the one after it, takes
    N,
    stride_tb,
    stride_tw,
    stride_tn,
    GIVEN: tl.constexpr,
    WIDTH: tl.constexpr,
    BV: tl.constexpr,
):
    """Some patches of 1 and the first Y."""
    blocks = tl.cdiv(N, BV)
    i_b, o_n = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BV + tl.arange(0, BV)
    b_y = start_group(start_ptr + i_b * stride_tb, stride_tw, stride_tn, o_n, N, GIVEN, WIDTH)
    store_group(vectors_ptr + i_b * 4 * N * 8, 0, b_y, o_n, N)
    store_halves(halves_ptr + i_b * 2 * N * 16, b_y, o_n, N)


@triton.jit(do_not_specialize=["N"])
def cut_first_kernel(
    affinity_ptr,  # [B, N, SW] fp16 or fp32, W
    vectors_ptr,
    halves_ptr,
    degree_ptr,  # [B, N] fp32
    sums_ptr,  # [B, tiles, SUMS] fp32
    N,
    SW,
    stride_ab,
    WIDTH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Some rows of Deg and Z, and what theta is made of."""
    tiles, o_p = tl.cdiv(N, BM), tl.arange(0, 8)
    i_b, i_m = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    p_vectors, o_m = vectors_ptr + i_b * 4 * N * 8, i_m * BM + tl.arange(0, BM)
    b_z = row_products(affinity_ptr + i_b * stride_ab, halves_ptr + i_b * 2 * N * 16, o_m, N, SW, BN)
    b_degree = column_of(b_z, 0)
    b_z = tl.where(((o_p > 0) & (o_p <= WIDTH))[None, :], quotient(b_z, b_degree[:, None]), 0.0)
    tl.store(degree_ptr + i_b * N + o_m, b_degree, mask=o_m < N)
    store_group(p_vectors, 1, b_z, o_m, N)
    b_y = load_group(p_vectors, 0, o_m, N)
    b_weighted = b_y * b_degree[:, None]
    p_sums = sums_ptr + (i_b * tiles + i_m) * SUMS + 2 * o_p
    tl.store(p_sums, tl.sum(b_weighted * b_z, axis=0))
    tl.store(p_sums + 1, tl.sum(b_weighted * b_y, axis=0))


@triton.jit(do_not_specialize=["N"])
def cut_residual_kernel(
    vectors_ptr,
    halves_ptr,
    sums_ptr,
    theta_ptr,  # [B, 8] fp32
    N,
    BM: tl.constexpr,
    BV: tl.constexpr,
):
    """Some patches of R0, in place of Z, and theta."""
    tiles, blocks, o_p = tl.cdiv(N, BM), tl.cdiv(N, BV), tl.arange(0, 8)
    i_b, o_n = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BV + tl.arange(0, BV)
    p_vectors = vectors_ptr + i_b * 4 * N * 8
    b_sums = sum_tiles(sums_ptr + i_b * tiles * SUMS, tiles, 64, SUMS)
    b_products, b_lengths = tl.split(tl.reshape(b_sums, [8, 2]))
    b_theta = quotient(b_products, b_lengths)
    if tl.program_id(0) % blocks == 0:
        tl.store(theta_ptr + i_b * 8 + o_p, b_theta)
    b_y = tl.where((o_p > 0)[None, :], load_group(p_vectors, 0, o_n, N), 0.0)
    b_r0 = LIFT * (load_group(p_vectors, 1, o_n, N) - b_theta[None, :] * b_y)
    store_group(p_vectors, 1, b_r0, o_n, N)
    store_halves(halves_ptr + (i_b * 2 + 1) * N * 16, b_r0, o_n, N)


@triton.jit(do_not_specialize=["N"])
def cut_next_kernel(
    affinity_ptr,
    vectors_ptr,
    halves_ptr,
    degree_ptr,
    gram_ptr,  # [B, tiles, GRAM] fp32
    N,
    SW,
    stride_ab,
    LAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Some rows of R1, or of R2, and all inner products over them."""
    tiles = tl.cdiv(N, BM)
    i_b, i_m = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    p_vectors, o_m = vectors_ptr + i_b * 4 * N * 8, i_m * BM + tl.arange(0, BM)
    p_new, p_old = halves_ptr + i_b * 2 * N * 16, halves_ptr + (i_b * 2 + 1) * N * 16
    b_degree = tl.load(degree_ptr + i_b * N + o_m, mask=o_m < N, other=0.0)
    b_x = row_products(affinity_ptr + i_b * stride_ab, p_new if LAST else p_old, o_m, N, SW, BN)
    b_x = quotient(b_x, b_degree[:, None])
    store_group(p_vectors, 3 if LAST else 2, b_x, o_m, N)
    if LAST:
        tl.debug_barrier()
        o_lane = tl.arange(0, 32)
        p_gram = gram_ptr + (i_b * tiles + i_m) * GRAM + o_lane[:, None] * 32 + o_lane[None, :]
        b_lanes = load_lanes(p_vectors, o_m, N)
        tl.store(p_gram, inner_products(b_lanes, b_degree / N, tl.float32))
    else:
        store_halves(p_new, b_x, o_m, N)


@triton.jit(do_not_specialize=["N", "stride_db"])
def cut_round_kernel(
    distraction_ptr,  # [B, N] bool, read where TARGET
    vectors_ptr,
    halves_ptr,
    degree_ptr,
    gram_ptr,
    theta_ptr,
    out_ptr,  # [B, WIDTH, N] fp32, y and the others
    target_ptr,  # [B, N] bool
    order_ptr,  # [B, N + 1] int32
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
    BV: tl.constexpr,
    BP: tl.constexpr,
):
    """The end of a round: the next Y, or y and the defocused tokens."""
    i_b, tiles, o_p = tl.program_id(0).to(tl.int64), tl.cdiv(N, BM), tl.arange(0, 8)
    p_vectors, p_halves, p_degree = vectors_ptr + i_b * 4 * N * 8, halves_ptr + i_b * 2 * N * 16, degree_ptr + i_b * N
    p_out, m_p = out_ptr + i_b * WIDTH * N, (o_p > 0) & (o_p <= WIDTH)
    b_gram = tl.reshape(sum_tiles(gram_ptr + i_b * tiles * GRAM, tiles, 16, GRAM), [32, 32])
    b_ritz = ritz_coefficients(b_gram, theta_ptr + i_b * 8, WIDTH, RESTART, SQUARINGS, NEW)
    b_top, b_bottom = tl.zeros([BV], tl.float32), tl.zeros([BV], tl.float32)
    b_sum, b_length = tl.zeros([BV], tl.float32), tl.zeros([BV], tl.float32)
    for start in range(0, N, BV):
        o_n = start + tl.arange(0, BV)
        b_degree = tl.load(p_degree + o_n, mask=o_n < N, other=0.0)
        b_next, _empty = tl.split(tl.reshape(multiply(load_lanes(p_vectors, o_n, N), b_ritz), [BV, 8, 2]))
        if LAST:
            b_next = tl.where((b_degree > 0)[:, None], b_next, 0.0)
            p_next = p_out + (o_p - 1)[None, :] * N + o_n[:, None]
            tl.store(p_next, b_next, mask=m_p[None, :] & (o_n < N)[:, None])
            b_y = column_of(b_next, 1)
            b_top, b_bottom = tl.maximum(b_top, b_y), tl.minimum(b_bottom, b_y)
            b_sum += b_y
            b_length += b_degree * b_y * b_y
        else:
            b_next = tl.where((o_p == 0)[None, :] & (o_n < N)[:, None], 1.0, b_next)
            store_group(p_vectors, 0, b_next, o_n, N)
            store_halves(p_halves, b_next, o_n, N)
    if LAST:
        p_distraction, p_target = distraction_ptr + i_b * stride_db, target_ptr + i_b * N
        scale = quotient(1.0, tl.sqrt(tl.sum(b_length, axis=0) / fp16_unit(N)))
        scale = tl.where(tl.max(b_top, axis=0) >= -tl.min(b_bottom, axis=0), scale, -scale)
        mean = scale * tl.sum(b_sum, axis=0) / N
        tl.debug_barrier()
        for start in range(0, N, BP):
            o_n = start + tl.arange(0, BP)
            p_next, mask = p_out + (o_p - 1)[:, None] * N + o_n[None, :], m_p[:, None] & (o_n < N)[None, :]
            b_next = scale * tl.load(p_next, mask=mask, other=0.0)
            tl.store(p_next, b_next, mask=mask)
            if TARGET:
                m_free = tl.load(p_distraction + o_n * stride_dn, mask=o_n < N, other=1) == 0
                tl.store(p_target + o_n, m_free & (row_of(b_next, 1) > mean), mask=o_n < N)
        if TARGET:
            tl.debug_barrier()
            order_patches(p_distraction, stride_dn, p_target, 1, order_ptr + i_b * (N + 1), N, BP)


def whole(affinity: Tensor) -> int:
    """The most patches that one program takes, which keeps all of W in its shared memory."""
    if affinity.dtype == torch.float32:
        return 0
    return 256 if tables.architecture(affinity.device) in ("sm_80", "sm_90", "sm_100") else 128


def _cut(
    affinity: Tensor, start: Tensor | None, distraction: Tensor | None, cold: int, warm: int
) -> tuple[Tensor, Tensor, Tensor]:
    """y and four other vectors [B, 5, N]; the defocused tokens [B, N] and the patches in order, if there are masks."""
    B, N, _ = affinity.shape
    empty = partial(affinity.new_empty, dtype=torch.float32)
    out, theta = empty((B, WIDTH, N)), empty((B, 8))
    target, order = empty((B, N), dtype=torch.bool), empty((B, N + 1), dtype=torch.int32)
    matrix = {"affinity_ptr": affinity, "SW": affinity.stride(1), "stride_ab": affinity.stride(0)}
    begun = out if start is None else start
    beginning = {"start_ptr": begun, **strides("t", begun, "bwn"), "GIVEN": 0 if start is None else start.shape[1]}
    rounds = cold if start is None else warm
    taken = target if distraction is None else distraction
    ended = {"distraction_ptr": taken, **strides("d", taken, "bn"), "theta_ptr": theta}
    ended |= {"out_ptr": out, "target_ptr": target, "order_ptr": order}
    ended |= {"WIDTH": WIDTH, "RESTART": RESTART, "SQUARINGS": SQUARINGS, "NEW": NEW}
    if distraction is not None and whole(affinity) >= N:
        one = {"N": N, "ROUNDS": rounds, "COLD": cold, "WHOLE": max(64, triton.next_power_of_2(N))}
        wrap_triton(cut_kernel)[(B,)](**matrix, **beginning, **ended, **one, num_warps=8)
        return out, target, order
    tiles, blocks = triton.cdiv(N, BLOCK_ROWS), (B * triton.cdiv(N, BLOCK_VECTORS),)
    vectors = {"N": N, "vectors_ptr": empty((B, 4, N, 8)), "halves_ptr": affinity.new_empty((B, 2, N, 16))}
    products = matrix | vectors | {"degree_ptr": empty((B, N)), "BM": BLOCK_ROWS, "num_warps": 4}
    products["BN"] = BLOCK_COLUMNS if affinity.dtype != torch.float32 else BLOCK_COLUMNS // 4
    sums, gram = empty((B, tiles, SUMS.value)), empty((B, tiles, GRAM.value))
    some = {"BV": BLOCK_VECTORS, "num_warps": 4}
    wrap_triton(cut_start_kernel)[blocks](**beginning, **vectors, WIDTH=WIDTH, **some)
    for i in range(rounds):
        wrap_triton(cut_first_kernel)[(B * tiles,)](**products, sums_ptr=sums, WIDTH=WIDTH)
        wrap_triton(cut_residual_kernel)[blocks](**vectors, sums_ptr=sums, theta_ptr=theta, BM=BLOCK_ROWS, **some)
        for last in (False, True):
            wrap_triton(cut_next_kernel)[(B * tiles,)](**products, gram_ptr=gram, LAST=last)
        wrap_triton(cut_round_kernel)[(B,)](
            **vectors,
            **ended,
            degree_ptr=products["degree_ptr"],
            gram_ptr=gram,
            LAST=i == rounds - 1,
            TARGET=distraction is not None,
            BM=BLOCK_ROWS,
            BV=256,
            BP=1024,
            num_warps=8,
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
