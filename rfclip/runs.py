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
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from rfclip import __version__
from rfclip.benchmarks import BENCHMARKS, Benchmark, Pair, read_picture
from rfclip.config import RefocusConfig
from rfclip.evaluate import confusion_matrix, intersection_over_union
from rfclip.files import printable, write_whole
from rfclip.methods import RFCLIP, Protocol, find_method
from rfclip.models import absolute_names, load_model, load_tokenizer
from rfclip.segmenter import Segmentation, Segmenter
from rfclip.tower import read_tower

LONG_SIDE = 2048  # of a resized picture at most, for a tower trained at 224, and scaled for others
WORST = 8  # pictures
LOCK = ".lock"
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
    config: RefocusConfig | None = None
    method: str = RFCLIP.name
    backend: str = "auto"
    device: str = "cpu"
    batch: int | None = None
    pamr: bool = False

    def load(self) -> nn.Module:
        """The model."""
        return load_model(self.model, self.pretrained, device=self.device)

    def segmenter(self, model: nn.Module) -> Segmenter:
        """A segmenter by the method's protocol for this benchmark; on another device than asked, on any backend."""
        tower = read_tower(model)
        return Segmenter(
            model,
            config=self.config,
            method=self.method,
            protocol=self.protocol,
            backend=self.backend if tower.weight.device.type == self.device.partition(":")[0] else "auto",
            batch=self.batch,
            tokenizer=load_tokenizer(self.model),
            long_side=round(LONG_SIDE * max(tower.image_size) / 224),
        )

    @property
    def protocol(self) -> Protocol:
        """The method's on this benchmark."""
        return find_method(self.method).protocol.on(self.benchmark)

    @property
    def threshold(self) -> float | None:
        """Class probability under which a pixel is background, where the benchmark has that."""
        return self.protocol.threshold if BENCHMARKS[self.benchmark].background else None

    def elsewhere(self) -> Setup:
        """The same for another working directory."""
        model, pretrained = absolute_names(self.model, self.pretrained)
        return replace(self, root=self.root.absolute(), model=model, pretrained=pretrained)

    def settings(self, segmenter: Segmenter) -> dict[str, object]:
        """What a result depends on: a run goes on only where all of it is as it was."""
        return {
            "benchmark": self.benchmark,
            "model": self.model,
            "pretrained": self.pretrained,
            "weights": segmenter.digest(),
            "method": self.method,
            "config": segmenter.config and json.loads(segmenter.config.to_json()),
            "backend": self.backend,
            "short_side": segmenter.short_side,
            "long_side": segmenter.long_side,
            "window": segmenter.window,
            "stride": segmenter.stride,
            "logit_scale": segmenter.logit_scale,
            "threshold": self.threshold,
            "pamr": self.pamr,
            "rfclip": __version__,
        }


class Scorer:
    """A worker (see `rfclip.engines`) that scores a picture: {"image": path below the root, "labels": path, ...} in.

    Out comes the same, with the seconds it took, and [label, prediction, pixels] where there are any.
    """

    def __init__(self, setup: Setup, segmenter: Segmenter | None = None):
        self.setup, self.benchmark = setup, BENCHMARKS[setup.benchmark]
        self.segmenter = setup.segmenter(setup.load()) if segmenter is None else segmenter

    def __call__(self, task: dict[str, object]) -> dict[str, object]:
        began = time.perf_counter()
        root, classes = self.setup.root, len(self.benchmark.classes)
        predicted, wanted = self.predict(root / task["image"], root / task["labels"])
        confusion = confusion_matrix(wanted, predicted.labels, classes)
        rows, columns = np.nonzero(confusion)
        pixels = np.stack([rows, columns, confusion[rows, columns]], axis=1).tolist()
        return task | {"seconds": time.perf_counter() - began, "pixels": pixels}

    def predict(self, image: Path, labels: Path) -> tuple[Segmentation, np.ndarray]:
        """What a picture is segmented into, and its labels, uint8 [H, W] each, at the size of the file."""
        benchmark, rgb = self.benchmark, read_picture(image)
        wanted = benchmark.read_labels(labels, rgb.size[::-1])
        found = self.segmenter.segment(rgb, benchmark.classes, threshold=self.setup.threshold, pamr=self.setup.pamr)
        predicted = np.where(found.labels == found.nothing, 0, found.labels) if benchmark.background else found.labels
        return replace(found, labels=predicted, classes=tuple(benchmark.class_names)), wanted


@dataclass(frozen=True)
class Scored:
    """What a run keeps of a picture: seconds, and pixels by label and prediction, [K, 3], where there are any."""

    seconds: float
    pixels: np.ndarray

    def confusion(self, classes: int) -> np.ndarray:
        matrix = np.zeros((classes, classes), np.int64)
        matrix[self.pixels[:, 0], self.pixels[:, 1]] = self.pixels[:, 2]
        return matrix


