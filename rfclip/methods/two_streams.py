"""Peers with a second stream: z = x[L-5] + what the last six blocks gather from the plain stream; no MLP sees it."""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from rfclip.methods.base import QKV, Method
from rfclip.ops.numerics import computing_dtype
from rfclip.towers import Block

BLOCKS = 6


class TwoStreams(Method):
    """The second stream; a subclass says what a block's heads gather."""

    def tokens(self, patches: Tensor) -> Tensor:
        first = len(self.tower.blocks) - BLOCKS
        for number, (block, x, qkv) in enumerate(self.inputs(patches)):
            if number == first:
                z = x
            if number >= first:
                z = z + block.project(self._gather(block, x, qkv))
        return z[:, self.tower.prefix :]

    def _gather(self, block: Block, x: Tensor, qkv: QKV) -> Tensor:
        """What a block's heads gather, [B, H, T, D], from its input x [B, T, d] and its q, k and v."""
        raise NotImplementedError


class CLIPSurgery(TwoStreams):
    """SS(v) v in each of the last six blocks; its surgery on the logits of all classes is left out."""

    def _gather(self, block: Block, x: Tensor, qkv: QKV) -> Tensor:
        return self.ops.self_attention(qkv[2], qkv[2], prefix=self.tower.prefix)


class GEM(TwoStreams):
    """The mean over u of q, k, v of softmax(theta u u^T) v, u normalized and smoothed once by its own attention.

    theta is the mean over tokens of |ln_1(x)| / sqrt(D), one number for each image and block. Smoothing: u becomes
    softmax(theta u u^T) u, normalized.
    """

    def _gather(self, block: Block, x: Tensor, qkv: QKV) -> Tensor:
        y, v, prefix = block.ln_1(x), qkv[2], self.tower.prefix
        theta = y.to(computing_dtype(y)).norm(dim=-1).mean(dim=1) / v.shape[-1] ** 0.5
        root = theta.sqrt()[:, None, None, None].to(v.dtype)  # per image, while the operation has one scale for all
        gathered = []
        for u in qkv:
            u = F.normalize(u, dim=-1)
            u = F.normalize(self.ops.self_attention(root * u, u, scale=1.0, prefix=prefix), dim=-1)
            gathered.append(self.ops.self_attention(root * u, v, scale=1.0, prefix=prefix))
        return reduce(torch.add, gathered) / 3
