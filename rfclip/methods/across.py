"""Attention across all windows of a picture in the last block: the CLIP-only core of GLA-CLIP.

Each vector u that the last block attends with by itself becomes one map for all heads and all patches of all windows:

    C = cos(u, u), heads joined;  E = 3 (C - 1.2 mean C), entries below min(their row's maximum, 0) left out
    gathered = softmax(E) v

The published configuration takes its features from a DINO beside CLIP; this is not that. Shares of several u and
attention of earlier blocks, which stays within each window, add up as they do without it [D]. With softmax's rows free
up to a constant, this is `cosine_aggregation` with a gain: nothing of the size of (windows x patches)^2 is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rfclip.methods.base import LastBlock, Method
from rfclip.methods.registry import METHODS
from rfclip.ops.numerics import computing_dtype

GAIN = 3.0
SHIFT = 1.2


def check_across(method: Method) -> None:
    """Raise ValueError unless the method's last block attends by vectors with themselves alone."""
    if not method.crosses:
        likely = ", ".join(name for name, card in METHODS.items() if card.blocks == 1 and card.load().crosses is True)
        raise ValueError(
            f"across_windows: the last block of {method.name!r} is no self-attention without a bias, as of {likely}"
        )


def across_windows(method: Method, windows: Sequence[Tensor]) -> Tensor:
    """Patch embeddings [W, C, gh, gw] of all windows of a picture, before normalization.

    Args:
        method: as `check_across` takes it.
        windows: their convolved patches, in batches [b, d, gh, gw] that go through the tower one after the other.
    """
    method.tower.check_ready()
    prefix = method.tower.prefix
    blocks = [method.last_block(batch) for batch in windows]
    v = torch.cat([_joined(block.v, prefix) for block in blocks])
    found = []
    for block, shared in zip(blocks, _shared(method, blocks, v), strict=True):
        own = [sweep for sweep in block.sweeps if not sweep.last]
        heads = shared + method.gather(own, block.v) if own else shared
        found.append(block.finish(heads.to(block.v.dtype))[:, prefix:])
    return method.embeddings(torch.cat(found), windows[0].shape[2:])


def _shared(method: Method, blocks: Sequence[LastBlock], v: Tensor) -> list[Tensor]:
    """What the heads of each batch gather from all windows, [b, H, T, D], 0 in the rows of the prefix."""
    prefix, total = method.tower.prefix, torch.zeros_like(v)  # [W, N, d]
    for place, sweep in enumerate(blocks[0].sweeps):
        if sweep.last:
            u = torch.cat([_joined(block.sweeps[place].q, prefix) for block in blocks]).flatten(0, 1)
            mean = F.normalize(u.to(computing_dtype(u)), dim=-1).mean(dim=0).square().sum()  # of C
            gathered = method.ops.cosine_aggregation(u[None], v.flatten(0, 1)[None], SHIFT * mean[None], gain=GAIN)
            total += sweep.factor * gathered[0].unflatten(0, v.shape[:2])
    parts = total.split([len(block.v) for block in blocks])
    return [
        F.pad(part.unflatten(-1, (block.v.shape[1], -1)).transpose(1, 2), (0, 0, prefix, 0))
        for part, block in zip(parts, blocks, strict=True)
    ]


def _joined(heads: Tensor, prefix: int) -> Tensor:
    """The patches of [b, H, T, D] with their heads side by side, [b, N, d]."""
    return heads[:, :, prefix:].transpose(1, 2).flatten(2)
