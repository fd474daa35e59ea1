"""From patch logits of overlapping windows to labels of pixels: step 8 of the method.

mean[k, y, x] = mean over the windows that cover (y, x) of their bilinearly resized logits of name k
label[y, x] = class of argmax_k l[k],  l = logit_scale * mean bilinearly resized at (y, x)
probability[y, x] = max_k softmax(l)[k] = 1 / sum_k exp(l[k] - max l)

Neither the resized windows [W, K, height, width] nor the upsampled logits [K, H, W] are ever stored. The largest
probability of a class is that of its best name, so labels and threshold do not need the number of classes.

A grid has one axis here, since the others are limited to 65535 programs, and a picture may have more rows.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses import FakeTensor

from .attention import LOG2E
from .launch import check_launch, on_device, operator, strides, wrap_triton

BLOCK_NAMES = 4
BLOCK_COLUMNS = 128
NUM_WARPS = 4
NO_CLASS = tl.constexpr(2**31 - 1)


@triton.jit
def source(place, scale, size):
    """The two source indices of output pixels, and the weight of the second; scale is source over output size."""
    at = tl.maximum((place + 0.5) * scale - 0.5, 0.0)
    low = tl.minimum(at.to(tl.int32), size - 1)
    return low, tl.minimum(low + 1, size - 1), at - low


@triton.jit
def bilinear(p_x, stride_h, stride_w, low_y, high_y, part_y, low_x, high_x, part_x, mask):
    """Bilinear samples of planes at p_x [BK, 1], in one row and at columns [1, BX]: fp32 [BK, BX], 0 off the mask."""
    p_low, p_high = p_x + low_y * stride_h, p_x + high_y * stride_h
    b_ll = tl.load(p_low + low_x * stride_w, mask=mask, other=0.0).to(tl.float32)
    b_lh = tl.load(p_low + high_x * stride_w, mask=mask, other=0.0).to(tl.float32)
    b_hl = tl.load(p_high + low_x * stride_w, mask=mask, other=0.0).to(tl.float32)
    b_hh = tl.load(p_high + high_x * stride_w, mask=mask, other=0.0).to(tl.float32)
    b_low, b_high = b_ll * (1 - part_x) + b_lh * part_x, b_hl * (1 - part_x) + b_hh * part_x
    return b_low * (1 - part_y) + b_high * part_y


@triton.jit(do_not_specialize=["W", "K", "gh", "gw", "height", "width", "h", "w"])
def average_windows_kernel(
    logits_ptr,  # [W, K, gh, gw]
    corners_ptr,  # [W, 2] int32 contiguous, top and left
    out_ptr,  # [K, h, w] fp32 contiguous
    W,
    K,
    gh,
    gw,
    height,
    width,
    h,
    w,
    scale_h,  # gh / height
    scale_w,  # gw / width
    stride_lw,
    stride_lk,
    stride_lh,
    stride_lc,
    BK: tl.constexpr,
    BX: tl.constexpr,
):
    scale_h, scale_w = tl.cast(scale_h, tl.float32), tl.cast(scale_w, tl.float32)  # fp64 from some Inductors
    tiles, groups = tl.cdiv(w, BX), tl.cdiv(K, BK)
    y = tl.program_id(0) // tiles // groups
    o_x = tl.program_id(0) % tiles * BX + tl.arange(0, BX)
    o_k = tl.program_id(0) // tiles % groups * BK + tl.arange(0, BK)
    m_k = o_k < K
    p_logits, p_corner = logits_ptr, corners_ptr
    b_sum = tl.zeros([BK, BX], tl.float32)
    b_count = tl.zeros([BX], tl.float32)
    for _window in range(0, W):
        top, left = tl.load(p_corner), tl.load(p_corner + 1)
        if (top <= y) & (y < top + height):
            m_x = (o_x >= left) & (o_x < left + width) & (o_x < w)
            low_y, high_y, part_y = source(y - top, scale_h, gh)
            low_x, high_x, part_x = source(o_x - left, scale_w, gw)
            m_in = m_k[:, None] & m_x[None, :]
            b_sum += bilinear(
                p_logits + o_k[:, None] * stride_lk,
                stride_lh,
                stride_lc,
                low_y,
                high_y,
                part_y,
                low_x[None, :],
                high_x[None, :],
                part_x[None, :],
                m_in,
            )
            b_count += m_x.to(tl.float32)
        p_logits += stride_lw
        p_corner += 2
    p_out = out_ptr + (o_k[:, None].to(tl.int64) * h + y) * w + o_x[None, :]
    tl.store(p_out, b_sum / tl.maximum(b_count, 1.0)[None, :], mask=m_k[:, None] & (o_x < w)[None, :])


@triton.jit(do_not_specialize=["K", "h", "w", "W"])
def upsample_argmax_kernel(
    logits_ptr,  # [K, h, w]
    class_ptr,  # [K] int64
    out_ptr,  # [H, W] int32 contiguous
    K,
    h,
    w,
    W,
    scale,  # of the logits, times log2(e)
    scale_h,  # h / H
    scale_w,  # w / W
    threshold,  # negative for none
    stride_lk,
    stride_lh,
    stride_lw,
    stride_ck,
    BK: tl.constexpr,
    BX: tl.constexpr,
):
    scale, threshold = tl.cast(scale, tl.float32), tl.cast(threshold, tl.float32)  # fp64 from some Inductors
    scale_h, scale_w = tl.cast(scale_h, tl.float32), tl.cast(scale_w, tl.float32)
    tiles = tl.cdiv(W, BX)
    y = tl.program_id(0) // tiles
    o_x = tl.program_id(0) % tiles * BX + tl.arange(0, BX)
    m_x = o_x < W
    low_y, high_y, part_y = source(y, scale_h, h)
    low_x, high_x, part_x = source(o_x, scale_w, w)
    b_max = tl.full([BX], float("-inf"), tl.float32)
    b_sum = tl.zeros([BX], tl.float32)
    b_label = tl.full([BX], NO_CLASS, tl.int32)
    for start in range(0, K, BK):
        o_k = start + tl.arange(0, BK)
        m_k = o_k < K
        b_l = bilinear(
            logits_ptr + o_k[:, None].to(tl.int64) * stride_lk,
            stride_lh,
            stride_lw,
            low_y,
            high_y,
            part_y,
            low_x[None, :],
            high_x[None, :],
            part_x[None, :],
            m_k[:, None] & m_x[None, :],
        )
        b_l = tl.where(m_k[:, None], b_l * scale, float("-inf"))  # [BK, BX]
        b_class = tl.load(class_ptr + o_k * stride_ck, mask=m_k, other=0).to(tl.int32)
        b_top = tl.max(b_l, axis=0)  # [BX]
        b_first = tl.min(tl.where(b_l == b_top[None, :], b_class[:, None], NO_CLASS), axis=0)
        b_lower = tl.minimum(b_label, b_first)
        b_label = tl.where(b_top > b_max, b_first, tl.where(b_top == b_max, b_lower, b_label))
        b_new = tl.maximum(b_max, b_top)
        b_sum = b_sum * tl.exp2(b_max - b_new) + tl.sum(tl.exp2(b_l - b_new[None, :]), axis=0)
        b_max = b_new
    b_label = tl.where(tl.div_rn(1.0, b_sum) < threshold, -1, b_label)
    tl.store(out_ptr + y.to(tl.int64) * W + o_x, b_label, mask=m_x)


@operator("average_windows")
def _average_windows(logits: Tensor, corners: Tensor, height: int, width: int, h: int, w: int) -> Tensor:
    W, K, gh, gw = logits.shape
    out = logits.new_empty((K, h, w), dtype=torch.float32)
    with on_device(logits):
        wrap_triton(average_windows_kernel)[(triton.cdiv(w, BLOCK_COLUMNS) * triton.cdiv(K, BLOCK_NAMES) * h,)](
            logits_ptr=logits,
            corners_ptr=corners,
            out_ptr=out,
            W=W,
            K=K,
            gh=gh,
            gw=gw,
            height=height,
            width=width,
            h=h,
            w=w,
            scale_h=gh / height,
            scale_w=gw / width,
            **strides("l", logits, "wkhc"),
            BK=BLOCK_NAMES,
            BX=BLOCK_COLUMNS,
            num_warps=NUM_WARPS,
        )
    return out


@operator("upsample_argmax")
def _upsample_argmax(
    logits: Tensor, H: int, W: int, logit_scale: float, class_of_name: Tensor, threshold: float
) -> Tensor:
    K, h, w = logits.shape
    out = logits.new_empty((H, W), dtype=torch.int32)
    with on_device(logits):
        wrap_triton(upsample_argmax_kernel)[(triton.cdiv(W, BLOCK_COLUMNS) * H,)](
            logits_ptr=logits,
            class_ptr=class_of_name,
            out_ptr=out,
            K=K,
            h=h,
            w=w,
            W=W,
            scale=logit_scale * LOG2E.value,
            scale_h=h / H,
            scale_w=w / W,
            threshold=threshold,
            **strides("l", logits, "khw"),
            stride_ck=class_of_name.stride(0),
            BK=BLOCK_NAMES,
            BX=BLOCK_COLUMNS,
            num_warps=NUM_WARPS,
        )
    return out


def _upload(corners: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Corners of windows on a device, int32 [W, 2]."""
    return torch.tensor(corners, dtype=torch.int32, device=device)


_uploaded = lru_cache(maxsize=256)(torch.inference_mode(False)(_upload))  # for use in every mode
_captured: dict[int, Tensor] = {}  # corners that a CUDA graph reads, by address: they must not be freed


def launch_average_windows(
    logits: Tensor, corners: list[tuple[int, int]], height: int, width: int, h: int, w: int
) -> Tensor:
    """One launch that writes each pixel once. Corners are uploaded when they first occur, which cannot be captured."""
    check_launch(logits=logits)
    traced = torch.compiler.is_compiling() or isinstance(logits, FakeTensor)
    places = (_upload if traced else _uploaded)(tuple(corners), logits.device)
    if logits.is_cuda and not traced and torch.cuda.is_current_stream_capturing():
        _captured[places.data_ptr()] = places
    return _average_windows(logits, places, height, width, h, w)


def launch_upsample_argmax(
    logits: Tensor, H: int, W: int, logit_scale: float, class_of_name: Tensor, threshold: float | None
) -> Tensor:
    """One launch that stores nothing but labels. Two names tie where their logits are equal."""
    check_launch(logits=logits, class_of_name=class_of_name)
    return _upsample_argmax(logits, H, W, logit_scale, class_of_name, -1.0 if threshold is None else threshold)
