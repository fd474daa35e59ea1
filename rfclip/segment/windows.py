"""How a picture is seen: resized, and through overlapping windows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from open_clip.constants import IMAGENET_MEAN, IMAGENET_STD
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from rfclip.methods import Protocol
from rfclip.methods.registry import Resizing
from rfclip.towers import Tower

Corner = tuple[int, int]  # top and left
LONG_SIDE = 2048  # of a resized picture at most, in evaluations, for a tower trained at 224, and scaled for others


@dataclass(frozen=True)
class Windows:
    """Square windows over a resized picture, or the picture as a whole; sides in pixels.

    Attributes:
        window, stride: side and spacing of the windows; window None: the picture is seen as a whole.
        short_side: of the resized picture.
        long_side: the longest the resized picture may be; None: any.
        patch: the patch size that windows are a multiple of.
        resizing, padding, imagenet: as in `rfclip.methods.Protocol`.

    Raises:
        ValueError: a side is out of range.
    """

    window: int | None
    stride: int
    short_side: int
    long_side: int | None
    patch: int
    resizing: Resizing = "antialiased"
    padding: int | None = None
    imagenet: bool = False

    def __post_init__(self) -> None:
        window = self.window
        if window is not None and (
            window < self.patch or window % self.patch or not 1 <= self.stride <= window <= self.short_side
        ):
            raise ValueError(
                f"window {window}, stride {self.stride}, short side {self.short_side}: expected a window that is "
                f"a multiple of the patch, {self.patch}, a stride of at most the window, and a short side of no less"
            )
        if self.short_side < self.patch:
            raise ValueError(f"short side {self.short_side}: expected at least a patch, {self.patch}")
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
        patch, trained = max(tower.patch_size), max(tower.image_size)
        if protocol.window is None and window is None:
            short = protocol.short_side * trained / 224
            whole = protocol.resizing in ("square", "crop", "patches")  # these can be of whole patches
            short_side = short_side or (round(short / patch) * patch if whole else round(short))
        else:
            usual = protocol.window or 224
            window = window or round(trained * usual / 224 / patch) * patch
            stride = stride or window * protocol.stride // usual
            short_side = short_side or window * protocol.short_side // usual
        if long_side is None and protocol.resizing == "mmcv":
            long_side = round(LONG_SIDE * trained / 224)
        padding = patch if protocol.padding == "patch" else protocol.padding
        resizing = protocol.resizing
        return cls(window, stride or patch, short_side, long_side, patch, resizing, padding, protocol.imagenet)

    def picture(self, rgb: Image.Image, tower: Tower) -> Tensor:
        """The picture resized and normalized for the tower, float32 [3, h, w] on its device."""
        top, left, height, width = self.seen(rgb.height, rgb.width)
        if (height, width) != rgb.size[::-1]:
            rgb = rgb.crop((left, top, left + width, top + height))
        return prepared(rgb, self.resized(height, width), tower, mmcv=self.resizing == "mmcv", imagenet=self.imagenet)

    def seen(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of the part of a picture that is seen."""
        if self.resizing != "crop":
            return 0, 0, height, width
        side = min(height, width)
        return (height - side) // 2, (width - side) // 2, side, side

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what is seen once resized."""
        if self.resizing in ("square", "crop"):
            return self.short_side, self.short_side
        scale = self.short_side / min(height, width)
        if self.long_side is not None:
            scale = min(scale, self.long_side / max(height, width))
            if self.resizing == "antialiased":
                scale = max(scale, (self.window or self.patch) / min(height, width))
            scale = max(scale, self.patch / min(height, width))
        if self.resizing == "patches":
            height, width = (max(1, math.floor(side * scale / self.patch + 0.5)) for side in (height, width))
            return height * self.patch, width * self.patch
        return math.floor(height * scale + 0.5), math.floor(width * scale + 0.5)

    def margins(self, height: int, width: int) -> tuple[int, int, int, int]:
        """How much a resized picture is padded with zeros: left, right, top and bottom, as `F.pad` takes it."""
        missing = [
            -side % self.padding if self.padding and (self.window is None or side < self.window) else 0
            for side in (width, height)
        ]
        return missing[0] // 2, missing[0] - missing[0] // 2, missing[1] // 2, missing[1] - missing[1] // 2

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the windows over a picture of this size."""
        return (height, width) if self.window is None else (min(self.window, height), min(self.window, width))

    def corners(self, height: int, width: int) -> list[Corner]:
        """The corner of every window."""
        return [(top, left) for top in self._starts(height) for left in self._starts(width)]

    def _starts(self, length: int) -> list[int]:
        """Where windows start along one axis: every stride, the last one flush with the border."""
        last = 0 if self.window is None else max(0, length - self.window)
        return [*range(0, last, self.stride), last]

    def images(self, x: Tensor, corners: list[Corner], tower: Tower) -> Tensor:
        """The windows of a picture [3, h, w] at these corners, [W, 3, height, width], normalized for the tower."""
        height, width = self.size(*x.shape[1:])
        cut = torch.stack([x[:, top : top + height, left : left + width] for top, left in corners])
        if not self.imagenet:
            return cut
        mean, std = (x.new_tensor(value)[:, None, None] for value in (IMAGENET_MEAN, IMAGENET_STD))
        return TF.normalize(cut * std + mean, list(tower.image_mean), list(tower.image_std))

    def patches(self, tower: Tower, x: Tensor, corners: list[Corner]) -> list[Tensor]:
        """Views [d, gh, gw] of each window's convolved patches, from the picture [3, h, w].

        Windows that are whole patches apart share one convolution of the smallest rectangle around them, unless that
        is larger than they are together, or a patch of the tower depends on more than its own pixels. The last window
        of a row or column, flush with the border, often lies between the others' patches. What a window has beyond
        whole patches is dropped.
        """
        patch_height, patch_width = tower.patch_size
        gh, gw = (side // patch for side, patch in zip(self.size(*x.shape[1:]), tower.patch_size, strict=True))
        height, width = gh * patch_height, gw * patch_width
        apart: dict[tuple[int, int], list[Corner]] = {}
        for top, left in corners:
            apart.setdefault((top % patch_height, left % patch_width), []).append((top, left))
        found = {}
        for group in apart.values():
            tops, lefts = zip(*group, strict=True)
            area = (max(tops) - min(tops) + height) * (max(lefts) - min(lefts) + width)
            shared = tower.local and area <= len(group) * height * width
            for part in [group] if shared else [[corner] for corner in group]:
                tops, lefts = zip(*part, strict=True)
                y, x0 = min(tops), min(lefts)
                patches = tower.patches(x[None, :, y : max(tops) + height, x0 : max(lefts) + width])[0]
                for top, left in part:
                    row, column = (top - y) // patch_height, (left - x0) // patch_width
                    found[top, left] = patches[:, row : row + gh, column : column + gw]
        return [found[corner] for corner in corners]

    def bytes_each(self, tower: Tower, size: tuple[int, int], names: int) -> int:
        """Roughly what a window of (height, width) adds to a batch.

        A block's matrices over heads, all keys, and the logits of its patches.
        """
        patches = (size[0] // self.patch) * (size[1] // self.patch)
        tokens = patches + tower.prefix
        attention = 7 * tower.blocks[0].heads * tokens**2
        stream = (2 * len(tower.blocks) + 16) * tokens * tower.width
        return 4 * (attention + stream + names * patches)


def prepared(
    rgb: Image.Image, size: tuple[int, int], tower: Tower, *, mmcv: bool = False, imagenet: bool = False
) -> Tensor:
    """A picture resized to (height, width) and normalized, float32 [3, height, width] on the tower's device.

    Args:
        rgb: the picture.
        size: bicubic with antialiasing.
        tower: whose statistics normalize it.
        mmcv: bilinear without antialiasing, as mmcv does it through OpenCV.
        imagenet: normalize by ImageNet's statistics in place of the tower's.
    """
    x = TF.pil_to_tensor(rgb).to(tower.weight.device)
    if mmcv:
        x = resized_as_opencv(x, size).float() / 255
    else:
        x = TF.to_dtype(x, torch.float32, scale=True)
        x = TF.resize(x, list(size), TF.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if imagenet else (tower.image_mean, tower.image_std)
    return TF.normalize(x, list(mean), list(std))


def resized_as_opencv(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resizing of uint8 [3, H, W] to [3, height, width] by OpenCV's arithmetic for INTER_LINEAR.

    Weights have 11 bits, and bits are dropped between and after columns and rows, so that a tenth of the values is one
    less than the rounded value.
    """
    (top, above, bottom, below), (left, before, right, after) = (
        _taps(old, new, x.device) for old, new in zip(x.shape[1:], size, strict=True)
    )
    x = x.int()
    across = (x[:, :, left] * before + x[:, :, right] * after) >> 4
    down = (across[:, top] * above[:, None] >> 16) + (across[:, bottom] * below[:, None] >> 16)
    return ((down + 2) >> 2).to(torch.uint8)


def _taps(old: int, new: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two source pixels of each resized one along an axis, each before its weight in 1 / 2048."""
    source = ((torch.arange(new, dtype=torch.float64) + 0.5) * (1 / (new / old)) - 0.5).float()
    low = source.floor().long()
    weight = ((source - low) * 2048).round().int()
    # Beyond the border both are the pixel there, with weights as if they were not, and a bit is dropped of each.
    parts = low.clamp(0, old - 1), 2048 - weight, (low + 1).clamp(0, old - 1), weight
    first, before, second, after = (part.to(device) for part in parts)
    return first, before, second, after
