"""CLIPtrase: every patch attends by q, k and v, and regions of the picture vote."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from itertools import islice
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rfclip.extras import require
from rfclip.methods.base import LastBlock, Method, own
from rfclip.methods.rule import Rule
from rfclip.ops.numerics import computing_dtype, matmul


class CLIPtrase(Method):
    """u = x[L] + O((SS(q) + SS(k) + SS(v)) v), z = u + MLP(ln_2(u)): rows sum to 3, and the residual stays.

    `dense_and_image` takes the image embedding from the class token of the same z, which its protocol on VOC20 needs.
    """

    crosses = True

    def last_block(self, patches: Tensor) -> LastBlock:
        x, qkv = self.last(patches)
        return LastBlock([*map(own, qkv)], qkv[2], partial(self.finished, x))

    def dense_and_image(self, patches: Tensor, images: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.tower.check_ready()
        block = self.last_block(patches)
        z = block.finish(self.gather(block.sweeps, block.v))
        return self.embeddings(z[:, self.tower.prefix :], patches.shape[2:]), self.tower.readout(z[:, 0])


class Regions(Rule):
    """Every region of the picture becomes the class that most of its pixels have.

    With C the cosines of tokens in the last block but one, averaged over heads and over q, k and v, and
    E[i, j] = max(C[i, j] - C[CLS, j], 0) over patches, DBSCAN groups the rows of E by Euclidean distance. A group's
    mean row is a map: enlarged four times, smoothed by a median over 7 x 7 and enlarged to the pixels. A region is
    where one map is the largest. Without any group, labels stay as they are.

    DBSCAN's constants are the authors' on 14 x 14 and on 21 x 21 patches (0.7 and 3, 1.1 and 7). On N patches, their
    logarithms lie on the line through both, by log N [D].
    """

    at_once: ClassVar[bool] = True
    regional: ClassVar[bool] = True

    def __init__(self) -> None:
        require("the protocol of the method cliptrase", "evaluate", "scipy", "sklearn")

    def regions(self, method: Method, patches: Tensor, labels: Tensor) -> Tensor:
        from scipy.ndimage import median_filter
        from sklearn.cluster import DBSCAN

        E = _correlations(method, patches)
        groups = torch.from_numpy(DBSCAN(**dbscan_constants(len(E))).fit_predict(E.cpu().numpy()))
        count = int(groups.max()) + 1
        if not count:
            return labels
        maps = torch.stack([E[groups == group].mean(dim=0) for group in range(count)]).unflatten(1, patches.shape[2:])
        maps = F.interpolate(maps[None], scale_factor=4, mode="bilinear", align_corners=False)[0]
        maps = torch.from_numpy(median_filter(maps.cpu().numpy(), size=(1, 7, 7))).to(labels.device)
        numbers, size = torch.arange(count, device=labels.device), (labels.shape[0], labels.shape[1])
        region = method.ops.upsample_argmax(maps, size, 1.0, numbers, None).long()
        width = int(labels.max()) + 2  # pixels without a class, -1, vote as well
        votes = (region * width + labels + 1).flatten().bincount(minlength=count * width)
        return (votes.view(count, width).argmax(dim=1) - 1).to(labels.dtype)[region]


class RegionsByPicture(Regions):
    """The same, after the logits of each name, 100 times a cosine, are multiplied by those of the picture as a whole.

    They are returned divided by 100, the factor that precedes the softmax.
    """

    image: ClassVar[Literal["picture", "window"] | None] = "picture"

    def window(self, patches: Tensor, image: Tensor | None, text: Tensor, known: Tensor | None) -> Tensor:
        assert image is not None
        return super().window(patches, image, text, known) * (100 * image @ text.T)[..., None, None]


def dbscan_constants(patches: int) -> Mapping[str, float]:
    """eps and min_samples for a picture of so many patches."""
    between = math.log(patches / 14**2) / math.log(21**2 / 14**2)
    return {"eps": 0.7 * (1.1 / 0.7) ** between, "min_samples": max(2, round(3 * (7 / 3) ** between))}


def _correlations(method: Method, patches: Tensor) -> Tensor:
    """E [N, N] in the computing dtype, of the only picture in patches [1, d, gh, gw].

    A sum over heads of products is one product of heads laid side by side. A tower of one block has no last but one,
    and takes that one [D].
    """
    _, _, qkv = next(islice(method.inputs(patches), max(0, len(method.tower.blocks) - 2), None))
    unit = torch.cat([F.normalize(u[0].to(computing_dtype(u)), dim=-1) for u in qkv])  # [3 H, T, D]
    tokens, prefix = unit.transpose(0, 1).flatten(1), method.tower.prefix
    C = matmul(tokens, tokens.mT) / len(unit)
    return (C[prefix:, prefix:] - C[:1, prefix:]).clamp(min=0)
