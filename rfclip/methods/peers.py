"""Peers whose whole difference is the last block's attention."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from rfclip.methods.base import Method
from rfclip.ops.numerics import computing_dtype


class MaskCLIP(Method):
    """z = O(v): every patch attends to itself; no residual, no MLP [D, as in ClearCLIP's code]."""

    def tokens(self, patches: Tensor) -> Tensor:
        _, (_, _, v) = self.last(patches)
        return self.tower.blocks[-1].project(v)[:, self.tower.prefix :]


class SCLIP(Method):
    """u = x[L] + O((SS(q) + SS(k)) v), z = u + MLP(ln_2(u)): rows sum to 2, and the residual stays."""

    def tokens(self, patches: Tensor) -> Tensor:
        x, (q, k, v) = self.last(patches)
        prefix = self.tower.prefix
        gathered = self.ops.self_attention(q, v, prefix=prefix) + self.ops.self_attention(k, v, prefix=prefix)
        return self.finished(x, gathered)[:, prefix:]


class ClearCLIP(Method):
    """z = O(SS(q) v), without residual and MLP."""

    def tokens(self, patches: Tensor) -> Tensor:
        _, (q, _, v) = self.last(patches)
        prefix = self.tower.prefix
        return self.tower.blocks[-1].project(self.ops.self_attention(q, v, prefix=prefix))[:, prefix:]


class NACLIP(Method):
    """z = O(softmax(k k^T / sqrt(D) + G) v), G[i, j] = exp(-|i - j|^2 / (2 * 5^2)) by distance on the patch grid."""

    def tokens(self, patches: Tensor) -> Tensor:
        _, (_, k, v) = self.last(patches)
        down, right = (
            torch.arange(1 - side, side, dtype=computing_dtype(k), device=k.device) for side in patches.shape[2:]
        )
        bias = torch.exp(-(down[:, None].square() + right.square()) / (2 * 5**2))
        prefix = self.tower.prefix
        return self.tower.blocks[-1].project(self.ops.self_attention(k, v, bias, prefix=prefix))[:, prefix:]


class CLIPtrase(Method):
    """u = x[L] + O((SS(q) + SS(k) + SS(v)) v), z = u + MLP(ln_2(u)); its clustering of the picture is left out."""

    def tokens(self, patches: Tensor) -> Tensor:
        x, qkv = self.last(patches)
        prefix, v = self.tower.prefix, qkv[2]
        gathered = reduce(torch.add, (self.ops.self_attention(u, v, prefix=prefix) for u in qkv))
        return self.finished(x, gathered)[:, prefix:]
