"""What is written of a finished run: `result.json`, `result.md`, `confusion.png`, and the worst pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from rfclip.config import plain_name
from rfclip.datasets.base import Dataset
from rfclip.files import printable, write_whole
from rfclip.methods import RF_CLIP
from rfclip.scoring.metrics import Scores
from rfclip.scoring.run import RESULTS, Run, Scorer, written
from rfclip.segment.result import Segmentation

WORST = 8  # pictures


def finish(run: Run, scorer: Scorer) -> Scores:
    """Write a run's results once all of its items are scored, and return its scores."""
    dataset, settings = scorer.dataset, run.settings
    scores, rated = run.scores(len(dataset.classes))
    worst = rated[:WORST]
    text = markdown(dataset, scores, settings, [(miou, str(item["image"])) for miou, item in worst])
    record = json.dumps(settings | scores.figures(dataset.class_names), indent=2) + "\n"
    writers: tuple[Callable[[Path], object], ...] = (
        lambda part: part.write_text(record, "utf-8"),
        lambda part: part.write_text(text, "utf-8"),
        lambda part: confusion_figure(dataset, scores).savefig(part, format="png", dpi=150),
    )
    saves = {run.folder / name: writer for name, writer in zip(RESULTS, writers, strict=True)}
    for rank, (_, item) in enumerate(worst, 1):
        rgb, labels = dataset.read(item)
        pair = _side_by_side(scorer.predict(rgb), np.asarray(labels))
        saves[run.folder / f"worst-{rank}.jpg"] = partial(pair.save, format="JPEG", quality=90)
    write_whole(saves)
    for old in set(written(run.folder)) - saves.keys():  # of a run over more pictures
        old.unlink()
    return scores


@dataclass(frozen=True)
class Row:
    """A line of the table that a command prints: who was scored on what, and how it went.

    Attributes:
        paper: the paper's mIoU in percent, if the two can be compared.
    """

    label: str
    title: str
    scores: Scores
    paper: float | None = None


def paper_figure(dataset: type[Dataset] | Dataset, model: str, method: str, comparable: bool) -> float | None:
    """RF-CLIP's mIoU in percent from the paper's table 2, where it can be compared."""
    known = dataset.paper.get(plain_name(model))
    return known if comparable and method == RF_CLIP else None


def table(rows: list[Row], heading: str = "method") -> tuple[list[str], list[list[str]]]:
    """Heads and cells: columns without any value are left out, the dataset if there is but one; several get a mean."""
    heads = [heading, "dataset", "pictures", "top-1 %", "mIoU %", "pixel accuracy %", "paper %", "difference"]
    cells = []
    for label in dict.fromkeys(row.label for row in rows):
        mine = [row for row in rows if row.label == label]
        cells += [_cells(label, row.title, str(row.scores.images), row.scores, row.paper) for row in mine]
        if len(mine) > 1:
            papers = [row.paper for row in mine if row.paper is not None]
            paper = float(np.mean(papers)) if len(papers) == len(mine) else None
            miou = float(np.mean([row.scores.miou for row in mine]))
            cells.append([label, "mean", "", "-", f"{100 * miou:.1f}", "-", *_beside_paper(miou, paper)])
    first = 1 if len({row.title for row in rows}) > 1 else 3  # after the dataset and the number of its pictures
    kept = [0, *(n for n in range(first, len(heads)) if any(row[n] not in ("-", "") for row in cells))]
    return [heads[n] for n in kept], [[row[n] for n in kept] for row in cells]


def _cells(label: str, title: str, images: str, scores: Scores, paper: float | None) -> list[str]:
    top1 = "-" if scores.top1 is None else f"{100 * scores.top1:.1f}"
    figures = [f"{100 * figure:.1f}" for figure in (scores.miou, scores.pixel_accuracy)]
    return [label, title, images, top1, *figures, *_beside_paper(scores.miou, paper)]


def _beside_paper(miou: float, paper: float | None) -> list[str]:
    return ["-", "-"] if paper is None else [f"{paper:.1f}", f"{100 * miou - paper:+.1f}"]


def markdown(dataset: Dataset, scores: Scores, settings: dict[str, object], worst: list[tuple[float, str]]) -> str:
    """The figures, those of each class, the worst pictures, and the settings."""
    pictures = scores.images + scores.singles
    lines = [
        f"# {dataset.title}: {100 * scores.miou:.2f} % mIoU",
        "",
        f"{scores.images} pictures, pixel accuracy {100 * scores.pixel_accuracy:.2f} %, "
        f"{scores.seconds / max(pictures, 1):.2f} s per picture.",
    ]
    if scores.top1 is not None:
        lines += ["", f"{scores.singles} pictures as a whole: zero-shot top-1 {100 * scores.top1:.2f} %."]
    lines += ["", "| class | IoU % | share of the pixels % |", "| --- | --- | --- |"]
    shares = scores.confusion.sum(axis=1) / max(1, scores.confusion.sum())
    for name, iou, share in zip(dataset.class_names, scores.iou, shares, strict=True):
        lines.append(f"| {name} | {'-' if np.isnan(iou) else f'{100 * iou:.2f}'} | {100 * share:.2f} |")
    lines += [
        "",
        "A dash: the class is in no label and no prediction, and does not count.",
        "",
        "## Worst pictures",
        "",
    ]
    lines += [f"{rank}. {printable(name)}: {100 * miou:.2f} %" for rank, (miou, name) in enumerate(worst, 1)]
    lines += ["", "## Settings", "", "```json", json.dumps(settings, indent=2), "```", ""]
    return "\n".join(lines)


def confusion_figure(dataset: Dataset, scores: Scores) -> Figure:
    """The confusion matrix, each row in shares of its label's pixels."""
    confusion, names = scores.confusion, dataset.class_names
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    side = min(20.0, 4 + 0.18 * len(names))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1)
    size = max(2.5, min(9.0, 40 * side / len(names)))
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.set(xlabel="predicted", ylabel="labelled", title=f"{dataset.title}: share of each label's pixels")
    figure.colorbar(shown, shrink=0.6)
    return figure


def _side_by_side(found: Segmentation, labels: np.ndarray) -> Image.Image:
    """The prediction on the left, the labels on the right."""
    pictures = [found.overlay(), replace(found, labels=labels).overlay()]
    canvas = Image.new("RGB", (sum(p.width for p in pictures) + 8, max(p.height for p in pictures)), "white")
    canvas.paste(pictures[0], (0, 0))
    canvas.paste(pictures[1], (pictures[0].width + 8, 0))
    return canvas
