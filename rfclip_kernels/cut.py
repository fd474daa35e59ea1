"""The graph cut that finds defocused tokens: equation 8 of the paper, and the threshold below it.

(Deg - W) y = lambda Deg y,  W = (S + S^T) / 2,  Deg = diag(W 1);  so y is the second eigenvector of M = Deg^-1 W, the
first being 1, and M is symmetric in the inner product <a, b> = a^T Deg b.

A round takes seven vectors Y, orthogonal to 1, and filters them by a Chebyshev polynomial, which leaves the least of
eigenvalues from -b/3 to b (hardly any is less, as softmax has exponentials of inner products), and makes y of the rest:

    Y_0 = Y,  Y_1 = (a M Y_0 - Y_0) / 2,  Y_i+1 = a M Y_i - Y_i - Y_i-1,  a = 3 / b
    P = Y_d,  Q = M P;  K = (1, P),  M K = (1, Q)

b is the smallest of Y's Rayleigh quotients, but not less than a fifth of the largest, and Y_i is multiplied by c^i,
1 / c = a max(b, largest) - 1, so that what is left keeps its size. Cholesky's factor of the inner products of K makes K
orthonormal, T K, without what is next to nothing new. In it M is a matrix [8, 8]. Squaring that leaves its leading
eigenvector, t, and y = t T M K, which is one product nearer than t T K. The next round starts from y and the other six
rows of T M K. Rounds are given by their degrees, d. In a tower the first block takes three, every other one, from the
seven vectors of the block before.

W in fp16 is multiplied by tensor cores: a vector is the sum of two in fp16, the second 2^11 times too large, so that
their products add up to those of fp32.

Up to 256 patches (or 128, see `whole`) one launch does it all, one program an image, which reads W once, and an image
without distraction ends at once. Above, every product is a launch, whose programs take some rows of W each, and so are
the start and the end of a round. Deg comes out of a round's first product, which multiplies 1 as well. Nothing waits
for the host.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cut_constants as constants
from . import tiles as tables
from .attention import fp16_unit, order_patches, ordered_patches, product, store_order
from .defocus import launch_defocus_mask
from .launch import check_launch, on_device, operator, strides, wrap_triton
from .similarity import empty_affinity

WIDTH = 7  # vectors that are multiplied at once; with 1, eight
FROM_START, TOWER_FROM_START = (3, 3, 3), (3,)  # rounds that resolve y, and the mask of the defocused tokens
FEW, DEGREES_OF_MANY = 256, (2, 5, 5)  # above so many patches, where each product reads W again
SHARE, LEAST, FIRST = map(tl.constexpr, (constants.SHARE, constants.LEAST, constants.FIRST))
SUMS, GRAM = tl.constexpr(4 * 8), tl.constexpr(16 * 16)  # what the programs of the first and the last product sum up
BLOCK_ROWS, BLOCK_COLUMNS = 32, 128  # of W in fp16 that a program multiplies at a time; in fp32 a quarter
BLOCK_VECTORS, BLOCK_ENDS = 64, 512  # patches whose start a program makes, and whose next vectors at a round's end
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
def orthonormal(b_gram, NEW: tl.constexpr):
    """T with T gram T^T = 1: Cholesky's factor, inverted. Vectors with nothing new give 0.

    They fade out between 2 NEW and NEW, so that what one thread rounds differently than another changes nothing much.
    Every other row and column of gram is 0, and of T.
    """
    R: tl.constexpr = b_gram.shape[0]
    o_r, o_c = tl.arange(0, R), tl.arange(0, 2 * R)
    b_unit = quotient(1.0, tl.sqrt(diagonal(b_gram)))
    b_one = tl.where(o_r[:, None] == o_r[None, :], 1.0, 0.0)
    # Both are eliminated at once: columns of gram alternate with those of T.
    b_both = tl.reshape(tl.join(b_gram * b_unit[:, None] * b_unit[None, :], b_one), [R, 2 * R])
    b_pivots = tl.sum(tl.where(o_c[None, :] == 2 * o_r[:, None], b_both, 0.0), axis=0)
    b_factor = tl.zeros([R], tl.float32)
    for i in range(0, R, 2):
        pivot = tl.sum(tl.where(o_c == 2 * i, b_pivots, 0.0), axis=0)
        over = tl.minimum(tl.maximum(pivot * (1.0 / NEW) - 1.0, 0.0), 1.0) / tl.maximum(pivot, NEW)
        b_row, b_column = row_of(b_both, i), column_of(b_both, 2 * i)
        b_pivots -= over * b_row * b_row
        b_both -= tl.where(o_r > i, over * b_column, 0.0)[:, None] * b_row[None, :]
        b_factor = tl.where(o_r == i, tl.sqrt(over), b_factor)
    _gram, b_t = tl.split(tl.reshape(b_both, [R, R, 2]))
    return b_factor[:, None] * b_t * b_unit[None, :]


# Vectors lie in groups of eight columns, 1 and WIDTH vectors: Y and Z, and then P and Q in their place. Columns of both
# alternate where both are taken at once: lane l is column l // 2 of group l % 2.


@triton.jit
def load_group(p_vectors, group, o_n, N):
    """A group at some patches, [BM, 8]."""
    p_group = p_vectors + (group * N + o_n[:, None]) * 8 + tl.arange(0, 8)[None, :]
    return tl.load(p_group, mask=(o_n < N)[:, None], other=0.0)


@triton.jit
def store_group(p_vectors, group, b_x, o_n, N):
    tl.store(p_vectors + (group * N + o_n[:, None]) * 8 + tl.arange(0, 8)[None, :], b_x, mask=(o_n < N)[:, None])


@triton.jit
def both_groups(b_left, b_right):
    return tl.reshape(tl.join(b_left, b_right), [b_left.shape[0], 16])


@triton.jit
def with_one(b_x, m_n):
    """1 in place of a group's first column."""
    return tl.where((tl.arange(0, 8) == 0)[None, :] & m_n[:, None], 1.0, b_x)


