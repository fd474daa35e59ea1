"""Score a benchmark picture by picture, so that a stopped run goes on where it was, and write what came out.

A run is a folder: `run.json` says what is run, `images.jsonl` has a line for each picture done, and when all are done
`result.json`, `result.md`, `confusion.png` and the pictures of the worst results follow. A picture's line holds its
confusion matrix, so that the result is their sum, in whatever order and however often the run was stopped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from rfclip import __version__
from rfclip.benchmarks import BENCHMARKS, Benchmark, Pair
from rfclip.config import RefocusConfig
from rfclip.evaluate import confusion_matrix, intersection_over_union
from rfclip.files import write_whole
from rfclip.images import to_rgb
from rfclip.models import load_model, load_tokenizer
from rfclip.segmenter import Segmentation, Segmenter

LONG_SIDE, WINDOW = 2048, 224  # sides of pictures are given for windows of 224, and scaled for others
WORST = 8  # pictures
RESULTS = ("result.json", "result.md", "confusion.png")


@dataclass(frozen=True)
class Result:
    """The figures of a finished run, in [0, 1].

    Attributes:
        images: how many pictures were scored.
        seconds: spent on them, summed over workers.
        confusion: pixels by label (rows) and prediction (columns), int64 [C, C].
    """

    benchmark: Benchmark
    images: int
    seconds: float
    confusion: np.ndarray

    @property
    def iou(self) -> np.ndarray:
        """By class, float64 [C]; NaN for a class that is in no label and no prediction."""
        return intersection_over_union(self.confusion)

    @property
    def miou(self) -> float:
        """The mean over the classes that occur; NaN where no pixel counts."""
        return _mean_iou(self.confusion)

    @property
    def pixel_accuracy(self) -> float:
        return float(np.trace(self.confusion) / max(1, self.confusion.sum()))

    def figures(self) -> dict[str, object]:
        """For JSON, which knows no NaN: null in its place."""
        iou = [None if np.isnan(value) else value for value in self.iou.tolist()]
        return {
            "images": self.images,
            "seconds": self.seconds,
            "miou": None if np.isnan(self.miou) else self.miou,
            "pixel_accuracy": self.pixel_accuracy,
            "iou": dict(zip(self.benchmark.class_names, iou, strict=True)),
            "confusion": self.confusion.tolist(),
        }


@dataclass(frozen=True)
class Setup:
    """All that a run needs, by names, so that a worker elsewhere can make it; fields are the command line's options."""

    benchmark: str
    root: Path
    model: str
    pretrained: str | None
    config: RefocusConfig
    backend: str = "auto"
    device: str = "cpu"
    batch: int | None = None
    pamr: bool = False

    def load(self) -> nn.Module:
        """The model."""
        return load_model(self.model, self.pretrained, device=self.device)

    def segmenter(self, model: nn.Module) -> Segmenter:
        """A segmenter of the benchmark's sizes, in the model's own windows; on another device on any backend."""
        window = int(np.max(model.visual.image_size))
        sides = (BENCHMARKS[self.benchmark].short_side, LONG_SIDE)
        short_side, long_side = (round(side * window / WINDOW) for side in sides)
        return Segmenter(
            model,
            config=self.config,
            backend=self.backend if model.visual.conv1.weight.device.type == self.device.partition(":")[0] else "auto",
            batch=self.batch,
            tokenizer=load_tokenizer(self.model),
            short_side=short_side,
            long_side=long_side,
        )

    def settings(self, segmenter: Segmenter) -> dict[str, object]:
        """What a result depends on: a run goes on only where all of it is as it was."""
        return {
            "benchmark": self.benchmark,
            "model": self.model,
            "pretrained": self.pretrained,
            "weights": segmenter.digest(),
            "config": json.loads(segmenter.config.to_json()),
            "backend": self.backend,
            "short_side": segmenter.short_side,
            "long_side": segmenter.long_side,
            "window": segmenter.window,
            "stride": segmenter.stride,
            "logit_scale": segmenter.logit_scale,
            "threshold": BENCHMARKS[self.benchmark].threshold,
            "pamr": self.pamr,
            "rfclip": __version__,
        }


