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
from rfclip.segment.drawing import Colour, as_seen, class_colours, tinted

PICTURES = 2
COLUMNS = (5, 6)  # whichever leaves fewer places empty
BLACK: Colour = (0, 0, 0)


def contact_sheet(dataset: Dataset, items: list[Item], scorers: Iterator[tuple[str, Scorer]]) -> Figure:
    """Draw the sheet.

    Args:
        dataset: where the pictures come from.
        items: of the dataset; the first two with a label for every pixel are shown.
        scorers: by label, used one after another, so that each may refocus the same model.

    Each class has a colour, the same in both pictures; pixels taken for a class that is absent from the picture are
    black. Titles give the mIoU on that picture alone.
    """
    names = dataset.class_names
    labelled = ((rgb, labels) for rgb, labels in map(dataset.read, items) if isinstance(labels, np.ndarray))
    pictures = list(islice(labelled, PICTURES))
    classes = len(dataset.classes)
    found = {label: [scorer.predict(rgb).labels for rgb, _ in pictures] for label, scorer in scorers}
    present = [_present(labels, classes) for _, labels in pictures]
    by_name = class_colours(names[c] for each in present for c in each)  # fewer names, more unlike colours
    columns = min(COLUMNS, key=lambda columns: -(2 + len(found)) % columns)
    rows = math.ceil((2 + len(found)) / columns)
    figure = Figure(figsize=(2 * columns, 2.2 * rows * len(pictures)), layout="constrained")
    for number, part in enumerate(figure.subfigures(len(pictures), squeeze=False).ravel()):
        picture, labels = pictures[number]
        colours: dict[int, Colour] = dict.fromkeys(range(classes), BLACK)
        colours |= {c: by_name[names[c]] for c in present[number]}
        cells = {"picture": picture, "labels": tinted(picture, labels, colours)}
        for label, predicted in found.items():
            iou = mean_iou(confusion_matrix(labels, predicted[number], classes))
            cells[f"{label}: {100 * iou:.0f} %"] = tinted(picture, predicted[number], colours)
        axes = part.subplots(rows, columns, squeeze=False).ravel()
        for axis in axes:
            axis.set_axis_off()
        for axis, (title, cell) in zip(axes, cells.items(), strict=False):
            axis.imshow(cell, interpolation="nearest")
            axis.set_title(title, fontsize=9)
        shown = {names[c]: as_seen(colours[c]) for c in present[number]} | {"absent": as_seen(BLACK)}
        patches = [Patch(color="#{:02x}{:02x}{:02x}".format(*colour), label=name) for name, colour in shown.items()]
        part.legend(handles=patches, loc="outside lower center", ncols=8)
    return figure


def _present(labels: np.ndarray, classes: int) -> list[int]:
    """The classes in the labels, largest area first."""
    area = np.bincount(labels[labels != IGNORED].ravel(), minlength=classes)
    return [int(c) for c in np.argsort(-area, kind="stable") if area[c]]
