"""Cityscapes with its 19 classes."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rfclip.datasets.base import IGNORED, FolderDataset, Pair, beside, by_model


@dataclass(frozen=True)
class Cityscapes(FolderDataset):
    """Labels come as ids; Cityscapes' own scripts make files of train ids, which are read if they exist."""

    name, title, paper = "cityscapes", "Cityscapes", by_model(41.3, 41.4)
    layout = (
        "cityscapes/leftImg8bit/val/CITY/*_leftImg8bit.png",
        "cityscapes/gtFine/val/CITY/*_gtFine_labelTrainIds.png (or *_gtFine_labelIds.png)",
    )

    def find(self, root: Path) -> Iterable[Pair]:
        folder = root / "cityscapes"
        images, labels, suffix = folder / "leftImg8bit/val", folder / "gtFine/val", "_gtFine_labelIds.png"
        pairs = []
        for image, ids in beside(images, labels, suffix, "*/*_leftImg8bit.png"):
            train_ids = ids.with_name(ids.name.replace("_labelIds.png", "_labelTrainIds.png"))
            pairs.append((image, train_ids if train_ids.is_file() else ids))
        return pairs

    def indices(self, path: Path) -> np.ndarray:
        indices = super().indices(path)
        return _train_ids()[indices] if path.name.endswith("_labelIds.png") else indices


@functools.cache
def _train_ids() -> np.ndarray:
    """The train id of every id, uint8 [256]."""
    from torchvision import datasets

    table = np.full(256, IGNORED, np.uint8)
    for label in datasets.Cityscapes.classes:
        if 0 <= label.train_id < IGNORED:
            table[label.id] = label.train_id
    return table
