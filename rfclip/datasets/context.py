"""Pascal Context with its background class (Context60) and without (Context59)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rfclip.datasets.base import FolderDataset, Pair, by_model, listed


@dataclass(frozen=True)
class Context60(FolderDataset):
    """Fifty-nine classes and background."""

    name, title, paper, background = "context60", "Context60", by_model(36.4, 36.7), True
    layout = (
        "VOCdevkit/VOC2010/JPEGImages/*.jpg",
        "VOCdevkit/VOC2010/SegmentationClassContext/*.png (`rfclip prepare context` makes them)",
        "VOCdevkit/VOC2010/ImageSets/SegmentationContext/val.txt (made by the same command)",
    )

    def find(self, root: Path) -> Iterable[Pair]:
        folder = root / "VOCdevkit/VOC2010"
        names = listed(folder / "ImageSets/SegmentationContext/val.txt")
        return [(folder / f"JPEGImages/{n}.jpg", folder / f"SegmentationClassContext/{n}.png") for n in names]


@dataclass(frozen=True)
class Context59(Context60):
    """The same pictures; pixels of the background do not count."""

    name, title, paper, background, zero_ignored = "context59", "Context59", by_model(39.8, 40.2), False, True