@triton.jit
def start_group(p_start, stride_tw, stride_tn, o_n, N, GIVEN: tl.constexpr):
    """1 and the first Y, [BM, 8]: what is given, and vectors that no eigenvector is orthogonal to."""
    o_p = tl.arange(0, 8)
    # What follows the point in multiples of roots of primes, as integers: every program finds the same bits.
    b_root = tl.where(o_p == 1, 0x3C6EF372, tl.where(o_p == 2, 0x6A09E667, tl.where(o_p == 3, 0xBB67AE85, 0xA54FF53A)))
    b_root = tl.where(o_p == 5, 0x510E527F, tl.where(o_p == 6, 0x9B05688C, tl.where(o_p == 7, 0x1F83D9AB, b_root)))
    b_turn = (o_n + 1).to(tl.uint32)[:, None] * b_root.to(tl.uint32)[None, :]
    b_y = (b_turn >> 8).to(tl.float32) * (1 / (1 << 24)) - 0.5
    if GIVEN > 0:
        m_given = (o_p > 0) & (o_p <= GIVEN)
        p_given = p_start + (o_p - 1)[None, :] * stride_tw + o_n[:, None] * stride_tn
        b_given = tl.load(p_given, mask=m_given[None, :] & (o_n < N)[:, None], other=0.0).to(tl.float32)
        b_given = b_given * tl.sqrt(N.to(tl.float32)) + 1e-5 * b_y  # of a start of zeros, this is left
        b_y = tl.where(m_given[None, :], b_given, b_y)
    return with_one(tl.where((o_n < N)[:, None], b_y, 0.0), o_n < N)


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
def moments(b_y, b_z, b_degree):
    """The inner products of Y with Z, with itself and with 1, over some rows: [8] each, the first of 1."""
    b_weighted = product(b_y, b_degree[:, None])
    b_products, b_lengths = product(b_weighted, b_z), product(b_weighted, b_y)
    return tl.sum(b_products, axis=0), tl.sum(b_lengths, axis=0), tl.sum(b_weighted, axis=0)


@triton.jit
def bounds(b_products, b_lengths, b_sums, unknown):
    """The means of Y [8], a, and c. Where nothing is known of M yet, its second eigenvalue is at most 1."""
    o_p = tl.arange(0, 8)
    total = tl.sum(tl.where(o_p == 0, b_sums, 0.0), axis=0)
    b_mean = quotient(b_sums, total)
    b_products, b_lengths = b_products - b_sums * b_mean, b_lengths - b_sums * b_mean
    b_quotient = quotient(b_products, b_lengths)
    smallest = tl.min(tl.where((o_p > 0) & (b_lengths > 0), b_quotient, 1.0), axis=0)
    largest = tl.max(tl.where(o_p > 0, b_quotient, 0.0), axis=0)
    bound = tl.maximum(tl.maximum(smallest, SHARE * largest), tl.where(unknown, FIRST, LEAST))
    over = 3.0 / bound
    return b_mean, over, 1.0 / (over * tl.maximum(tl.where(unknown, 1.0, largest), bound) - 1.0)