class Scorer:
    """A worker (see `rfclip.engines`) that scores a picture: {"image": path below the root, "labels": path} in.

    Out come the image, the seconds it took, and [label, prediction, pixels] where there are any.
    """

    def __init__(self, setup: Setup, segmenter: Segmenter | None = None):
        self.setup, self.benchmark = setup, BENCHMARKS[setup.benchmark]
        self.segmenter = setup.segmenter(setup.load()) if segmenter is None else segmenter

    def __call__(self, task: dict[str, str]) -> dict[str, object]:
        began = time.perf_counter()
        root, classes = self.setup.root, len(self.benchmark.classes)
        predicted, wanted = self.predict(root / task["image"], root / task["labels"])
        confusion = confusion_matrix(wanted, predicted.labels, classes)
        rows, columns = np.nonzero(confusion)
        pixels = np.stack([rows, columns, confusion[rows, columns]], axis=1).tolist()
        return {"image": task["image"], "seconds": time.perf_counter() - began, "pixels": pixels}

    def predict(self, image: Path, labels: Path) -> tuple[Segmentation, np.ndarray]:
        """What a picture is segmented into, and its labels, uint8 [H, W] each, at the size of the file."""
        benchmark, rgb = self.benchmark, to_rgb(image)
        wanted = benchmark.read_labels(labels, rgb.size[::-1])
        found = self.segmenter.segment(rgb, benchmark.classes, threshold=benchmark.threshold, pamr=self.setup.pamr)
        predicted = np.where(found.labels == found.nothing, 0, found.labels) if benchmark.background else found.labels
        return replace(found, labels=predicted, classes=tuple(benchmark.class_names)), wanted


