"""Pixel-adaptive mask refinement (PAMR): step 9 of the method.

mask[c] <- sum over p of softmax_p(mean over channels i of -|x[i] - x[i, p]| / (1e-8 + 0.1 std[i])) mask[c, p]

p runs over the 8 neighbours of a pixel at each of the dilations, and std is over all of them and, once for each
dilation, the pixel itself. An iteration is a launch from one buffer into another. Every launch recomputes the weights
[P, H, W] from the picture rather than load them: the picture has 3 channels, the weights would have 16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_launch, on_device, operator, strides, wrap_triton

BLOCK = 2048  # places of a tile [BP, BX]: 16 a thread
NUM_WARPS = 4


@triton.jit(do_not_specialize=["CI", "C", "H", "W"])
def pamr_kernel(
    image_ptr,  # [B, CI, H, W]
    mask_ptr,  # [B, C, H, W]
    out_ptr,  # [B, C, H, W] fp32 contiguous
    CI,
    C,
    H,
    W,
    stride_ib,
    stride_ic,
    stride_ih,
    stride_iw,
    stride_mb,
    stride_mc,
    stride_mh,
    stride_mw,
    DILATIONS: tl.constexpr,  # tuple of int
    BP: tl.constexpr,
    BX: tl.constexpr,
):
    tiles = tl.cdiv(W, BX)  # the grid has one axis: the others are limited to 65535 programs
    i_b = (tl.program_id(0) // tiles // H).to(tl.int64)
    y = tl.program_id(0) // tiles % H
    o_x = tl.program_id(0) % tiles * BX + tl.arange(0, BX)
    m_x = o_x < W
    o_p = tl.arange(0, BP)
    m_p = o_p < 8 * len(DILATIONS)
    place = o_p % 8 + (o_p % 8 >= 4).to(tl.int32)  # of the 3 x 3, without its centre
    reach = tl.zeros([BP], tl.int32)
    for j in tl.static_range(len(DILATIONS)):
        reach = tl.where(o_p // 8 == j, DILATIONS[j], reach)
    row = tl.minimum(tl.maximum(y + (place // 3 - 1) * reach, 0), H - 1)  # [BP]
    column = tl.minimum(tl.maximum(o_x[None, :] + ((place % 3 - 1) * reach)[:, None], 0), W - 1)  # [BP, BX]
    m_near = m_p[:, None] & m_x[None, :]

    p_image = image_ptr + i_b * stride_ib
    p_near = p_image + row[:, None] * stride_ih + column * stride_iw
    p_image += y * stride_ih + o_x * stride_iw
    b_weight = tl.zeros([BP, BX], tl.float32)
    for _channel in range(0, CI):
        b_x = tl.load(p_image, mask=m_x, other=0.0).to(tl.float32)  # [BX]
        b_near = tl.load(p_near, mask=m_near, other=0.0).to(tl.float32)  # [BP, BX]
        b_mean = (tl.sum(b_near, axis=0) + len(DILATIONS) * b_x) / (9 * len(DILATIONS))
        b_off = tl.where(m_p[:, None], b_near - b_mean[None, :], 0.0)
        b_var = tl.sum(b_off * b_off, axis=0) + len(DILATIONS) * (b_x - b_mean) * (b_x - b_mean)
        b_std = tl.sqrt(b_var / (9 * len(DILATIONS) - 1))
        b_weight -= tl.abs(b_near - b_x[None, :]) / (1e-8 + 0.1 * b_std)[None, :]
        p_image += stride_ic
        p_near += stride_ic
    b_weight = tl.where(m_p[:, None], b_weight / CI, float("-inf"))
    b_weight = tl.exp(b_weight - tl.max(b_weight, axis=0)[None, :])
    b_weight = b_weight / tl.sum(b_weight, axis=0)[None, :]

    p_mask = mask_ptr + i_b * stride_mb + row[:, None] * stride_mh + column * stride_mw
    p_out = out_ptr + (i_b * C * H + y) * W + o_x
    for _class in range(0, C):
        b_mask = tl.load(p_mask, mask=m_near, other=0.0).to(tl.float32)
        tl.store(p_out, tl.sum(b_weight * b_mask, axis=0), mask=m_x)
        p_mask += stride_mc
        p_out += H * W


@operator("pamr")
def _pamr(image: Tensor, mask: Tensor, iterations: int, dilations: list[int]) -> Tensor:
    B, C, H, W = mask.shape
    buffers = [mask.new_empty((B, C, H, W), dtype=torch.float32) for _ in range(min(iterations, 2))]
    BP = triton.next_power_of_2(8 * len(dilations))
    BX = max(32, BLOCK // BP)
    out = mask
    for step in range(iterations if B else 0):
        before, out = out, buffers[step % 2]
        with on_device(image):
            wrap_triton(pamr_kernel)[(triton.cdiv(W, BX) * H * B,)](
                image_ptr=image,
                mask_ptr=before,
                out_ptr=out,
                CI=image.shape[1],
                C=C,
                H=H,
                W=W,
                **strides("i", image, "bchw"),
                **strides("m", before, "bchw"),
                DILATIONS=tuple(dilations),
                BP=BP,
                BX=BX,
                num_warps=NUM_WARPS,
            )
    return out.clone(memory_format=torch.contiguous_format) if out is mask else out.to(mask.dtype)


def launch_pamr(image: Tensor, mask: Tensor, iterations: int, dilations: list[int]) -> Tensor:
    """One launch per iteration; weights and masks are fp32 in between."""
    check_launch(image=image, mask=mask)
    dilations = [min(d, max(image.shape[2:])) for d in dilations]  # beyond the picture, all of them reach its border
    return _pamr(image, mask, iterations, dilations)
