"""What the code that RF-CLIP's authors released computes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rfclip.config import RefocusConfig
from rfclip.methods.base import Method
from rfclip.ops.key_average import KeyAverage


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
        """O is linear, and so is A v in v: earlier blocks' SS(k) gather the mean of both v, O projects that of A v."""
        prefix, L = self.tower.prefix, len(self.tower.blocks)
        earlier = self.ops.key_average(layers=L - 1, similar=0, gathers=True, prefix=prefix)
        _, before, guide = self._run(patches, earlier)
        both = torch.cat([before, guide], dim=-1)  # [B, T, 2 d]
        aggregated = self.ops.cosine_aggregation(guide[:, prefix:], both[:, prefix:], 0.4)
        both = torch.cat([both[:, :prefix], aggregated], dim=1).unflatten(-1, (2, -1)).movedim(2, 0)
        last = self.tower.blocks[-1]
        k, v = last.key_value(last.ln_1(both.flatten(0, 1)))  # [2 B, H, T, D]
        gathered = self.ops.proxy_attention(k[None], v, prefix=prefix)
        v, gathered = (u.unflatten(0, both.shape[:2]).mean(dim=0) for u in (v, gathered))
        if L > 1:
            gathered = torch.lerp(earlier.gather(v), gathered, 1 / L)
        return last.project(gathered)

    def _run(self, patches: Tensor, earlier: KeyAverage | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """F[L], F[L-1], and the mean of F[1..L]; the keys of all blocks but the last are added to `earlier`."""
        grid, blocks = (patches.shape[2], patches.shape[3]), self.tower.blocks
        x = self.tower.embed(patches, self.ops)
        total = torch.zeros_like(x)
        for number, block in enumerate(blocks, 1):
            before = x
            q, k, v = block.query_key_value(x)
            if earlier is not None and number < len(blocks):
                earlier.add(k)
            x = torch.add(*block.finish(x, F.scaled_dot_product_attention(q, k, v), self.ops))
            x = self._denoised(x, grid)
            total += x
        return x, before, total / len(blocks)

    def _denoised(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """In place if no gradient is recorded."""
        prefix, inplace = self.tower.prefix, not x.requires_grad
        patches = x[:, prefix:]
        tau, _ = self.config.thresholds(patches.shape[2], patches.shape[1])
        mask = self.ops.distraction_mask(patches, self.config.distraction_dims, tau)
        blended = self.ops.blend_embeddings(patches, mask, grid, inplace=inplace)
        return x if inplace else torch.cat([x[:, :prefix], blended], dim=1)
