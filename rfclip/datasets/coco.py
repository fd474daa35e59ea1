"""COCO's 80 things with a background (COCO-Object), and its things and stuff (COCO-Stuff)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rfclip.datasets.base import FolderDataset, Pair, beside, by_model, present


@dataclass(frozen=True)
class COCOObject(FolderDataset):
    """Eighty things and background.

    "bed" names the background and a class of its own, as in the field's list. Both have the same score, and of equals
    the first wins: no pixel is ever found to be a bed (unless a protocol moves names, as that of `released` does), and
    its IoU of 0 counts in the mean.
    """

    name, title, paper, background = "coco_object", "COCO-Object", by_model(37.9, 41.8), True
    layout = (
        "coco_object/images/val2017/*.jpg (or those of coco_stuff164k)",
        "coco_object/annotations/val2017/*_instanceTrainIds.png (`rfclip prepare coco_object` makes them)",
    )

    def find(self, root: Path) -> Iterable[Pair]:
        # The pictures are the same.
        images = present(root / "coco_object/images/val2017", root / "coco_stuff164k/images/val2017")
        return beside(images, root / "coco_object/annotations/val2017", "_instanceTrainIds.png")


@dataclass(frozen=True)
class COCOStuff(FolderDataset):
    """171 classes of things and stuff."""

    name, title, paper = "coco_stuff", "COCO-Stuff", by_model(26.3, 26.7)
    layout = (
        "coco_stuff164k/images/val2017/*.jpg",
        "coco_stuff164k/annotations/val2017/*_labelTrainIds.png",
    )

    def find(self, root: Path) -> Iterable[Pair]:
        folder = root / "coco_stuff164k"
        return beside(folder / "images/val2017", folder / "annotations/val2017", "_labelTrainIds.png")
