"""ITACLIP's attention: self-attention of four blocks in the last one; and the mean over views of the picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from rfclip.methods.base import LastBlock, Method, own
from rfclip.methods.peers import AreaRule
from rfclip.methods.rule import Rule
from rfclip.ops.numerics import computing_dtype

TAPS, STD = 11, 5.0  # of the blur


class ITACLIP(Method):
    """z = x[L] + O(A v), A = A_L / 2 + (A_7 + A_8 + A_10) / 6, where A_l = SS(q[l]) + SS(k[l]); no MLP.

    `ITACLIPViews` adds its authors' mean over views of the picture. Their definitions by a language model are not built
    here.
    """

    crosses = True

    def last_block(self, patches: Tensor) -> LastBlock:
        return _last_block(self, patches)


class ITACLIPViews(Method):
    """The same, averaged over five views of the picture: c f + (1 - c) g, which is not normalized again.

    f is the mean of the normalized patch embeddings of the picture, of its gray version and of a blurred one (11 taps,
    or as many as reflection allows [D], of standard deviation 5), and g that of the picture upside down and of its
    mirror image, turned back. All are made from the normalized picture, without what is beyond whole patches [D]. c is
    0.75, and 0.7 on VOC21 and Cityscapes.
    """

    defaults: ClassVar[Mapping[str, float]] = {"upright": 0.75}

    def tokens(self, patches: Tensor) -> Tensor:
        return self.after(_last_block(self, patches))

    def dense(self, patches: Tensor, images: Tensor | None = None) -> Tensor:
        if images is None:
            raise ValueError("images=None: ITACLIP's views are made from the pictures, not from their patches")
        tower = self.tower
        height, width = (n * side for n, side in zip(patches.shape[2:], tower.patch_size, strict=True))
        images = images[..., :height, :width]
        taps = [min(TAPS, 2 * side - 1) for side in (width, height)]
        gray, blurred = TF.rgb_to_grayscale(images, 3), TF.gaussian_blur(images, taps, [STD, STD])
        f = self._seen(patches) + self._seen(tower.patches(gray)) + self._seen(tower.patches(blurred))
        g = sum(self._seen(tower.patches(images.flip(axis))).flip(axis) for axis in (2, 3))
        c = self.constants["upright"]
        return (c / 3 * f + (1 - c) / 2 * g).to(patches.dtype)

    def _seen(self, patches: Tensor) -> Tensor:
        """The normalized embeddings of one view, one view at a time so that a batch takes no more memory."""
        found = super().dense(patches)
        return F.normalize(found.to(computing_dtype(found)), dim=1)


class MeanOfViews(Rule):
    """Cosines with each view are averaged, by taking the mean of their embeddings as it is."""

    def check(self, method: Method) -> None:
        if not isinstance(method, ITACLIPViews):
            raise ValueError(
                f"the protocol of itaclip-views needs the views of that method, and the method is {method.name!r}: "
                "choose method 'itaclip-views', or protocol 'itaclip'"
            )

    def look(self, method: Method, patches: Tensor, images: Tensor | None) -> Tensor:
        return method.dense(patches, images).float()


class MeanOfViewsByArea(MeanOfViews, AreaRule):
    """The same, and small classes are removed: ITACLIP on VOC21."""


def _last_block(method: Method, patches: Tensor) -> LastBlock:
    x, (q, k, v), earlier = method.last_and(patches, (7, 8, 10))
    share = 1 / (2 * len(earlier))
    sweeps = [own(q, 0.5), own(k, 0.5), *(own(u, share, last=False) for pair in earlier for u in pair)]
    return LastBlock(sweeps, v, lambda heads: x + method.tower.blocks[-1].project(heads))
