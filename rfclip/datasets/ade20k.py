"""ADE20K with its 150 classes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rfclip.datasets.base import FolderDataset, Pair, beside, by_model, present


@dataclass(frozen=True)
class ADE20K(FolderDataset):
    """150 classes; label 0 is everything else and does not count."""

    name, title, paper, zero_ignored = "ade20k", "ADE20K", by_model(20.4, 22.4), True
    layout = (
        "ADEChallengeData2016/images/validation/*.jpg (or ade/ADEChallengeData2016)",
        "ADEChallengeData2016/annotations/validation/*.png",
    )

    def find(self, root: Path) -> Iterable[Pair]:
        folder = present(root / "ADEChallengeData2016", root / "ade/ADEChallengeData2016")  # as unpacked; in the guide
        return beside(folder / "images/validation", folder / "annotations/validation", ".png")
