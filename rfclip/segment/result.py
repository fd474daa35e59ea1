"""The outcome for one picture."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from rfclip.extras import require
from rfclip.files import OUTPUTS, write_whole
from rfclip.segment.drawing import ALPHA, Colour, as_seen, class_colours, outlined, tinted, with_legend

if TYPE_CHECKING:
    import supervision


@dataclass(frozen=True, eq=False, repr=False)
class Segmentation:
    """The outcome for one picture. `result["dog"]` is a class's mask, and iterating gives the names of the classes.

    Two outcomes are equal if their pictures, labels and classes are. In a notebook, the overlay is shown.

    Attributes:
        image: the picture, RGB, upright.
        labels: [H, W], uint8 (uint16 from 256 classes on): the index in `classes`, or `nothing`.
        classes: the first name of each class.
        probabilities: [C, H, W] float32, the largest among each class's names, if asked for, else None.
        confidence: [C], the mean probability of each class over the pixels that have its label, NaN where there are
            none; None if it was not asked for.
        colours: of the classes in pictures, if not those that go by their names.
    """

    image: Image.Image
    labels: np.ndarray
    classes: tuple[str, ...]
    probabilities: np.ndarray | None = None
    confidence: np.ndarray | None = None
    colours: tuple[Colour, ...] | None = None

    def __getitem__(self, name: str) -> np.ndarray:
        """The mask of a class, bool [H, W].

        Raises:
            KeyError: there is no such class.
        """
        return np.isin(self.labels, self._numbers(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.classes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Segmentation):
            return NotImplemented
        same = self.classes == other.classes and np.array_equal(self.labels, other.labels)
        return same and self.image.tobytes() == other.image.tobytes()

    def __repr__(self) -> str:
        shares = sorted(self.shares.items(), key=lambda share: -share[1])
        parts = [f"{name} {100 * share:.1f} %" for name, share in shares if share]
        if len(parts) > 5:
            parts[5:] = [f"{len(parts) - 5} more"]
        return f"<Segmentation of {self.image.width} x {self.image.height} pixels: {', '.join(parts) or 'nothing'}>"

    def _repr_png_(self) -> bytes:
        data = io.BytesIO()
        self.overlay().save(data, format="PNG")
        return data.getvalue()

    def _numbers(self, name: str) -> list[int]:
        """The indices of a class; a list of the field's may have two of the same name."""
        numbers = [index for index, each in enumerate(self.classes) if each == name]
        if not numbers:
            close = get_close_matches(str(name), self.classes, n=1)
            instead = f"did you mean {close[0]!r}?" if close else f"the classes are {', '.join(self.classes)}"
            raise KeyError(f"there is no class {name!r}; {instead}")
        return numbers

    @property
    def present(self) -> list[int]:
        """The indices of the classes that have pixels."""
        return np.flatnonzero(self._areas()).tolist()

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

    def save(self, stem: str | os.PathLike[str]) -> list[Path]:
        """Write what `rfclip segment` writes: STEM.mask.png, STEM.overlay.png and STEM.json. Existing files go.

        For one of them, `result.overlay().save("overlay.jpg")` takes any format of Pillow's.

        Returns:
            The three paths.

        Raises:
            ValueError: there are more classes than an indexed picture holds, 255.
            OSError: a file cannot be written.
        """
        paths = {Path(f"{os.fspath(stem)}{output}"): write for output, write in writers(self).items()}
        write_whole(paths)
        return list(paths)

    def record(self) -> dict[str, Any]:
        """What the JSON file says of the picture and its classes."""
        shares = (self._areas() / self.labels.size).tolist()
        sure = np.full(len(shares), np.nan) if self.confidence is None else self.confidence
        classes = [
            {"index": index, "name": name, "share": share, "confidence": None if np.isnan(mean) else float(mean)}
            for index, (name, share, mean) in enumerate(zip(self.classes, shares, sure, strict=True))
        ]
        width, height = self.image.size
        return {"width": width, "height": height, "classes": classes, "nothing": self.nothing}

    def polygons(self) -> dict[str, list[list[np.ndarray]]]:
        """The outlines of each class.

        Returns:
            For each class its polygons, none if it has no pixels, each a list of rings: the outer one, then those of
            its holes. A ring is [N, 2] float64, x and y in pixels from the picture's upper left corner, and closes from
            the last point to the first. Outlines run half-way between pixels: the centre of a pixel is inside if it has
            the label.
        """
        return {name: _rings(self[name]) for name in self.classes}

    def coco(self, image_id: int = 0) -> list[dict[str, Any]]:
        """COCO's annotations, one per class that has pixels.

        In a dataset's file each needs an "id" as well; for `COCO.loadRes` leave out "bbox", from which it takes areas.
        Each has "image_id", "category_id" (the index in `classes`), "segmentation" (run lengths of columns, compressed
        by pycocotools), "bbox" (left, top, width and height), "area" in pixels, "iscrowd" and, if known, "score".

        Raises:
            ValueError: pycocotools is not installed.
        """
        require("coco()", "results", "pycocotools")
        from pycocotools import mask

        found = []
        for index in self.present:
            runs = mask.encode(np.asfortranarray(self.labels == index).view(np.uint8))
            one = {
                "image_id": image_id,
                "category_id": index,
                "segmentation": {"size": list(runs["size"]), "counts": runs["counts"].decode()},
                "area": int(mask.area(runs)),
                "bbox": mask.toBbox(runs).tolist(),
                "iscrowd": 0,
            }
            found.append(one if self.confidence is None else one | {"score": float(self.confidence[index])})
        return found

    def to_supervision(self) -> supervision.Detections:
        """`supervision.Detections`, one per class that has pixels, with masks and, in `data`, "class_name".

        Raises:
            ValueError: supervision is not installed.
        """
        require("to_supervision()", "results", "supervision")
        import supervision

        masks = np.stack([self.labels == index for index in self.present]) if self.present else None
        if masks is None:
            return supervision.Detections.empty()
        return supervision.Detections(
            xyxy=supervision.mask_to_xyxy(masks),
            mask=masks,
            class_id=np.array(self.present),
            confidence=None if self.confidence is None else self.confidence[self.present],
            data={"class_name": np.array([self.classes[index] for index in self.present])},
        )

    def to_transformers(self) -> list[dict[str, Any]]:
        """What the image-segmentation pipeline of transformers returns: one dict per class that has pixels.

        Each has "label", "mask" (a Pillow image, 255 where the class is, else 0) and "score" (its confidence, or None).
        """
        sure = self.confidence
        return [
            {
                "label": self.classes[index],
                "mask": Image.fromarray((self.labels == index).astype(np.uint8) * 255),
                "score": None if sure is None else float(sure[index]),
            }
            for index in self.present
        ]

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