class Run:
    """A run over pictures in a folder, new or stopped before; `overwrite` starts it anew. To be used with `with`.

    Raises:
        ValueError: the folder holds a run with other settings, files that are not a run's, or damaged ones; or another
            process works in it.
    """

    def __init__(
        self, folder: Path, settings: dict[str, object], pairs: list[Pair], root: Path, *, overwrite: bool = False
    ):
        self.folder, self.settings, self.pairs, self.root = folder, settings, pairs, root
        self._lines = folder / "images.jsonl"
        self._lock = FileLock(folder / LOCK)
        self._overwrite = overwrite

    def __enter__(self) -> Run:
        folder, path = self.folder, self.folder / "run.json"
        if folder.exists() and not path.exists() and any(not file.name.startswith(".") for file in folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no run: give another folder")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(f"another process works in {folder}: wait for it, or give another folder") from error
        try:
            self._open(path)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def _open(self, path: Path) -> None:
        if self._overwrite:
            for old in (self._lines, *self._results(), path):
                old.unlink(missing_ok=True)
        if not path.exists():
            write_whole({path: lambda part: part.write_text(json.dumps(self.settings, indent=2) + "\n", "utf-8")})
            return
        try:
            before = dict(json.loads(path.read_text("utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not as a run writes it ({error}): --overwrite starts anew") from error
        differing = [key for key in {**before, **self.settings} if before.get(key) != self.settings.get(key)]
        if differing:
            changes = "; ".join(f"{key} was {before.get(key)!r}, is {self.settings.get(key)!r}" for key in differing)
            raise ValueError(f"{self.folder} holds another run ({changes}): give another folder, or --overwrite")

    def _results(self) -> list[Path]:
        return [*(self.folder / name for name in RESULTS), *self.folder.glob("worst-*.jpg")]

    def _done(self) -> dict[str, Scored]:
        """What is kept, by the task's text."""
        if not self._lines.exists():
            return {}
        text = self._lines.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):  # stopped in the middle of a line
            with self._lines.open("r+b") as file:
                file.truncate(len(whole))
        done = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                scored = Scored(float(record.pop("seconds")), np.array(record.pop("pixels"), np.int64).reshape(-1, 3))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{self._lines}, line {number}, is not as a run writes it: --overwrite starts anew"
                ) from error
            done[json.dumps(record)] = scored
        return done

    def _tasks(self) -> list[dict[str, object]]:
        """For a `Scorer`; with sizes and times of the files, so that a picture whose files change is scored again."""
        tasks = []
        for image, labels in self.pairs:
            stamp = [[status.st_size, status.st_mtime_ns] for status in (image.stat(), labels.stat())]
            tasks.append({"image": _below(image, self.root), "labels": _below(labels, self.root), "files": stamp})
        return tasks

    def missing(self) -> list[dict[str, object]]:
        """The tasks for a `Scorer` that are not done."""
        done = self._done()
        return [task for task in self._tasks() if json.dumps(task) not in done]

    def keep(self, records: Iterable[dict]) -> Iterator[str]:
        """Keep what a `Scorer` found, each as it comes, and yield its image."""
        with self._lines.open("a", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
                yield record["image"]

    def finish(self, scorer: Scorer) -> Result:
        """Sum up the pictures, all of which are scored, and write what came out."""
        done, benchmark = self._done(), scorer.benchmark
        scored = [done[json.dumps(task)] for task in self._tasks()]
        confusions = [each.confusion(len(benchmark.classes)) for each in scored]
        result = Result(benchmark, len(scored), sum(each.seconds for each in scored), sum(confusions))
        rated = zip(map(_mean_iou, confusions), self.pairs, strict=True)
        worst = sorted((miou, pair) for miou, pair in rated if not np.isnan(miou))[:WORST]
        text = markdown(result, self.settings, [(miou, _below(pair[0], self.root)) for miou, pair in worst])
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
        for old in set(self._results()) - saves.keys():  # of a run over more pictures
            old.unlink()
        return result


def _below(path: Path, root: Path) -> str:
    return str(path.relative_to(root))


def table_rows(results: list[Result], model: str, method: str, comparable: bool) -> list[tuple[str, ...]]:
    """Method, benchmark, pictures, mIoU; where comparable, the paper's (table 2, RF-CLIP) and the difference."""
    found = []
    for result in results:
        known = result.benchmark.paper.get(model.replace("/", "-").removesuffix("-quickgelu"))
        paper = known if comparable and method == RFCLIP.name else None
        found.append((result.benchmark.title, str(result.images), 100 * result.miou, paper))
    if len(results) > 1:
        papers = [paper for *_, paper in found if paper is not None]
        mean = float(np.mean([miou for *_, miou, _ in found]))
        found.append(("mean", "", mean, float(np.mean(papers)) if len(papers) == len(results) else None))
    rows = []
    for title, images, miou, paper in found:
        beside = ("-", "-") if paper is None else (f"{paper:.1f}", f"{miou - paper:+.1f}")
        rows.append((method, title, images, f"{miou:.1f}", *beside))
    return rows


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
    lines += [f"{rank}. {printable(name)}: {100 * miou:.2f} %" for rank, (miou, name) in enumerate(worst, 1)]
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
