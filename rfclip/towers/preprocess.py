"""From a picture to what an image tower takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from rfclip.images import ImageLike, to_rgb
from rfclip.towers.base import Tower


@dataclass(frozen=True)
class Preprocess:
    """Resizes and normalizes a picture for dense features: whole, neither cropped nor squeezed, sides of whole patches.

    Attributes:
        image_size: height and width that the tower was trained at, in pixels.
        patch_size: height and width of a patch.
        mean, std: of each colour, for values from 0 to 1.
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, tower: Tower) -> Preprocess:
        """That of a tower."""
        height, width = tower.image_size
        return cls((height, width), (tower.patch_size[0], tower.patch_size[1]), tower.image_mean, tower.image_std)

    def __call__(self, image: ImageLike, short_side: int | None = None) -> Tensor:
        """The picture for the tower, float32 [3, h, w] on the CPU; `rfclip.dense_features` takes a batch of such.

        Args:
            image: as `rfclip.images.to_rgb` takes it.
            short_side: of the result, in pixels, rounded to patches; None: as the tower was trained.

        Raises:
            ValueError: the short side is less than a patch, or as `to_rgb`.
        """
        return self.normalized(self.resized(to_rgb(image), short_side))

    def grid(self, rgb: Image.Image, short_side: int | None = None) -> tuple[int, int]:
        """The patch grid of a picture, its aspect kept to within a patch."""
        if short_side is not None and short_side < max(self.patch_size):
            raise ValueError(f"short_side={short_side}: expected at least a patch, {max(self.patch_size)} pixels")
        scale = (short_side or min(self.image_size)) / min(rgb.size)
        sides = zip(rgb.size[::-1], self.patch_size, strict=True)
        rows, columns = (max(1, round(side * scale / patch)) for side, patch in sides)
        return rows, columns

    def resized(self, rgb: Image.Image, short_side: int | None = None) -> Image.Image:
        """A picture at the size that the tower sees it."""
        rows, columns = self.grid(rgb, short_side)
        return rgb.resize((columns * self.patch_size[1], rows * self.patch_size[0]), Image.Resampling.BICUBIC)

    def normalized(self, rgb: Image.Image) -> Tensor:
        """Its colours as the tower was trained with, float32 [3, h, w]."""
        pixels = TF.to_dtype(TF.pil_to_tensor(rgb), torch.float32, scale=True)
        return TF.normalize(pixels, list(self.mean), list(self.std))
