"""The outcome for one picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from rfclip.segment.drawing import ALPHA, Colour, as_seen, class_colours, outlined, tinted, with_legend


@dataclass(frozen=True)
class Segmentation:
    """The outcome for one picture.

    Attributes:
        image: the picture, RGB, upright.
        labels: [H, W], uint8 (uint16 from 256 classes on): the index in `classes`, or `nothing`.
        classes: the first name of each class.
        probabilities: [C, H, W] float32, the largest among each class's names, if asked for, else None.
        colours: of the classes in pictures, if not those that go by their names.
    """

    image: Image.Image
    labels: np.ndarray
    classes: tuple[str, ...]
    probabilities: np.ndarray | None = None
    colours: tuple[Colour, ...] | None = None

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

    @property
    def palette(self) -> tuple[Colour, ...]:
        """The colour of each class, RGB; "background" is gray."""
        if self.colours is not None:
            return self.colours
        colours = class_colours(self.classes)
        return tuple(colours[name] for name in self.classes)

    def mask(self) -> Image.Image:
        """An indexed picture: pixel values are labels, colours those of the classes, and black for no class.

        Raises:
            ValueError: there are more classes than an indexed picture holds, 255.
        """
        if self.labels.dtype != np.uint8:
            raise ValueError(f"{len(self.classes)} classes: an indexed picture holds at most 255; use .labels")
        mask = Image.fromarray(self.labels)
        colours = (*self.palette, *[(0, 0, 0)] * (256 - len(self.classes)))
        mask.putpalette([channel for colour in colours for channel in colour])
        return mask

    def overlay(self, alpha: float = ALPHA, legend: bool = True, contours: bool = False) -> Image.Image:
        """The picture in gray, tinted by its labels.

        Args:
            alpha: opacity of the colours, from 0 to 1.
            legend: add one below: the classes present, largest first, in their colours as seen.
            contours: draw lines between the labels.
        """
        colours = dict(enumerate(self.palette))
        picture = tinted(self.image, self.labels, colours, alpha)
        if contours:
            picture = outlined(picture, self.labels)
        if not legend:
            return picture
        areas = self._areas()
        present = [int(index) for index in np.argsort(-areas, kind="stable") if areas[index]]
        rows = [(f"{self.classes[i]} {100 * areas[i] / self.labels.size:.0f} %", colours[i]) for i in present]
        return with_legend(picture, [(text, as_seen(colour, alpha)) for text, colour in rows])
