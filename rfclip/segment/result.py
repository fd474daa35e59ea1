"""The outcome for one picture, and how it is drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Segmentation:
    """The outcome for one picture.

    Attributes:
        image: the picture, RGB, upright.
        labels: [H, W], uint8 (uint16 from 256 classes on): the index in `classes`, or `nothing`.
        classes: the first name of each class.
        probabilities: [C, H, W] float32, the largest among each class's names, if asked for, else None.
    """

    image: Image.Image
    labels: np.ndarray
    classes: tuple[str, ...]
    probabilities: np.ndarray | None = None

    @property
    def nothing(self) -> int:
        """The label of pixels below the threshold: 255 (65535 where labels are uint16)."""
        return int(np.iinfo(self.labels.dtype).max)

    @property
    def shares(self) -> dict[str, float]:
        """The share of the picture that each class covers; pixels below the threshold belong to none."""
        return {name: float(n / self.labels.size) for name, n in zip(self.classes, self._areas(), strict=True)}

    def _areas(self) -> np.ndarray:
        """The pixels of each class, int [C]."""
        return np.bincount(self.labels.ravel(), minlength=len(self.classes))[: len(self.classes)]

    def mask(self) -> Image.Image:
        """An indexed picture: pixel values are labels, colours those of the overlay.

        Raises:
            ValueError: there are more classes than an indexed picture holds, 255.
        """
        if self.labels.dtype != np.uint8:
            raise ValueError(f"{len(self.classes)} classes: an indexed picture holds at most 255; use .labels")
        mask = Image.fromarray(self.labels)
        mask.putpalette([channel for colour in palette(255) for channel in colour] + [0, 0, 0])
        return mask

    def overlay(self, alpha: float = 0.55, legend: bool = True) -> Image.Image:
        """The picture tinted by its labels and, by default, a legend below: the classes present, largest first."""
        colours = palette(len(self.classes))
        table = np.zeros((self.nothing + 1, 3), np.uint8)
        table[: len(colours)] = colours
        blend = Image.blend(self.image, Image.fromarray(table[self.labels]), alpha)
        picture = Image.composite(blend, self.image, Image.fromarray(self.labels != self.nothing))
        if not legend:
            return picture
        areas = self._areas()
        present = [int(index) for index in np.argsort(-areas, kind="stable") if areas[index]]
        entries = [(f"{self.classes[i]} {100 * areas[i] / self.labels.size:.0f} %", colours[i]) for i in present]
        return _with_legend(picture, entries)


def palette(count: int) -> list[Colour]:
    """`count` colours, each as unlike the earlier ones as possible (Glasbey's method); they repeat after 256."""
    import colorcet  # slow to import

    def colour(index: int) -> Colour:
        red, green, blue = colorcet.glasbey_bw_minc_20_minl_30[index % 256]
        return round(255 * red), round(255 * green), round(255 * blue)

    return [colour(index) for index in range(count)]


def _with_legend(picture: Image.Image, entries: list[tuple[str, Colour]]) -> Image.Image:
    """The picture, on a canvas at least 240 pixels wide, above rows of colour swatches with their names."""
    size = max(12, min(picture.size) // 28)
    font = ImageFont.load_default(size)
    width, line = max(picture.width, 240), round(size * 1.7)
    rows, x, y = [], size // 2, size // 2
    for text, colour in entries:
        wide = round(font.getlength(text)) + 2 * size + size // 2
        if x + wide > width and x > size:
            x, y = size // 2, y + line
        rows.append((x, y, text, colour))
        x += wide
    canvas = Image.new("RGB", (width, picture.height + (y + line if entries else 0)), "white")
    canvas.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(canvas)
    for x, y, text, colour in rows:
        top = picture.height + y
        draw.rectangle((x, top, x + size, top + size), fill=colour, outline="black")
        draw.text((x + round(1.4 * size), top + size / 2), text, fill="black", font=font, anchor="lm")
    return canvas