class Run:
    """A run in a folder, new or stopped before; `overwrite` starts it anew.

    Raises:
        ValueError: the folder holds a run with other settings, or files that are not a run's.
    """

    def __init__(self, folder: Path, described: dict[str, object], *, overwrite: bool = False):
        self.folder, self.settings = folder, described
        self._lines = folder / "images.jsonl"
        path = folder / "run.json"
        if overwrite and path.exists():
            for old in (path, self._lines, *(folder / name for name in RESULTS), *folder.glob("worst-*.jpg")):
                old.unlink(missing_ok=True)
        if path.exists():
            before = json.loads(path.read_text("utf-8"))
            differing = [key for key in {**before, **described} if before.get(key) != described.get(key)]
            if differing:
                changes = "; ".join(f"{key} was {before.get(key)!r}, is {described.get(key)!r}" for key in differing)
                raise ValueError(f"{folder} holds another run ({changes}): give another folder, or --overwrite")
        elif folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no run: give another folder, or --overwrite")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole({path: lambda part: part.write_text(json.dumps(described, indent=2) + "\n", "utf-8")})

    def done(self) -> dict[str, dict]:
        """What `Scorer` found, by image."""
        if not self._lines.exists():
            return {}
        text = self._lines.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):  # stopped in the middle of a line
            with self._lines.open("r+b") as file:
                file.truncate(len(whole))
        return {record["image"]: record for record in map(json.loads, whole.splitlines())}

    def missing(self, pairs: list[Pair], root: Path) -> list[dict[str, str]]:
        """The tasks for a `Scorer` that are not done."""
        done = self.done()
        tasks = [{"image": _below(image, root), "labels": _below(labels, root)} for image, labels in pairs]
        return [task for task in tasks if task["image"] not in done]

    def keep(self, records: Iterable[dict]) -> Iterator[str]:
        """Keep what a `Scorer` found, each as it comes, and yield its image."""
        with self._lines.open("a", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
                yield record["image"]

    def finish(self, scorer: Scorer, pairs: list[Pair]) -> Result:
        """Sum up the pictures, all of which are scored, and write what came out."""
        done, benchmark, root = self.done(), scorer.benchmark, scorer.setup.root
        records = [done[_below(image, root)] for image, _ in pairs]
        confusions = [_confusion(record, len(benchmark.classes)) for record in records]
        result = Result(benchmark, len(pairs), sum(record["seconds"] for record in records), sum(confusions))
        rated = zip(map(_mean_iou, confusions), pairs, strict=True)
        worst = sorted((miou, pair) for miou, pair in rated if not np.isnan(miou))[:WORST]
        text = markdown(result, self.settings, [(miou, _below(pair[0], root)) for miou, pair in worst])
        record = json.dumps(self.settings | result.figures(), indent=2) + "\n"
        writers: tuple[Callable[[Path], object], ...] = (
            lambda part: part.write_text(record, "utf-8"),
            lambda part: part.write_text(text, "utf-8"),
            lambda part: picture(result).savefig(part, format="png", dpi=150),
        )
        saves = {self.folder / name: writer for name, writer in zip(RESULTS, writers, strict=True)}
        for rank, (_, pair) in enumerate(worst, 1):
            beside = _beside(*scorer.predict(*pair))
            saves[self.folder / f"worst-{rank}.jpg"] = lambda part, beside=beside: beside.save(part, "JPEG", quality=90)
        write_whole(saves)
        return result


def _below(path: Path, root: Path) -> str:
    return str(path.relative_to(root))


def _confusion(record: dict, classes: int) -> np.ndarray:
    """Pixels by label and prediction, int64 [C, C], from what a `Scorer` found."""
    matrix = np.zeros((classes, classes), np.int64)
    for label, prediction, pixels in record["pixels"]:
        matrix[label, prediction] = pixels
    return matrix


def table_rows(results: list[Result], model: str, pretrained: str | None, pamr: bool) -> list[tuple[str, ...]]:
    """Benchmark, pictures, mIoU, the paper's where it has this model (table 2, without PAMR), and the difference."""
    found = []
    for result in results:
        known = result.benchmark.paper.get(model.replace("/", "-").removesuffix("-quickgelu"))
        paper = known if pretrained == "openai" and not pamr else None
        found.append((result.benchmark.title, str(result.images), 100 * result.miou, paper))
    if len(results) > 1:
        papers = [paper for *_, paper in found if paper is not None]
        mean = float(np.mean([miou for *_, miou, _ in found]))
        found.append(("mean", "", mean, float(np.mean(papers)) if len(papers) == len(results) else None))
    return [
        (title, images, f"{miou:.1f}", *(("-", "-") if paper is None else (f"{paper:.1f}", f"{miou - paper:+.1f}")))
        for title, images, miou, paper in found
    ]


def markdown(result: Result, described: dict[str, object], worst: list[tuple[float, str]]) -> str:
    """The figures, those of each class, the worst pictures, and what was run."""
    benchmark = result.benchmark
    each = result.seconds / max(result.images, 1)
    lines = [
        f"# {benchmark.title}: {100 * result.miou:.2f} % mIoU",
        "",
        f"{result.images} pictures, pixel accuracy {100 * result.pixel_accuracy:.2f} %, {each:.2f} s a picture.",
        "",
        "| class | IoU % | share of the pixels % |",
        "| --- | --- | --- |",
    ]
    shares = result.confusion.sum(axis=1) / max(1, result.confusion.sum())
    for name, iou, share in zip(benchmark.class_names, result.iou, shares, strict=True):
        lines.append(f"| {name} | {'-' if np.isnan(iou) else f'{100 * iou:.2f}'} | {100 * share:.2f} |")
    lines += [
        "",
        "A dash: the class is in no label and in no prediction, and does not count.",
        "",
        "## Worst pictures",
        "",
    ]
    lines += [f"{rank}. {name}: {100 * miou:.2f} %" for rank, (miou, name) in enumerate(worst, 1)]
    lines += ["", "## Settings", "", "```json", json.dumps(described, indent=2), "```", ""]
    return "\n".join(lines)


def picture(result: Result) -> Figure:
    """The confusion matrix, each row in shares of its label's pixels."""
    confusion, names = result.confusion, result.benchmark.class_names
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    side = min(20.0, 4 + 0.18 * len(names))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1)
    size = max(2.5, min(9.0, 40 * side / len(names)))
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.set(xlabel="predicted", ylabel="labelled", title=f"{result.benchmark.title}: share of each label's pixels")
    figure.colorbar(shown, shrink=0.6)
    return figure


def _beside(found: Segmentation, wanted: np.ndarray) -> Image.Image:
    """What was predicted, left, and what the labels say, right."""
    pictures = [found.overlay(), replace(found, labels=wanted).overlay()]
    canvas = Image.new("RGB", (sum(p.width for p in pictures) + 8, max(p.height for p in pictures)), "white")
    canvas.paste(pictures[0], (0, 0))
    canvas.paste(pictures[1], (pictures[0].width + 8, 0))
    return canvas


def _mean_iou(confusion: np.ndarray) -> float:
    """Over the classes that occur; NaN where none does."""
    iou = intersection_over_union(confusion)
    return float(np.nanmean(iou)) if np.isfinite(iou).any() else float("nan")
