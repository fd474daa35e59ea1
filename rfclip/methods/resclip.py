"""ResCLIP without its feedback pass: the last block's attention, and a residue of earlier blocks'."""

from __future__ import annotations

from torch import Tensor

from rfclip.methods.base import Method, Sweep, own
from rfclip.methods.peers import distance_bias


class ResidualCrossAttention(Method):
    """z = O(A v), A = 2 (0.7 softmax(k k^T / sqrt(D) + G) + 0.3 R), without residual and MLP; G as in NACLIP.

    R is the mean over blocks 6 to 9 of their ordinary attention softmax(q k^T / sqrt(D)). Its share is 0.3, as on VOC21
    [D]; in the authors' code it is tuned for each dataset, 0.2 to 0.6. The factor 2 only matters beside O's bias.
    """

    blocks = range(6, 10)
    share = 0.3

    def tokens(self, patches: Tensor) -> Tensor:
        _, (_, k, v), earlier = self.last_and(patches, self.blocks)
        residue = 2 * self.share / len(earlier)
        sweeps = [own(k, 2 * (1 - self.share), distance_bias(k, patches.shape[2:]))]
        sweeps += [Sweep(q, key, residue) for q, key in earlier]
        return self.tower.blocks[-1].project(self.gather(sweeps, v))[:, self.tower.prefix :]
