"""A contact sheet: some pictures of a dataset, their labels, and what each method makes of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from rfclip.datasets.base import IGNORED, Dataset, Item
from rfclip.scoring.metrics import confusion_matrix, mean_iou
from rfclip.scoring.run import Scorer
from rfclip.segment.result import palette

PICTURES = 2
COLUMNS = 5


def contact_sheet(dataset: Dataset, items: list[Item], scorers: Iterator[tuple[str, Scorer]]) -> Figure:
    """Draw the sheet.

    Args:
        dataset: where the pictures come from.
        items: of the dataset; the first two with a label for every pixel are shown.
        scorers: by label, used one after another, so that each may refocus the same model.

    Each class of a picture has a colour; pixels taken for a class that is absent from the picture are black. Titles
    give the mIoU on that picture alone.
    """
    labelled = ((rgb, labels) for rgb, labels in map(dataset.read, items) if isinstance(labels, np.ndarray))
    pictures = list(islice(labelled, PICTURES))
    classes = len(dataset.classes)
    found = {label: [scorer.predict(rgb).labels for rgb, _ in pictures] for label, scorer in scorers}
    rows = math.ceil((2 + len(found)) / COLUMNS)
    figure = Figure(figsize=(2 * COLUMNS, 2.2 * rows * len(pictures)), layout="constrained")
    for number, part in enumerate(figure.subfigures(len(pictures), squeeze=False).ravel()):
        pixels, labels = np.asarray(pictures[number][0]), pictures[number][1]
        present = _present(labels, classes)
        cells = {"picture": pixels, "labels": _coloured(labels, pixels, present, classes)}
        for label, predicted in found.items():
            iou = mean_iou(confusion_matrix(labels, predicted[number], classes))
            cells[f"{label}: {100 * iou:.0f} %"] = _coloured(predicted[number], pixels, present, classes)
        axes = part.subplots(rows, COLUMNS, squeeze=False).ravel()
        for axis in axes:
            axis.set_axis_off()
        for axis, (title, cell) in zip(axes, cells.items(), strict=False):
            axis.imshow(cell, interpolation="nearest")
            axis.set_title(title, fontsize=9)
        colours = np.array(palette(len(present))) / 255
        names = dataset.class_names
        patches = [Patch(color=colour, label=names[c]) for c, colour in zip(present, colours, strict=True)]
        part.legend(handles=[*patches, Patch(color="black", label="absent")], loc="outside lower center", ncols=8)
    return figure


def _present(labels: np.ndarray, classes: int) -> list[int]:
    """The classes in the labels, largest area first."""
    area = np.bincount(labels[labels != IGNORED].ravel(), minlength=classes)
    return [int(c) for c in np.argsort(-area, kind="stable") if area[c]]


def _coloured(labels: np.ndarray, pixels: np.ndarray, present: list[int], classes: int) -> np.ndarray:
    """The picture in gray, uint8 [H, W, 3], tinted by the classes that are present in it, and black for others."""
    colours = np.zeros((max(classes, IGNORED + 1), 3), np.uint8)
    colours[present] = palette(len(present))
    return (0.65 * colours[labels] + 0.35 * pixels.mean(axis=2, keepdims=True)).astype(np.uint8)
