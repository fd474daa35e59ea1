"""ITACLIP's attention: self-attention of four blocks in the last one."""

from __future__ import annotations

from torch import Tensor

from rfclip.methods.base import LastBlock, Method, own


class ITACLIP(Method):
    """z = x[L] + O(A v), A = A_L / 2 + (A_7 + A_8 + A_10) / 6, where A_l = SS(q[l]) + SS(k[l]); no MLP.

    The mean over views of the picture (gray, blurred, flipped) that its authors add, and the definitions by a language
    model, are not built here.
    """

    blocks = (7, 8, 10)

    crosses = True

    def last_block(self, patches: Tensor) -> LastBlock:
        x, (q, k, v), earlier = self.last_and(patches, self.blocks)
        share = 1 / (2 * len(earlier))
        sweeps = [own(q, 0.5), own(k, 0.5), *(own(u, share, last=False) for pair in earlier for u in pair)]
        return LastBlock(sweeps, v, lambda heads: x + self.tower.blocks[-1].project(heads))
