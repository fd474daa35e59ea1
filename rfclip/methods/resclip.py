"""ResCLIP: attention of the last block, and a residue of earlier ones. Its second pass is `rfclip.methods.feedback`."""

from __future__ import annotations

from torch import Tensor

from rfclip.methods.base import LastBlock, Method, Sweep, own
from rfclip.methods.peers import distance_bias


class ResidualCrossAttention(Method):
    """z = O(A v), A = 2 (0.7 softmax(k k^T / sqrt(D) + G) + 0.3 R), without residual and MLP; G as in NACLIP.

    R is the mean over blocks 6 to 9 of their ordinary attention softmax(q k^T / sqrt(D)). Its share is 0.3, as on VOC21
    [D], unless the protocol has one for the dataset. The factor 2 only matters beside O's bias.
    """

    blocks = range(6, 10)
    defaults = {"share": 0.3}  # noqa: RUF012  a mapping that nobody changes

    def last_block(self, patches: Tensor) -> LastBlock:
        _, (_, k, v), earlier = self.last_and(patches, self.blocks)
        share = self.constants["share"]
        sweeps = [own(k, 2 * (1 - share), bias=distance_bias(k, patches.shape[2:]))]
        sweeps += [Sweep(q, key, 2 * share / len(earlier), last=False) for q, key in earlier]
        return LastBlock(sweeps, v, self.tower.blocks[-1].project)
