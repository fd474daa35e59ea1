"""What enters a tower, as matrix products: patches in place of a convolution, and position embeddings on any grid."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._guards import detect_fake_mode

from rfclip.ops.numerics import computing_dtype, matmul


def embed_patches(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of images [B, 3, gh * h, gw * w] with kernels [d, 3, h, w] that lie side by side.

    Returns:
        [B, d, gh, gw] in the dtype of the kernels, a view of [B, gh, gw, d].
    """
    height, width = weight.shape[2:]
    parts = images.unflatten(2, (-1, height)).unflatten(4, (-1, width)).permute(0, 2, 4, 1, 3, 5)
    parts = parts.to(weight.dtype, memory_format=torch.contiguous_format).flatten(3)  # one copy, [B, gh, gw, 3 * h * w]
    return F.linear(parts, weight.flatten(1), bias).permute(0, 3, 1, 2)


def resize_positions(trained: Tensor, grid: tuple[int, int], offset: float = 0.0) -> Tensor:
    """Position embeddings [h, w, d] resized bicubically, [gh, gw, d] in float32, or in float64 for float64.

    With an offset, samples are taken as if the new grid were gh + offset by gw + offset.

    PyTorch's own kernel is slow at so many channels. Compilers have another, and exporters know the operator.
    """
    dtype, (height, width) = computing_dtype(trained), grid
    if torch.compiler.is_compiling() or detect_fake_mode(trained) is not None:
        if offset:
            rows, columns = _traced(trained, grid, offset, dtype)
            return matmul(columns, matmul(rows, trained.to(dtype).flatten(1)).unflatten(1, trained.shape[1:]))
        planes = trained.to(dtype).permute(2, 0, 1)[None]
        return F.interpolate(planes, size=grid, mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
    rows = resizing(trained.shape[0], height, offset, dtype, trained.device)
    columns = resizing(trained.shape[1], width, offset, dtype, trained.device)
    return matmul(columns, matmul(rows, trained.flatten(1)).unflatten(1, trained.shape[1:]))


@cache  # for good: each is small, and CUDA graphs read them
@torch.inference_mode(False)  # for use in every mode
def resizing(old: int, new: int, offset: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix [new, old] that resizes an axis bicubically. Its upload cannot be captured: a call has to be first."""
    basis = torch.eye(old, dtype=torch.float64, device="cpu")[None, :, :, None]
    resized = _bicubic(basis, (new, 1), offset)
    return resized[0, :, :, 0].T.contiguous().to(dtype).to(device)


def _traced(trained: Tensor, grid: tuple[int, int], offset: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The matrices of `resizing` with an offset for a grid that an exporter may leave open, in operations on tensors.

    Where that turns out to be the trained grid, the offset does not apply.
    """
    places = [torch.arange(new, dtype=dtype, device=trained.device) for new in grid]
    sides = [place[-1] + 1 for place in places]
    same = (sides[0] == trained.shape[0]) & (sides[1] == trained.shape[1])
    offsets = torch.where(same, 0.0, offset)
    matrices = []
    for place, side, old in zip(places, sides, trained.shape[:2], strict=True):
        source = (place + 0.5) * (old / (side + offsets)) - 0.5
        low, columns, taps = source.floor(), torch.arange(old, device=trained.device), []
        for tap in range(-1, 3):
            t = (source - low - tap).abs()
            near = ((1.25 * t - 2.25) * t) * t + 1  # a = -0.75, as in PyTorch
            far = ((-0.75 * t + 3.75) * t - 6) * t + 3
            index = (low + tap).clamp(0, old - 1)
            taps.append(torch.where(t <= 1, near, far)[:, None] * (index[:, None] == columns))
        matrices.append(torch.stack(taps).sum(dim=0))
    return matrices[0], matrices[1]


def _bicubic(planes: Tensor, grid: tuple[int, int], offset: float) -> Tensor:
    """Planes [1, d, h, w] resized to [1, d, gh, gw]; with an offset, by scale factors, which are then what counts."""
    if not offset:
        return F.interpolate(planes, size=grid, mode="bicubic", align_corners=False)
    scales = [(new + offset) / old for new, old in zip(grid, planes.shape[2:], strict=True)]
    return F.interpolate(planes, scale_factor=scales, mode="bicubic", align_corners=False, recompute_scale_factor=False)
