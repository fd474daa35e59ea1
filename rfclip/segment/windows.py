"""How a picture is seen: resized, and through overlapping windows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from rfclip.methods import Protocol
from rfclip.towers import Tower

Corner = tuple[int, int]  # top and left


@dataclass(frozen=True)
class Windows:
    """Square windows over a resized picture; sides in pixels.

    Attributes:
        window, stride: side and spacing of the windows.
        short_side: of the resized picture.
        long_side: the longest the resized picture may be, its short side being no less than a window; None: any.
        patch: the patch size that windows are a multiple of.

    Raises:
        ValueError: a side is out of range.
    """

    window: int
    stride: int
    short_side: int
    long_side: int | None
    patch: int

    def __post_init__(self) -> None:
        if (
            self.window < self.patch
            or self.window % self.patch
            or not 1 <= self.stride <= self.window <= self.short_side
        ):
            raise ValueError(
                f"window {self.window}, stride {self.stride}, short side {self.short_side}: expected a window that is "
                f"a multiple of the patch, {self.patch}, a stride of at most the window, and a short side of no less"
            )
        if self.long_side is not None and self.long_side < 1:
            raise ValueError(f"long_side={self.long_side}: expected at least 1, or None")

    @classmethod
    def by_protocol(
        cls,
        protocol: Protocol,
        tower: Tower,
        window: int | None = None,
        stride: int | None = None,
        short_side: int | None = None,
        long_side: int | None = None,
    ) -> Windows:
        """A protocol's windows, scaled to the size that the tower was trained at, unless a side is given."""
        patch = max(tower.patch_size)
        window = window or round(max(tower.image_size) * protocol.window / 224 / patch) * patch
        stride = stride or window * protocol.stride // protocol.window
        short_side = short_side or window * protocol.short_side // protocol.window
        return cls(window, stride, short_side, long_side, patch)

    def picture(self, rgb: Image.Image, tower: Tower) -> Tensor:
        """The picture resized and normalized for the tower, float32 [3, h, w] on its device."""
        return prepared(rgb, self.resized(rgb.height, rgb.width), tower)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width with the short side as set, or less if the long one would be too long, aspect kept."""
        scale = self.short_side / min(height, width)
        if self.long_side is not None:
            scale = max(min(scale, self.long_side / max(height, width)), self.window / min(height, width))
        return math.floor(height * scale + 0.5), math.floor(width * scale + 0.5)

    def corners(self, height: int, width: int) -> list[Corner]:
        """The corner of every window."""
        return [(top, left) for top in self._starts(height) for left in self._starts(width)]

    def _starts(self, length: int) -> list[int]:
        """Where windows start along one axis: every stride, the last one flush with the border."""
        last = length - self.window
        return [*range(0, last, self.stride), last]

    def cut(self, x: Tensor, corners: list[Corner]) -> Tensor:
        """The windows of a picture [3, h, w] at these corners, [W, 3, window, window]."""
        return torch.stack([x[:, top : top + self.window, left : left + self.window] for top, left in corners])

    def patches(self, tower: Tower, x: Tensor, corners: list[Corner]) -> list[Tensor]:
        """Views [d, gh, gw] of each window's convolved patches, from the picture [3, h, w].

        Windows that are whole patches apart share one convolution of the smallest rectangle around them, unless that
        is larger than they are together. The last window of a row or column, flush with the border, often lies between
        the others' patches.
        """
        side, (patch_height, patch_width) = self.window, tower.patch_size
        apart: dict[tuple[int, int], list[Corner]] = {}
        for top, left in corners:
            apart.setdefault((top % patch_height, left % patch_width), []).append((top, left))
        found = {}
        for group in apart.values():
            tops, lefts = zip(*group, strict=True)
            area = (max(tops) - min(tops) + side) * (max(lefts) - min(lefts) + side)
            for part in [group] if area <= len(group) * side**2 else [[corner] for corner in group]:
                tops, lefts = zip(*part, strict=True)
                y, x0 = min(tops), min(lefts)
                patches = tower.patches(x[None, :, y : max(tops) + side, x0 : max(lefts) + side])[0]
                for top, left in part:
                    row, column = (top - y) // patch_height, (left - x0) // patch_width
                    window = patches[:, row : row + side // patch_height, column : column + side // patch_width]
                    found[top, left] = window
        return [found[corner] for corner in corners]

    def bytes_each(self, tower: Tower, names: int) -> int:
        """Roughly what a window adds to a batch: a block's matrices over heads, all keys, and logits of its patches."""
        tokens = (self.window // self.patch) ** 2 + tower.prefix
        attention = 7 * tower.blocks[0].heads * tokens**2
        stream = (2 * len(tower.blocks) + 16) * tokens * tower.width
        return 4 * (attention + stream + names * (tokens - tower.prefix))


def prepared(rgb: Image.Image, size: tuple[int, int], tower: Tower) -> Tensor:
    """A picture resized to (height, width) and normalized for a tower, float32 [3, height, width] on its device."""
    x = TF.to_dtype(TF.pil_to_tensor(rgb).to(tower.weight.device), torch.float32, scale=True)
    x = TF.resize(x, list(size), TF.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    return TF.normalize(x, list(tower.image_mean), list(tower.image_std))
