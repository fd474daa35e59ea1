"""Peers with a second stream: z = x[L-5] + what the last six blocks gather from the plain stream; no MLP sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rfclip.methods.base import QKV, LastBlock, Method, Sweep, own
from rfclip.methods.rule import Rule
from rfclip.ops.numerics import computing_dtype
from rfclip.towers import Block

BLOCKS = 6


class TwoStreams(Method):
    """The second stream; a subclass says how a block's heads attend."""

    crosses = True

    def last_block(self, patches: Tensor) -> LastBlock:
        last = len(self.tower.blocks)
        for number, (block, x, qkv) in enumerate(self.inputs(patches), 1):
            if number == last - BLOCKS + 1:
                z = x
            if number > last - BLOCKS:
                sweeps = self._sweeps(block, x, qkv)
                if number < last:
                    z = z + block.project(self.gather(sweeps, qkv[2]))
        return LastBlock(sweeps, qkv[2], lambda heads: z + block.project(heads))

    def _sweeps(self, block: Block, x: Tensor, qkv: QKV) -> list[Sweep]:
        """A block's attention, from its input x [B, T, d] and its q, k and v."""
        raise NotImplementedError


class CLIPSurgery(TwoStreams):
    """SS(v) v in each of the last six blocks."""

    def _sweeps(self, block: Block, x: Tensor, qkv: QKV) -> list[Sweep]:
        return [own(qkv[2])]


class GEM(TwoStreams):
    """The mean over u of q, k, v of softmax(theta u u^T) v, u normalized and smoothed once by its own attention.

    theta is the mean over tokens of |ln_1(x)| / sqrt(D), one number for each image and block. Smoothing: u becomes
    softmax(theta u u^T) u, normalized.
    """

    def _sweeps(self, block: Block, x: Tensor, qkv: QKV) -> list[Sweep]:
        y = block.ln_1(x)
        theta = y.to(computing_dtype(y)).norm(dim=-1).mean(dim=1) / qkv[2].shape[-1] ** 0.5
        sweeps = []
        for u in qkv:
            u = F.normalize(u, dim=-1)
            u = F.normalize(self.gather([own(u, scale=theta)], u), dim=-1)
            sweeps.append(own(u, 1 / 3, scale=theta))
        return sweeps


class FeatureSurgery(Rule):
    """CLIP Surgery's maps: what names have in common is removed, and each map stretched to [0, 1] over the patches.

    With g the image embedding, x_i the patches and t_c the K names,

        S[i, c] = w_c <x_i, t_c> - mean over c' of w_c' <x_i, t_c'>,  w_c = K softmax over c of 2 <g, t_c>

    For a single name that is 0, and S[i] = <x_i, t - t_empty> instead, t_empty being the embedding of an empty text.
    """

    image: ClassVar[Literal["picture", "window"] | None] = "picture"
    at_once: ClassVar[bool] = True

    def knows(self, text: Tensor, embed: Callable[[tuple[str, ...]], Tensor], background: Tensor) -> Tensor | None:
        """The embedding of the empty text [1, C] if there is one name."""
        return embed(("",)) if len(text) == 1 else None

    def window(self, patches: Tensor, image: Tensor | None, text: Tensor, known: Tensor | None) -> Tensor:
        assert image is not None
        if known is not None:
            return min_max(super().window(patches, image, text - known, None))
        weight = len(text) * (2 * image @ text.T).softmax(dim=-1)  # [B, K]
        weighted = weight[..., None, None] * super().window(patches, image, text, None)
        return min_max(weighted - weighted.mean(dim=1, keepdim=True))


class MinMax(Rule):
    """GEM's maps: that of each name is stretched to [0, 1] over the pixels of the resized picture."""

    def picture(self, logits: Tensor) -> Tensor:
        return min_max(logits)


def min_max(maps: Tensor) -> Tensor:
    """Maps [..., h, w], each less its minimum and over its range; 0 everywhere if it is constant [D], and NaN stays."""
    low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    return torch.where(high == low, 0, (maps - low) / (high - low))
