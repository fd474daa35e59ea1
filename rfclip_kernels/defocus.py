"""The defocused tokens: the threshold below equation 8 of the paper, and Otsu's.

    T_def = {i : y[i] > threshold and i not in T_dis}

The threshold is the mean of y. Otsu's is the c, a value of y, that most separates the values up to it from those above,

    n_low n_high (mean_low - mean_high)^2,

the lowest of equals. It takes a launch more, in which many programs compare a few c each with all values at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_launch, on_device, operator, strides, wrap_triton

OTSU_ROWS = 16  # values of c in a program
OTSU_COLUMNS = 256
BLOCK = 1024  # values that the one program of an image reads at once


@triton.jit(do_not_specialize=["N"])
def otsu_kernel(
    y_ptr,  # [B, N]
    separation_ptr,  # [B, N] fp64, for each value as c
    N,
    stride_yb,
    stride_yn,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    tiles = tl.cdiv(N, BM)
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    o_m = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    p_y = y_ptr + i_b * stride_yb
    b_c = tl.load(p_y + o_m * stride_yn, mask=o_m < N, other=0.0).to(tl.float32)
    b_count = tl.zeros([BM, BN], tl.float32)  # of the values above c; exact in fp32
    b_low, b_high = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        b_y = tl.load(p_y + o_n * stride_yn, mask=o_n < N, other=0.0).to(tl.float32)
        b_off = tl.where((o_n < N)[None, :], b_y[None, :] - b_c[:, None], 0.0)  # of the difference of means, c cancels
        b_count += tl.where(b_off > 0, 1.0, 0.0)
        b_low += tl.minimum(b_off, 0.0)
        b_high += tl.maximum(b_off, 0.0)
    # In fp64, since the best c and its neighbours differ by a share of about 1 / N^2.
    b_n = tl.sum(b_count, axis=1).to(tl.float64)
    b_low_mean = tl.sum(b_low.to(tl.float64), axis=1) / tl.maximum(N - b_n, 1.0)
    b_apart = tl.sum(b_high.to(tl.float64), axis=1) / tl.maximum(b_n, 1.0) - b_low_mean
    tl.store(separation_ptr + i_b * N + o_m, b_n * (N - b_n) * b_apart * b_apart, mask=o_m < N)


@triton.jit(do_not_specialize=["N"])
def defocus_kernel(
    y_ptr,  # [B, N]
    distraction_ptr,  # [B, N] bool, read where GIVEN
    separation_ptr,  # [B, N] fp64, read where OTSU
    out_ptr,  # [B, N] bool
    N,
    stride_yb,
    stride_yn,
    stride_db,
    stride_dn,
    GIVEN: tl.constexpr,
    OTSU: tl.constexpr,
    BN: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    p_y = y_ptr + i_b * stride_yb
    if OTSU:
        b_most, b_threshold = tl.full([BN], -1.0, tl.float64), tl.full([BN], float("inf"), tl.float32)
        for start in range(0, N, BN):
            o_n = start + tl.arange(0, BN)
            b_c = tl.load(p_y + o_n * stride_yn, mask=o_n < N, other=float("inf")).to(tl.float32)
            b_new = tl.load(separation_ptr + i_b * N + o_n, mask=o_n < N, other=-1.0)
            b_lower = tl.where(b_new == b_most, tl.minimum(b_threshold, b_c), b_threshold)
            b_threshold = tl.where(b_new > b_most, b_c, b_lower)
            b_most = tl.maximum(b_most, b_new)
        most = tl.max(b_most, axis=0)
        threshold = tl.min(tl.where(b_most == most, b_threshold, float("inf")), axis=0)
    else:
        b_sum = tl.zeros([BN], tl.float32)
        for start in range(0, N, BN):
            o_n = start + tl.arange(0, BN)
            b_sum += tl.load(p_y + o_n * stride_yn, mask=o_n < N, other=0.0).to(tl.float32)
        threshold = tl.div_rn(tl.sum(b_sum, axis=0), N.to(tl.float32))
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        m_above = tl.load(p_y + o_n * stride_yn, mask=o_n < N, other=0.0).to(tl.float32) > threshold
        if GIVEN:
            p_distraction = distraction_ptr + i_b * stride_db + o_n * stride_dn
            m_above = m_above & (tl.load(p_distraction, mask=o_n < N, other=1) == 0)
        tl.store(out_ptr + i_b * N + o_n, m_above, mask=o_n < N)


@operator("defocus_mask")
def _defocus_mask(fiedler: Tensor, distraction: Tensor | None, threshold: str) -> Tensor:
    B, N = fiedler.shape
    otsu, out = threshold == "otsu", fiedler.new_empty((B, N), dtype=torch.bool)
    separation = fiedler.new_empty((B, N), dtype=torch.float64) if otsu else out
    taken = out if distraction is None else distraction
    if B:
        with on_device(fiedler):
            if otsu:
                wrap_triton(otsu_kernel)[(B * triton.cdiv(N, OTSU_ROWS),)](
                    y_ptr=fiedler,
                    separation_ptr=separation,
                    N=N,
                    **strides("y", fiedler, "bn"),
                    BM=OTSU_ROWS,
                    BN=OTSU_COLUMNS,
                    num_warps=8,
                )
            wrap_triton(defocus_kernel)[(B,)](
                y_ptr=fiedler,
                distraction_ptr=taken,
                separation_ptr=separation,
                out_ptr=out,
                N=N,
                **strides("y", fiedler, "bn"),
                **strides("d", taken, "bn"),
                GIVEN=distraction is not None,
                OTSU=otsu,
                BN=BLOCK,
            )
    return out


def launch_defocus_mask(fiedler: Tensor, distraction: Tensor | None, threshold: str) -> Tensor:
    """One launch, or two for "otsu"."""
    check_launch(fiedler=fiedler, distraction=distraction)
    return _defocus_mask(fiedler, distraction, threshold)
