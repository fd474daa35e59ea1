"""SC-CLIP: outliers mended, and the last block guided by features of earlier blocks."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from rfclip.methods.base import Method, own
from rfclip.methods.cosines import cosines, positive_softmax
from rfclip.ops.numerics import computing_dtype, matmul
from rfclip.ops.reference import neighbour_sum
from rfclip.towers import Block


class SCCLIP(Method):
    """Outliers mended, and the last block's attention and input guided by features of earlier blocks; patches only.

    1. Outliers are the patches of F[L-1] whose LOF exceeds the 0.95 quantile: the mean of d_i / d_j over the 30 nearest
       other patches j, d being the squared distance to the 30th nearest. M replaces each by the mean of its inlier
       3 x 3 neighbours; a patch without any stays as it is.
    2. W1 are the cosines of M(F[9]) and W2 those of F[4]; S(W) is W without entries under 0.4, rows divided by their
       sums.
    3. P = softmax(3 (W1 - mean W1)) over what is not negative; A = (P + softmax(k k^T / sqrt(D)) over patches) / 2.
    4. G(x, c) = O(A v) + 0.3 c, with k and v of ln_1(x). With Y = F[4] + ... + F[10],
       z = S(W2) (G(S(W1) M(F[L-1]), CLS of F[L-1]) + G(Y, CLS of Y)).
    """

    cut_first: ClassVar[bool] = False  # whether the mean of W1 that P compares with is that of S's numerators

    def tokens(self, patches: Tensor) -> Tensor:
        grid, prefix, kept = tuple(patches.shape[2:]), self.tower.prefix, {}
        for number, (_, x, qkv) in enumerate(self.inputs(patches)):  # x is F[number]
            if number == 4:
                Y = x
            elif 4 < number <= 10:
                Y = Y + x
            if number in (4, 9):
                kept[number] = x[:, prefix:]
            if number == len(self.tower.blocks) - 2:
                q, k = qkv[:2]
        outliers = self._outliers(x[:, prefix:], q, k)
        W1 = cosines(_mend(kept[9], outliers, grid))
        W2 = _smoothing(cosines(kept[4]))
        compared = _cut(W1) if self.cut_first else W1
        P = positive_softmax(3 * (compared - compared.mean(dim=(1, 2), keepdim=True)))
        X = matmul(_smoothing(W1), _mend(x[:, prefix:], outliers, grid)).to(x.dtype)
        last = self.tower.blocks_on(grid)[-1]
        guided = self._guided(last, X, x[:, :1], P) + self._guided_sum(last, Y[:, prefix:], Y[:, :1], P)
        return matmul(W2, guided).to(x.dtype)

    def _outliers(self, x: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Step 1, bool [B, N], from the patches of F[L-1], and q and k of block L-1."""
        return _by_density(x)

    def _guided(self, last: Block, x: Tensor, cls: Tensor, P: Tensor) -> Tensor:
        """G of patches x [B, N, d] and a class token [B, 1, d], in the last block."""
        k, v = last.key_value(last.ln_1(x))
        heads = self.gather([own(k, 0.5)], v, prefix=0) + (matmul(P[:, None], v) / 2).to(v.dtype)
        return last.project(heads) + 0.3 * cls

    def _guided_sum(self, last: Block, x: Tensor, cls: Tensor, P: Tensor) -> Tensor:
        """G of the sum Y."""
        return self._guided(last, x, cls, P)


def _by_density(x: Tensor, neighbours: int = 30) -> Tensor:
    """Which of x [B, N, d] stand out by their LOF, bool [B, N]."""
    distances = torch.cdist(x.to(computing_dtype(x)), x.to(computing_dtype(x)))
    distances.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    nearest, which = distances.topk(torch.sym_min(neighbours, x.shape[1] - 1), largest=False)
    if not which.shape[2]:
        return torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    reach = nearest[..., -1].square()
    lof = (reach[..., None] / reach[:, None].expand(-1, x.shape[1], -1).gather(2, which)).mean(dim=-1)
    return lof > lof.quantile(0.95, dim=1, keepdim=True)


def _mend(x: Tensor, outliers: Tensor, grid: tuple[int, ...]) -> Tensor:
    """M on x [B, N, d]."""
    inliers = (~outliers)[..., None].to(computing_dtype(x))
    planes = torch.cat([x * inliers, inliers], dim=-1).mT.unflatten(-1, grid)
    sums = neighbour_sum(planes, 3).mT  # of the inlier neighbours, with their number in the last column
    count = sums[..., -1:]
    return torch.where(outliers[..., None] & (count > 0), (sums[..., :-1] / count).to(x.dtype), x)


def _cut(W: Tensor) -> Tensor:
    """Cosines [B, N, N] with 0 for those under 0.4."""
    return W.where(W >= 0.4, 0)


def _smoothing(W: Tensor) -> Tensor:
    """S: rows [B, N, N] without entries under 0.4, divided by their sums."""
    W = _cut(W)
    return W / (W.sum(dim=-1, keepdim=True) + 1e-6)