@triton.jit
def next_term(b_product, b_x, b_before, over, unit):
    """c^(i+1) Y_i+1 of M c^i Y_i, c^i Y_i and c^(i-1) Y_i-1."""
    return unit * (over * b_product - b_x - unit * b_before)


@triton.jit
def inner_products(b_lanes, b_degree, dtype: tl.constexpr):
    """Those of all lanes with all lanes, over the rows of a tile: [16, 16]."""
    b_lanes *= tl.sqrt(tl.maximum(b_degree, 0.0))[:, None]  # what `quotient` leaves out, too
    if dtype == tl.float32:
        b_gram = multiply(tl.trans(b_lanes), b_lanes)
    else:
        b_halves = halves(b_lanes, dtype)
        b_gram = sum_halves(tl.dot(tl.trans(b_halves), b_halves))
        b_gram = tl.trans(sum_halves(tl.trans(b_gram)))
    return b_gram


@triton.jit
def ritz_coefficients(b_gram, SQUARINGS: tl.constexpr, NEW: tl.constexpr):
    """What makes the next Y of the lanes, in every other column, y in column 2: [16, 16]."""
    o_r = tl.arange(0, 16)
    m_even = o_r % 2 == 0
    m_both = m_even[:, None] & m_even[None, :]
    b_shift = tl.where(m_even[:, None] & (o_r[:, None] + 1 == o_r[None, :]), 1.0, 0.0)  # from P to Q
    b_t = orthonormal(tl.where(m_both, b_gram, 0.0), NEW)
    b_projected = multiply(multiply(b_t, tl.where(m_both, multiply(b_shift, b_gram), 0.0)), tl.trans(b_t))
    # Without 1, and without vectors that were left out. 1 is added, so that no eigenvalue is negative.
    on = (o_r > 0) & (diagonal(b_t) > 0)
    b_power = tl.where(on[:, None] & on[None, :], (b_projected + tl.trans(b_projected)) / 2, 0.0)
    b_power += tl.where(on[:, None] & (o_r[:, None] == o_r[None, :]), 1.0, 0.0)
    for _four in tl.static_range(SQUARINGS // 4):
        b_power = b_power / tl.maximum(tl.max(tl.max(tl.abs(b_power), axis=1), axis=0), 1e-30)
        for _squaring in tl.static_range(4):
            b_power = multiply(b_power, b_power)
    b_ritz = row_of(b_power, tl.argmax(diagonal(b_power), axis=0))
    b_ritz = b_ritz / tl.maximum(tl.max(tl.abs(b_ritz), axis=0), 1e-30)
    b_next = tl.where((o_r > 2)[:, None] & (o_r[:, None] == o_r[None, :]), 1.0, 0.0)
    b_next = tl.where((o_r == 2)[:, None], b_ritz[None, :], b_next)
    return tl.trans(multiply(multiply(b_next, b_t), b_shift))


@triton.jit
def next_group(b_lanes, b_ritz, N):
    """The next Y, [BM, 8], with entries of about 1, after a column of zeros."""
    b_next, _empty = tl.split(tl.reshape(multiply(b_lanes, b_ritz), [b_lanes.shape[0], 8, 2]))
    return b_next * tl.sqrt(N.to(tl.float32))


@triton.jit
def scale_of(b_top, b_bottom, length, N):
    """What makes y of length 1, and positive at its largest entry."""
    scale = quotient(1.0, tl.sqrt(length / fp16_unit(N)))
    return tl.where(tl.max(b_top, axis=0) >= -tl.min(b_bottom, axis=0), scale, -scale)


@triton.jit(do_not_specialize=["N", "stride_tb", "stride_tw", "stride_db"])
def cut_kernel(
    affinity_ptr,  # [B, N, SW] fp16, W
    start_ptr,  # [B, GIVEN, N]
    distraction_ptr,  # [B, N] bool
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
    PADDED: tl.constexpr,  # whether W's rows go on to a multiple of 16
    GIVEN: tl.constexpr,
    WARM: tl.constexpr,  # the degree of the only round of an image with a start
    ROUNDS: tl.constexpr,  # those of an image whose start is zero,
    FIRST_DEGREE: tl.constexpr,  # the degree of the first of them,
    DEGREE: tl.constexpr,  # and of the others
    WIDTH: tl.constexpr,
    SQUARINGS: tl.constexpr,
    NEW: tl.constexpr,
    WHOLE: tl.constexpr,  # at least N
):
    i_b, o_n, o_p = tl.program_id(0).to(tl.int64), tl.arange(0, WHOLE), tl.arange(0, 8)
    dtype: tl.constexpr = affinity_ptr.dtype.element_ty
    m_n = o_n < N
    p_out, p_target = out_ptr + i_b * WIDTH * N, target_ptr + i_b * N
    p_distraction = distraction_ptr + i_b * stride_db
    m_taken = tl.load(p_distraction + o_n * stride_dn, mask=m_n, other=0) != 0
    b_x = start_group(start_ptr + i_b * stride_tb, stride_tw, stride_tn, o_n, N, GIVEN)
    cold = GIVEN == 0
    if GIVEN > 0:
        cold = tl.max(tl.max(tl.where((o_p > 0)[None, :], tl.abs(b_x), 0.0), axis=1), axis=0) <= 1e-5
    products = tl.where(cold, FIRST_DEGREE + 1 + (ROUNDS - 1) * (DEGREE + 1), WARM + 1)
    products = tl.where(tl.max(m_taken.to(tl.int32), axis=0) > 0, products, 0)
    rows = tl.where(products > 0, N, 0)
    o_read = o_n // 16 * 16 if PADDED else o_n  # 16 at once
    p_affinity = affinity_ptr + i_b * stride_ab + o_n[:, None] * SW + o_n[None, :]
    b_affinity = tl.load(p_affinity, mask=(o_n < rows)[:, None] & (o_read < rows)[None, :], other=0.0)
    b_affinity = tl.where(m_n[None, :], b_affinity, 0.0).to(dtype)
    b_before, b_degree, over, unit = b_x, tl.zeros([WHOLE], tl.float32), 0.0, 0.0
    step, last, unknown = 0, tl.where(cold, FIRST_DEGREE, WARM), cold
    for _product in range(products):
        b_z = sum_halves(tl.dot(b_affinity, halves(b_x, dtype)))
        if step == 0:
            b_degree = column_of(b_z, 0)
        b_z = quotient(b_z, b_degree[:, None])
        if step == 0:
            b_products, b_lengths, b_sums = moments(b_x, b_z, b_degree)
            b_mean, over, unit = bounds(b_products, b_lengths, b_sums, unknown)
            b_before = b_x - b_mean[None, :]
            b_x = with_one(next_term(b_z - b_mean[None, :], b_before, 0.0, over, unit) / 2, m_n)
            step += 1
        elif step < last:
            b_next = with_one(next_term(b_z, b_x, b_before, over, unit), m_n)
            b_before, b_x = b_x, b_next
            step += 1
        else:
            b_lanes = both_groups(b_x, b_z)
            b_gram = inner_products(b_lanes, b_degree / N, dtype)
            b_x = with_one(next_group(b_lanes, ritz_coefficients(b_gram, SQUARINGS, NEW), N), m_n)
            step, last, unknown = 0, DEGREE, False
    b_y = tl.where((o_p > 0)[None, :] & (b_degree > 0)[:, None], b_x, 0.0)
    b_first_y = column_of(b_y, 1)
    scale = scale_of(b_first_y, b_first_y, tl.sum(b_degree * b_first_y * b_first_y, axis=0), N)
    b_y *= scale
    tl.store(p_out + (o_p - 1)[None, :] * N + o_n[:, None], b_y, mask=(o_p > 0)[None, :] & m_n[:, None])
    mean = tl.div_rn(scale * tl.sum(b_first_y, axis=0), N.to(tl.float32))
    tl.store(p_target + o_n, (m_taken == 0) & (scale * b_first_y > mean), mask=m_n)
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
def row_products(p_affinity, p_halves, o_m, N, SW, PADDED: tl.constexpr, BN: tl.constexpr):
    """The rows o_m of W times a group, [BM, 8]."""
    o_c, m_m = tl.arange(0, 16), (o_m < N)[:, None]
    b_out = tl.zeros([o_m.shape[0], 16], tl.float32)
    last = N // BN * BN
    for start in range(0, last, BN):  # without a mask along rows, which would be read value by value
        o_n = start + tl.arange(0, BN)
        b_affinity = tl.load(p_affinity + o_m[:, None] * SW + o_n[None, :], mask=m_m, other=0.0)
        b_x = tl.load(p_halves + o_n[:, None] * 16 + o_c[None, :])
        b_out = tl.dot(b_affinity, b_x, b_out, input_precision="ieee")
    if last < N:
        o_n = last + tl.arange(0, BN)
        o_read = o_n // 16 * 16 if PADDED else o_n  # 16 at once
        b_affinity = tl.load(p_affinity + o_m[:, None] * SW + o_n[None, :], mask=m_m & (o_read < N)[None, :], other=0.0)
        b_affinity = tl.where((o_n < N)[None, :], b_affinity, 0.0).to(p_affinity.dtype.element_ty)
        b_x = tl.load(p_halves + o_n[:, None] * 16 + o_c[None, :], mask=(o_n < N)[:, None], other=0.0)
        b_out = tl.dot(b_affinity, b_x, b_out, input_precision="ieee")
    return sum_halves(b_out)


@triton.jit(do_not_specialize=["N", "stride_tb", "stride_tw"])
def cut_start_kernel(
    start_ptr,  # [B, GIVEN, N]
    vectors_ptr,  # [B, 2, N, 8] fp32
    halves_ptr,  # [B, 2, N, 16], of W's dtype: those of what the next product takes, or the one after it
    N,
    stride_tb,
    stride_tw,
    stride_tn,
    GIVEN: tl.constexpr,
    BV: tl.constexpr,
):
    """Some patches of 1 and the first Y."""
    blocks = tl.cdiv(N, BV)
    i_b, o_n = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BV + tl.arange(0, BV)
    b_y = start_group(start_ptr + i_b * stride_tb, stride_tw, stride_tn, o_n, N, GIVEN)
    store_group(vectors_ptr + i_b * 2 * N * 8, 0, b_y, o_n, N)
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
    PADDED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Some rows of Deg and Z, and what b is made of."""
    tiles, o_p = tl.cdiv(N, BM), tl.arange(0, 8)
    i_b, i_m = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    p_vectors, p_halves = vectors_ptr + i_b * 2 * N * 8, halves_ptr + i_b * 2 * N * 16
    o_m = i_m * BM + tl.arange(0, BM)
    b_z = row_products(affinity_ptr + i_b * stride_ab, p_halves, o_m, N, SW, PADDED, BN)
    b_degree = column_of(b_z, 0)
    b_z = quotient(b_z, b_degree[:, None])
    tl.store(degree_ptr + i_b * N + o_m, b_degree, mask=o_m < N)
    store_group(p_vectors, 1, b_z, o_m, N)
    store_halves(p_halves + N * 16, b_z, o_m, N)
    b_products, b_lengths, b_sums = moments(load_group(p_vectors, 0, o_m, N), b_z, b_degree)
    p_sums = sums_ptr + (i_b * tiles + i_m) * SUMS + 4 * o_p
    tl.store(p_sums, b_products)
    tl.store(p_sums + 1, b_lengths)
    tl.store(p_sums + 2, b_sums)
    tl.store(p_sums + 3, tl.zeros([8], tl.float32))


@triton.jit(do_not_specialize=["N", "step", "unknown"])
def cut_next_kernel(
    affinity_ptr,
    vectors_ptr,
    halves_ptr,
    degree_ptr,
    sums_ptr,
    gram_ptr,  # [B, tiles, GRAM] fp32
    N,
    SW,
    stride_ab,
    step,
    unknown,  # whether Y is no start that was given
    PADDED: tl.constexpr,
    SECOND: tl.constexpr,  # whether this is step 1
    LAST: tl.constexpr,  # whether it is step d
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Some rows of Y_i+1 in step i, in the place of Y_i-1; in the last one of Q, and the inner products over them."""
    tiles, o_lane = tl.cdiv(N, BM), tl.arange(0, 16)
    i_b, i_m = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    p_vectors, p_halves = vectors_ptr + i_b * 2 * N * 8, halves_ptr + i_b * 2 * N * 16
    here, there = step % 2, (step + 1) % 2
    o_m = i_m * BM + tl.arange(0, BM)
    b_degree = tl.load(degree_ptr + i_b * N + o_m, mask=o_m < N, other=0.0)
    b_z = row_products(affinity_ptr + i_b * stride_ab, p_halves + here * N * 16, o_m, N, SW, PADDED, BN)
    b_z = quotient(b_z, b_degree[:, None])
    b_x = load_group(p_vectors, here, o_m, N)
    if not LAST:
        b_sums = tl.reshape(sum_tiles(sums_ptr + i_b * tiles * SUMS, tiles, 64, SUMS), [8, 2, 2])
        b_even, b_odd = tl.split(b_sums)  # products and sums, lengths and zeros
        b_products, b_means = tl.split(b_even)
        b_lengths, _empty = tl.split(b_odd)
        b_mean, over, unit = bounds(b_products, b_lengths, b_means, unknown != 0)
        b_before = load_group(p_vectors, there, o_m, N)
        if SECOND:  # what is here is Z, and what was multiplied
            b_x, b_before = b_x - b_mean[None, :], b_before - b_mean[None, :]
            b_z = next_term(b_z - b_mean[None, :], b_x, 0.0, over, unit) / 2
            b_x = next_term(b_x, b_before, 0.0, over, unit) / 2
            store_group(p_vectors, here, b_x, o_m, N)
        b_next = with_one(next_term(b_z, b_x, b_before, over, unit), o_m < N)
        store_group(p_vectors, there, b_next, o_m, N)
        store_halves(p_halves + there * N * 16, b_next, o_m, N)
    else:
        store_group(p_vectors, there, b_z, o_m, N)
        p_gram = gram_ptr + (i_b * tiles + i_m) * GRAM + o_lane[:, None] * 16 + o_lane[None, :]
        tl.store(p_gram, inner_products(both_groups(b_x, b_z), b_degree / N, tl.float32))


@triton.jit
def ritz_vector(p_vectors, p_degree, b_coefficients, group, o_n, N):
    """y at some patches, and their degrees, from Q's coefficients."""
    b_degree = tl.load(p_degree + o_n, mask=o_n < N, other=0.0)
    b_y = tl.sum(load_group(p_vectors, group, o_n, N) * b_coefficients[None, :], axis=1) * tl.sqrt(N.to(tl.float32))
    return tl.where(b_degree > 0, b_y, 0.0), b_degree


@triton.jit(do_not_specialize=["N", "last", "stride_db"])
def cut_round_kernel(
    distraction_ptr,  # [B, N] bool, read where TARGET
    vectors_ptr,
    halves_ptr,
    degree_ptr,
    gram_ptr,
    out_ptr,  # [B, WIDTH, N] fp32, y and the others
    target_ptr,  # [B, N] bool
    order_ptr,  # [B, N + 1] int32
    N,
    last,  # d
    stride_db,
    stride_dn,
    LAST: tl.constexpr,
    TARGET: tl.constexpr,
    WIDTH: tl.constexpr,
    SQUARINGS: tl.constexpr,
    NEW: tl.constexpr,
    BM: tl.constexpr,
    BV: tl.constexpr,
):
    """The end of a round for some patches: the next Y, or y and the defocused tokens."""
    tiles, blocks, o_p = tl.cdiv(N, BM), tl.cdiv(N, BV), tl.arange(0, 8)
    i_b, first = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BV
    p_vectors, p_halves, p_degree = vectors_ptr + i_b * 2 * N * 8, halves_ptr + i_b * 2 * N * 16, degree_ptr + i_b * N
    b_gram = tl.reshape(sum_tiles(gram_ptr + i_b * tiles * GRAM, tiles, 32, GRAM), [16, 16])
    b_ritz = ritz_coefficients(b_gram, SQUARINGS, NEW)
    o_n, here, there = first + tl.arange(0, BV), last % 2, (last + 1) % 2
    m_n = o_n < N
    b_lanes = both_groups(load_group(p_vectors, here, o_n, N), load_group(p_vectors, there, o_n, N))
    b_next = next_group(b_lanes, b_ritz, N)
    if not LAST:
        b_next = with_one(b_next, m_n)
        store_group(p_vectors, 0, b_next, o_n, N)
        store_halves(p_halves, b_next, o_n, N)
    else:
        # Every program finds y at all patches, for its sign, its mean and the order of those before.
        _zeros, b_y_of_q = tl.split(tl.reshape(column_of(b_ritz, 2), [8, 2]))
        b_top, b_bottom = tl.zeros([BV], tl.float32), tl.zeros([BV], tl.float32)
        b_sum, b_length = tl.zeros([BV], tl.float32), tl.zeros([BV], tl.float32)
        for start in range(0, N, BV):
            b_y, b_degree = ritz_vector(p_vectors, p_degree, b_y_of_q, there, start + tl.arange(0, BV), N)
            b_top, b_bottom = tl.maximum(b_top, b_y), tl.minimum(b_bottom, b_y)
            b_sum += b_y
            b_length += b_degree * b_y * b_y
        scale = scale_of(b_top, b_bottom, tl.sum(b_length, axis=0), N)
        b_degree = tl.load(p_degree + o_n, mask=m_n, other=0.0)
        b_next = tl.where((b_degree > 0)[:, None], scale * b_next, 0.0)
        p_next = out_ptr + i_b * WIDTH * N + (o_p - 1)[None, :] * N + o_n[:, None]
        tl.store(p_next, b_next, mask=(o_p > 0)[None, :] & m_n[:, None])
        if TARGET:
            p_distraction, p_order = distraction_ptr + i_b * stride_db, order_ptr + i_b * (N + 1)
            mean = tl.div_rn(scale * tl.sum(b_sum, axis=0), N.to(tl.float32))
            # Its own targets come from the loop that counts all: other code might find one more or less.
            b_all, b_before, b_own = tl.zeros([BV], tl.float32), tl.zeros([BV], tl.float32), tl.zeros([BV], tl.float32)
            b_taken, b_taken_before = tl.zeros([BV], tl.float32), tl.zeros([BV], tl.float32)
            for start in range(0, N, BV):
                o_all = start + tl.arange(0, BV)
                m_taken = tl.load(p_distraction + o_all * stride_dn, mask=o_all < N, other=0) != 0
                b_y, _degree = ritz_vector(p_vectors, p_degree, b_y_of_q, there, o_all, N)
                b_target = ((o_all < N) & (m_taken == 0) & (scale * b_y > mean)).to(tl.float32)
                b_all += b_target
                b_taken += m_taken.to(tl.float32)
                b_before += tl.where(start < first, b_target, 0.0)
                b_taken_before += tl.where(start < first, m_taken.to(tl.float32), 0.0)
                b_own = tl.where(start == first, b_target, b_own)
            n_target, n_free = tl.sum(b_all, axis=0).to(tl.int32), N - tl.sum(b_taken, axis=0).to(tl.int32)
            i_target, i_taken = tl.sum(b_before, axis=0).to(tl.int32), tl.sum(b_taken_before, axis=0).to(tl.int32)
            m_taken, m_target = tl.load(p_distraction + o_n * stride_dn, mask=m_n, other=0) != 0, b_own > 0
            tl.store(target_ptr + i_b * N + o_n, m_target, mask=m_n)
            tl.store(p_order, n_target, mask=first == 0)
            store_order(p_order + 1, m_taken, m_target, n_target, n_free, i_target, i_taken, o_n, N)


def whole(affinity: Tensor) -> int:
    """The most patches that one program takes, which keeps all of W in its shared memory."""
    if affinity.dtype == torch.float32:
        return 0
    return 256 if tables.architecture(affinity.device) in ("sm_80", "sm_90", "sm_100") else 128


def _padded(affinity: Tensor) -> bool:
    """Whether W's rows are padded to a multiple of 16 values and may be read 16 at once."""
    B, N, _ = affinity.shape
    width, strides = triton.cdiv(N, 16) * 16, affinity.stride()
    end = affinity.storage_offset() + (B - 1) * strides[0] + (N - 1) * strides[1] + width
    held = affinity.untyped_storage().nbytes() // affinity.itemsize
    return strides[1] % 16 == 0 and strides[1] >= width and end <= held


def _cut(
    affinity: Tensor,
    start: Tensor | None,
    distraction: Tensor | None,
    cold: tuple[int, ...],  # after the first, degrees are equal
    warm: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """y and six other vectors [B, 7, N]; the defocused tokens [B, N] and the patches in order, if there are masks."""
    B, N, _ = affinity.shape
    empty = partial(affinity.new_empty, dtype=torch.float32)
    out, target = empty((B, WIDTH, N)), empty((B, N), dtype=torch.bool)
    order = empty((B, N + 1), dtype=torch.int32)
    given = 0 if start is None else start.shape[1]
    begun = out if start is None else start
    beginning = {"start_ptr": begun, **strides("t", begun, "bwn"), "GIVEN": given}
    rounds = cold if start is None else warm
    taken = target if distraction is None else distraction
    ended = {"distraction_ptr": taken, **strides("d", taken, "bn"), "WIDTH": WIDTH}
    ended |= {"out_ptr": out, "target_ptr": target, "order_ptr": order}
    ended |= {"SQUARINGS": constants.SQUARINGS, "NEW": constants.NEW}
    if distraction is not None and whole(affinity) >= N:
        wrap_triton(cut_kernel)[(B,)](
            affinity_ptr=affinity,
            N=N,
            SW=affinity.stride(1),
            stride_ab=affinity.stride(0),
            **beginning,
            **ended,
            PADDED=_padded(affinity),
            WARM=warm[0],
            ROUNDS=len(cold),
            FIRST_DEGREE=cold[0],
            DEGREE=cold[-1],
            WHOLE=max(64, triton.next_power_of_2(N)),
            num_warps=8,
        )
        return out, target, order
    tiles, blocks = triton.cdiv(N, BLOCK_ROWS), (B * triton.cdiv(N, BLOCK_VECTORS),)
    vectors = {"N": N, "vectors_ptr": empty((B, 2, N, 8)), "halves_ptr": affinity.new_empty((B, 2, N, 16))}
    degree, gram = empty((B, N)), empty((B, tiles, GRAM.value))
    products = vectors | {
        "affinity_ptr": affinity,
        "SW": affinity.stride(1),
        "stride_ab": affinity.stride(0),
        "degree_ptr": degree,
        "sums_ptr": empty((B, tiles, SUMS.value)),
        "PADDED": _padded(affinity),
        "BM": BLOCK_ROWS,
        "BN": BLOCK_COLUMNS if affinity.dtype != torch.float32 else BLOCK_COLUMNS // 4,
        "num_warps": 4,
    }
    if not tables.architecture(affinity.device).startswith("gfx"):
        products["num_stages"] = 4  # more bytes on their way, where the programs are few
    wrap_triton(cut_start_kernel)[blocks](**beginning, **vectors, BV=BLOCK_VECTORS, num_warps=4)
    for i, last in enumerate(rounds):
        wrap_triton(cut_first_kernel)[(B * tiles,)](**products)
        for step in range(1, last + 1):
            wrap_triton(cut_next_kernel)[(B * tiles,)](
                **products,
                gram_ptr=gram,
                step=step,
                unknown=int(i == 0 and start is None),
                SECOND=step == 1,
                LAST=step == last,
            )
        wrap_triton(cut_round_kernel)[(B * triton.cdiv(N, BLOCK_ENDS),)](
            **vectors,
            **ended,
            last=last,
            degree_ptr=degree,
            gram_ptr=gram,
            LAST=i == len(rounds) - 1,
            TARGET=distraction is not None,
            BM=BLOCK_ROWS,
            BV=BLOCK_ENDS,
            num_warps=8,
        )
    return out, target, order


@operator("fiedler_vector")
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
        return _cut(affinity, None if start is None else start[:, None], None, constants.DEGREES, FROM_START)[0][:, 0]


@operator("defocused_tokens")
def _defocused_tokens(affinity: Tensor, distraction: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    B, N, _ = affinity.shape
    if not B:
        empty = partial(affinity.new_empty, dtype=torch.float32)
        return empty((0, WIDTH, N)), empty((0, N), dtype=torch.bool), empty((0, N + 1), dtype=torch.int32)
    if affinity.dtype not in (torch.float16, torch.float32):
        affinity = affinity.float()  # vectors are split into halves for fp16 only
    with on_device(affinity):
        rounds = constants.DEGREES if N <= FEW else DEGREES_OF_MANY
        return _cut(affinity, start, distraction, rounds, TOWER_FROM_START)


def launch_fiedler_vector(similarity: Tensor, start: Tensor | None) -> Tensor:
    """Rounds of degrees 3, 7 and 7, or three of 3 from a start.

    Where they cannot tell the second eigenvalue from the third, y is some vector of their eigenspaces.
    """
    check_launch(similarity=similarity, start=start)
    return _fiedler_vector(similarity, start)


def launch_defocused_tokens(
    affinity: Tensor, distraction: Tensor, start: Tensor | None, threshold: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds of degrees 3, 7 and 7 (2, 5 and 5 above 256 patches); one of 3 from the last vectors.

    "otsu" takes two launches more.

    Up to 256 patches, an image without distraction has no target, and vectors of zeros: the next block begins anew.
    """
    check_launch(affinity=affinity, distraction=distraction, start=start)
    vectors, target, order = _defocused_tokens(affinity, distraction, start)
    if threshold == "otsu":
        target = launch_defocus_mask(vectors[:, 0], distraction, threshold)
        order = ordered_patches(distraction, target)
    return vectors, target, order
