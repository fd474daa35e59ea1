"""What the code that RF-CLIP's authors released computes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rfclip.config import RefocusConfig
from rfclip.methods.base import Method
from rfclip.methods.cosines import cosines
from rfclip.ops.numerics import matmul


class Released(Method):
    """What the code that RF-CLIP's authors released computes by default, where it departs from the paper.

    Patches with a weight over tau / d in D_dis become 0.6 x + 0.4 times the mean of their 3 x 3 square, zeros beyond
    the border, after every block. With g the mean of F[1..L] and W the cosines of its patches, without entries under
    0.4, the last block's k and v are those of F[L-1] and of g, patches multiplied by W: z is the mean over both of
    O(A v), A the mean over blocks of SS(k) without the rows and columns of the prefix. Of the config, only D_dis and
    tau are read.
    """

    config: RefocusConfig

    def stream(self, patches: Tensor) -> Tensor:
        x, *_ = self._run(patches)
        return x

    def tokens(self, patches: Tensor) -> Tensor:
        _, before, guide, keys = self._run(patches)
        prefix, last, terms = self.tower.prefix, self.tower.blocks[-1], []
        W = cosines(guide[:, prefix:])
        W = W.where(W >= 0.4, 0)
        for x in (before, guide):
            aggregated = torch.cat([x[:, :prefix], matmul(W, x[:, prefix:]).to(x.dtype)], dim=1)
            _, keys[-1], v = last.query_key_value(aggregated)
            terms.append(last.project(self.ops.proxy_attention(keys, v, prefix=prefix)))
        return (terms[0] + terms[1]) / 2

    def _run(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """F[L], F[L-1], the mean of F[1..L], and the blocks' keys [L, B, H, T, D]."""
        grid, blocks, keys = patches.shape[2:], self.tower.blocks, []
        x = self.tower.embed(patches)
        total = torch.zeros_like(x)
        for block in blocks:
            before = x
            q, k, v = block.query_key_value(x)
            keys.append(k)
            x = torch.add(*block.finish(x, F.scaled_dot_product_attention(q, k, v), self.ops))
            x = self._denoised(x, grid)
            total = total + x
        return x, before, total / len(blocks), torch.stack(keys)

    def _denoised(self, x: Tensor, grid: torch.Size) -> Tensor:
        prefix = self.tower.prefix
        patches = x[:, prefix:]
        tau, _ = self.config.thresholds(patches.shape[2], patches.shape[1])
        mask = self.ops.distraction_mask(patches, self.config.distraction_dims, tau)
        means = F.avg_pool2d(patches.mT.unflatten(-1, grid), 3, stride=1, padding=1).flatten(2).mT
        repaired = torch.where(mask[..., None], 0.6 * patches + 0.4 * means, patches)
        return torch.cat([x[:, :prefix], repaired], dim=1)
