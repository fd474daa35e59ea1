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
from rfclip.scoring.metrics import Mean, Scores
from rfclip.scoring.run import RESULTS, Run, Scorer, written
from rfclip.segment.result import Segmentation

WORST = 8  # pictures
SYNONYMS = "synonyms, "  # how the names of lists of synonyms start


def finish(run: Run, scorer: Scorer) -> dict[str, Scores]:
    """Write a run's results once all of its items are scored, and return its scores by list of names.

    The figures are those of the first list; `result.json` has those of all lists under "by_names" if there are several.
    """
    dataset, class_names, settings = scorer.dataset, scorer.class_names, run.settings
    found = {name: run.scores(len(dataset.classes), name) for name in scorer.lists}
    every = {name: scores for name, (scores, _) in found.items()}
    scores, rated = next(iter(found.values()))
    worst = rated[:WORST]
    text = markdown(dataset, class_names, every, settings, [(miou, str(item["image"])) for miou, item in worst])
    record = settings | scores.figures(class_names)
    record["lists"] = scorer.lists
    if len(every) > 1:
        record["by_names"] = {name: each.figures(class_names) for name, each in every.items()}
    written_record = json.dumps(record, indent=2) + "\n"
    writers: tuple[Callable[[Path], object], ...] = (
        lambda part: part.write_text(written_record, "utf-8"),
        lambda part: part.write_text(text, "utf-8"),
        lambda part: confusion_figure(dataset, class_names, scores).savefig(part, format="png", dpi=150),
    )
    saves = {run.folder / name: writer for name, writer in zip(RESULTS, writers, strict=True)}
    for rank, (_, item) in enumerate(worst, 1):
        rgb, labels = dataset.read(item)
        pair = _side_by_side(scorer.predict(rgb), np.asarray(labels))
        saves[run.folder / f"worst-{rank}.jpg"] = partial(pair.save, format="JPEG", quality=90)
    write_whole(saves)
    for old in set(written(run.folder)) - saves.keys():  # of a run over more pictures
        old.unlink()
    return every


@dataclass(frozen=True)
class Row:
    """A line of the table that a command prints: who was scored on what, and how it went.

    Attributes:
        paper: the paper's mIoU in percent, if the two can be compared.
        names: by which list of names.
        gap: what the mIoU is in addition to that by the first list.
    """

    label: str
    title: str
    scores: Scores | Mean
    paper: float | None = None
    names: str = "official"
    gap: float | None = None


def rows_of(label: str, title: str, every: dict[str, Scores], paper: float | None) -> list[Row]:
    """A row for each list of names, those of synonyms as their mean over seeds and the worst."""
    first = next(iter(every.values()))
    drawn = [scores for name, scores in every.items() if name.startswith(SYNONYMS)]
    rows = [
        Row(label, title, scores, paper if name == "official" else None, name, _gap(scores, first))
        for name, scores in every.items()
        if not name.startswith(SYNONYMS)
    ]
    if drawn:
        worst = min(drawn, key=lambda scores: scores.miou)
        for what, each in ((f"mean of {len(drawn)}", Scores.mean(drawn)), ("worst", worst)):
            rows.append(Row(label, title, each, None, f"{SYNONYMS}{what}", each.miou - first.miou))
    return rows


def _gap(scores: Scores, first: Scores) -> float | None:
    return None if scores is first else scores.miou - first.miou


def paper_figure(dataset: type[Dataset] | Dataset, model: str, method: str, comparable: bool) -> float | None:
    """RF-CLIP's mIoU in percent from the paper's table 2, which the released code gave, where it can be compared."""
    known = dataset.paper.get(plain_name(model))
    return known if comparable and method == "released" else None


def table(rows: list[Row], heading: str = "method") -> tuple[list[str], list[list[str]]]:
    """Heads and cells: columns without a value, or of one dataset or list, are left out; datasets get a mean."""
    heads = [heading, "names", "dataset", "pictures", "top-1 %", "mIoU %", "to the first names"]
    heads += ["pixel accuracy %", "paper %", "difference"]
    cells = []
    for label, names in dict.fromkeys((row.label, row.names) for row in rows):
        mine = [row for row in rows if (row.label, row.names) == (label, names)]
        cells += [_cells(row) for row in mine]
        if len(mine) > 1:
            papers = [row.paper for row in mine if row.paper is not None]
            gaps = [row.gap for row in mine if row.gap is not None]
            paper = float(np.mean(papers)) if len(papers) == len(mine) else None
            miou = float(np.mean([row.scores.miou for row in mine]))
            gap = _signed(float(np.mean(gaps)) if gaps else None)
            cells.append([label, names, "mean", "", "-", f"{100 * miou:.1f}", gap, "-", *_beside_paper(miou, paper)])
    left_out = {"names", "to the first names"} if len({row.names for row in rows}) == 1 else set()
    left_out |= {"dataset", "pictures"} if len({row.title for row in rows}) == 1 else set()
    shown = [n for n, head in enumerate(heads) if head not in left_out]
    kept = [n for n in shown if n == 0 or any(row[n] not in ("-", "") for row in cells)]
    return [heads[n] for n in kept], [[row[n] for n in kept] for row in cells]


def _cells(row: Row) -> list[str]:
    scores = row.scores
    top1 = "-" if scores.top1 is None else f"{100 * scores.top1:.1f}"
    miou, accuracy = (f"{100 * figure:.1f}" for figure in (scores.miou, scores.pixel_accuracy))
    start = [row.label, row.names, row.title, str(scores.images), top1, miou, _signed(row.gap), accuracy]
    return [*start, *_beside_paper(scores.miou, row.paper)]


def _signed(gap: float | None) -> str:
    """A difference in points, or a dash for none."""
    return "-" if gap is None else f"{100 * gap:+.1f}"


def _beside_paper(miou: float, paper: float | None) -> list[str]:
    return ["-", "-"] if paper is None else [f"{paper:.1f}", f"{100 * miou - paper:+.1f}"]


def markdown(
    dataset: Dataset,
    class_names: list[str],
    every: dict[str, Scores],
    settings: dict[str, object],
    worst: list[tuple[float, str]],
) -> str:
    """The figures, those of each class, the worst pictures, and the settings; by list of names if there are several."""
    scores = next(iter(every.values()))
    pictures = scores.images + scores.singles
    lines = [
        f"# {dataset.title}: {100 * scores.miou:.2f} % mIoU",
        "",
        f"{scores.images} pictures, pixel accuracy {100 * scores.pixel_accuracy:.2f} %, "
        f"{scores.seconds / max(pictures, 1):.2f} s per picture.",
    ]
    if scores.top1 is not None:
        lines += ["", f"{scores.singles} pictures as a whole: zero-shot top-1 {100 * scores.top1:.2f} %."]
    if len(every) > 1:
        lines += ["", "| names | mIoU % | pixel accuracy % |", "| --- | --- | --- |"]
        for names, each in every.items():
            lines.append(f"| {printable(names)} | {100 * each.miou:.2f} | {100 * each.pixel_accuracy:.2f} |")
        lines += ["", "The rest is by the first list of names."]
    lines += ["", "| class | IoU % | share of the pixels % |", "| --- | --- | --- |"]
    shares = scores.confusion.sum(axis=1) / max(1, scores.confusion.sum())
    for name, iou, share in zip(class_names, scores.iou, shares, strict=True):
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


def confusion_figure(dataset: Dataset, class_names: list[str], scores: Scores) -> Figure:
    """The confusion matrix, each row in shares of its label's pixels."""
    confusion, names = scores.confusion, class_names
    shares = confusion[:, :-1] / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
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
