"""Confusion matrices and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rfclip.datasets.base import IGNORED


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Pixels by label (rows) and prediction (columns), int64 [C, C + 1], of arrays of one shape.

    Label 255 is left out. The last column counts pixels that are given no class, by whatever number beyond them.
    """
    import torch
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    target, found = (torch.from_numpy(array.astype(np.int64)) for array in (labels, predicted))
    found = found.clamp(max=classes)
    return multiclass_confusion_matrix(found, target, classes + 1, ignore_index=IGNORED).numpy()[:classes]


def intersection_over_union(confusion: np.ndarray) -> np.ndarray:
    """By class, float64 [C], from pixels by label and prediction [C, C + 1]; NaN for a class that occurs in neither."""
    hits = np.diag(confusion)
    with np.errstate(invalid="ignore"):
        return hits / (confusion.sum(0)[: len(confusion)] + confusion.sum(1) - hits)


def mean_iou(confusion: np.ndarray) -> float:
    """The mean over the classes that occur; NaN if none does."""
    iou = intersection_over_union(confusion)
    return float(np.nanmean(iou)) if np.isfinite(iou).any() else float("nan")


@dataclass(frozen=True)
class Scores:
    """The figures of one job on one dataset, in [0, 1].

    Attributes:
        images: how many pictures were scored pixel by pixel.
        seconds: spent on all pictures, summed over workers.
        confusion: pixels by label (rows) and prediction (columns, the last for no class), int64 [C, C + 1].
        singles: how many pictures were scored as a whole.
        hits: how many of those were classified correctly.
    """

    images: int
    seconds: float
    confusion: np.ndarray
    singles: int = 0
    hits: int = 0

    @property
    def iou(self) -> np.ndarray:
        """By class, float64 [C]; NaN for a class that is in no label and no prediction."""
        return intersection_over_union(self.confusion)

    @property
    def miou(self) -> float:
        """The mean over the classes that occur; NaN if no pixel counts."""
        return mean_iou(self.confusion)

    @property
    def pixel_accuracy(self) -> float:
        """The share of the pixels that count that are labelled correctly."""
        return float(np.trace(self.confusion) / max(1, self.confusion.sum()))

    @property
    def top1(self) -> float | None:
        """The share of the pictures scored as a whole that are classified correctly; None without any."""
        return self.hits / self.singles if self.singles else None

    @classmethod
    def mean(cls, every: Sequence[Scores]) -> Mean:
        """The mean of the figures of several."""
        miou, accuracy = (np.mean([(each.miou, each.pixel_accuracy) for each in every], axis=0)).tolist()
        return Mean(every[0].images, miou, accuracy)

    def figures(self, class_names: list[str]) -> dict[str, object]:
        """For JSON, which has no NaN: null in its place."""
        iou = [None if np.isnan(value) else value for value in self.iou.tolist()]
        return {
            "images": self.images,
            "seconds": self.seconds,
            "miou": None if np.isnan(self.miou) else self.miou,
            "pixel_accuracy": self.pixel_accuracy,
            "top1": self.top1,
            "iou": dict(zip(class_names, iou, strict=True)),
            "confusion": self.confusion.tolist(),
        }


@dataclass(frozen=True)
class Mean:
    """What tables show of several scores on the same pictures: mean figures, in [0, 1]."""

    images: int
    miou: float
    pixel_accuracy: float
    top1: None = None
