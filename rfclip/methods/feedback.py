"""ResCLIP's feedback pass: the classes of a first pass correct the attention of the last block in a second.

With S the logits of the last block's attention, M [N, N] the agreement of patches by their classes in the first pass,
and t and l constants, the second pass has the logits t ((1 - l) S + l M); a bias by distance stays as it is. M is made
of labels: 0 for patches of two classes; 1 if the line between two patches, as far as it is tested, runs through their
class alone; else exp(-far / K), far being their distance along the longer axis of the grid and K the largest. Its rows
are then blurred along the raster, divided by their sums, and all of it by its maximum.

The line has K steps whatever its length, of which the first `far` are tested: so do the authors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from rfclip.methods.base import Method, Sweep
from rfclip.methods.registry import METHODS
from rfclip.ops import Backend
from rfclip.ops.numerics import computing_dtype
from rfclip.ops.reference import attention_bias

DEFAULTS = {"confidence": 0.5, "gain": 2.2, "agreement": 0.7}  # as on VOC21: theta, t and l
DILATIONS = (8, 16)
STD, TAPS = 5.0, 31  # of the blur


def check_feedback(method: Method) -> None:
    """Raise ValueError unless the method has a last block whose attention can be corrected."""
    if not method.attends():
        able = ", ".join(name for name, card in METHODS.items() if card.load().attends())
        raise ValueError(
            f"post='resclip' corrects the attention of the last block, and that of {method.name!r} is not one sum of "
            f"attention; it goes with {able}"
        )


def fed_back(method: Method, patches: Tensor, agreement: Tensor, constants: Mapping[str, float]) -> Tensor:
    """Patch embeddings of the second pass [B, C, gh, gw], before normalization.

    Args:
        method: as `check_feedback` takes it.
        patches: of the windows, convolved, [B, d, gh, gw].
        agreement: M [B, N, N].
        constants: those of `DEFAULTS`.
    """
    method.tower.check_ready()
    t, share = constants["gain"], constants["agreement"]
    block = method.last_block(patches)
    size = block.v.shape[-1] ** -0.5

    def corrected(sweep: Sweep) -> Sweep:
        bias = t * share * agreement
        if sweep.bias is not None:
            bias = bias + attention_bias(sweep.bias, 0)
        return sweep._replace(scale=t * (1 - share) * (size if sweep.scale is None else sweep.scale), bias=bias)

    sweeps = [corrected(sweep) if sweep.last else sweep for sweep in block.sweeps]
    return method.embeddings(method.after(block._replace(sweeps=sweeps)), patches.shape[2:])


def agreement(labels: Tensor) -> Tensor:
    """M [B, N, N] float32 from the classes of patches [B, gh, gw]."""
    gh, gw = labels.shape[1:]
    place = torch.arange(gh * gw, device=labels.device)
    row, column = place // gw, place % gw
    down, right = row - row[:, None], column - column[:, None]  # from i to j
    far = torch.maximum(down.abs(), right.abs())
    steps, flat = max(gh, gw) - 1, labels.flatten(1)
    same = flat[:, :, None] == flat[:, None]
    clear = same.clone()
    for step in range(steps + 1):
        part = step / max(steps, 1)
        on_line = (row[:, None] + part * down).round().long() * gw + (column[:, None] + part * right).round().long()
        clear &= (flat[:, on_line.flatten()].unflatten(1, on_line.shape) == flat[:, :, None]) | (step > far)
    M = torch.where(clear, 1.0, (-far / max(steps, 1)).exp()) * same
    taps = min(TAPS, gh * gw - 1 + gh * gw % 2)
    offsets = torch.arange(taps, device=labels.device) - taps // 2
    blur = (-(offsets.float() / STD).square() / 2).exp()
    M = F.conv1d(M.flatten(0, 1)[:, None], (blur / blur.sum())[None, None], padding=taps // 2).view_as(M)
    M = M / (M.sum(dim=-1, keepdim=True) + 1e-8)
    return M / M.amax(dim=(1, 2), keepdim=True)


def patch_labels(
    ops: Backend, logits: Tensor, images: Tensor, patch: tuple[int, int], scale: float, confidence: float
) -> Tensor:
    """The name of each patch by the first pass, int64 [B, gh, gw].

    The logits [B, K, gh, gw] go to pixels, PAMR refines them along the windows [B, 3, height, width], and a pixel has
    the most probable name, or the first one below the `confidence`; a patch has that of most of its pixels, the first
    of equals.
    """
    (gh, gw), (height, width) = logits.shape[2:], patch
    images = images[:, :, : gh * height, : gw * width]  # what is beyond whole patches has no logits
    found = []
    for image, window in zip(images, logits, strict=True):
        pixels = F.interpolate(window[None], size=image.shape[1:], mode="bilinear", align_corners=False)
        refined = ops.pamr(image[None].to(computing_dtype(pixels)), pixels, dilations=DILATIONS)[0]
        best, label = (scale * refined).softmax(dim=0).max(dim=0)
        label = label.where(best >= confidence, 0)
        squares = label.unflatten(0, (gh, height)).unflatten(2, (gw, width)).transpose(1, 2).flatten(2)
        ones = torch.ones_like(squares, dtype=logits.dtype)
        counts = logits.new_zeros((gh, gw, len(window))).scatter_add_(2, squares, ones)
        found.append(counts.argmax(dim=-1))
    return torch.stack(found)