def writers(found: Segmentation, record: Mapping[str, Any] | None = None) -> dict[str, Callable[[Path], Any]]:
    """For each of `OUTPUTS`, a function that writes it to a path.

    Args:
        found: the outcome.
        record: what else the JSON file says, with further facts on each class under "classes".
    """
    of_picture, record = found.record(), record or {}
    more = record.get("classes", [{}] * len(found.classes))
    classes = [known | entry for entry, known in zip(of_picture.pop("classes"), more, strict=True)]
    text = json.dumps({**record, **of_picture, "classes": classes}, indent=2, ensure_ascii=False) + "\n"
    mask, overlay, written = OUTPUTS
    return {
        mask: lambda path: found.mask().save(path, format="PNG"),
        overlay: lambda path: found.overlay().save(path, format="PNG"),
        written: partial(Path.write_text, data=text, encoding="utf-8"),
    }


def _rings(mask: np.ndarray) -> list[list[np.ndarray]]:
    """The polygons of a mask [H, W], as `Segmentation.polygons` has them."""
    from contourpy import FillType, contour_generator

    padded = np.pad(mask, 1).astype(np.float32)
    contours = contour_generator(z=padded, fill_type=FillType.OuterOffset).filled(0.5, 2)
    found = []
    for points, offsets in zip(*contours, strict=True):
        rings = [points[start : stop - 1] - 0.5 for start, stop in zip(offsets[:-1], offsets[1:], strict=True)]
        found.append([_without_straight(ring) for ring in rings])
    return found


def _without_straight(ring: np.ndarray) -> np.ndarray:
    """A ring without the points at which it goes straight on."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    return ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]
