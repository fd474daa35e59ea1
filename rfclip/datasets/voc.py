"""Pascal VOC 2012 with its background class (VOC21) and without (VOC20)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rfclip.datasets.base import FolderDataset, Pair, by_model, listed, present


@dataclass(frozen=True)
class VOC21(FolderDataset):
    """Twenty classes and background.

    Each picture's labels are those of SegmentationClass, the challenge's own, or else of SegmentationClassAug.
    """

    name, title, paper, background = "voc21", "VOC21", by_model(64.8, 65.8), True
    layout = (
        "VOCdevkit/VOC2012/JPEGImages/*.jpg",
        "VOCdevkit/VOC2012/SegmentationClass/*.png (or SegmentationClassAug/*.png)",
        "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt",
    )

    def find(self, root: Path) -> Iterable[Pair]:
        folder = root / "VOCdevkit/VOC2012"
        kinds = [folder / "SegmentationClass", folder / "SegmentationClassAug"]
        kinds = [kind for kind in kinds if kind.is_dir()] or kinds
        names = listed(folder / "ImageSets/Segmentation/val.txt")
        return [(folder / f"JPEGImages/{n}.jpg", present(*(kind / f"{n}.png" for kind in kinds))) for n in names]


@dataclass(frozen=True)
class VOC20(VOC21):
    """The same pictures; pixels of the background do not count."""

    name, title, paper, background, zero_ignored = "voc20", "VOC20", by_model(87.0, 89.1), False, True
