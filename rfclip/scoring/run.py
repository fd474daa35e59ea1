"""Score a dataset picture by picture, so that an interrupted run resumes.

A run is a folder: `run.json` holds its settings, `images.jsonl` a line for each picture done; once all are done,
`rfclip.scoring.report` adds the results. A picture's line holds its confusion matrix, so that the scores are their sum,
in whatever order and with however many interruptions they came about.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from PIL import Image
from torch import nn

from rfclip.datasets.base import IGNORED, Dataset, Item
from rfclip.datasets.names import ClassNames, name_lists
from rfclip.files import parse_json, write_whole
from rfclip.methods import find_protocol
from rfclip.scoring.metrics import Scores, confusion_matrix
from rfclip.segment.classes import Background
from rfclip.segment.job import Job, differing
from rfclip.segment.result import Segmentation
from rfclip.segment.segmenter import Segmenter
from rfclip.segment.windows import LONG_SIDE, prepared
from rfclip.towers import read_tower

LOCK = ".lock"
RESULTS = ("result.json", "result.md", "confusion.png")


class Scorer:
    """A worker (see `rfclip.app.engines`) that scores a dataset's items by a method's protocol for the dataset.

    A result is the item with the seconds it took and, under "pixels", [label, prediction, count] of each pair that
    occurs, for each list of names, or, under "hit", whether the picture as a whole was classified correctly.

    Args:
        job: the model with its settings.
        dataset: what is scored.
        model: the job's model if it is loaded already.
        device: where the model is or will be; None: the job's device.
        lists: the names of the dataset's classes, by what each list is called; None: the official ones. A picture goes
            through the tower once for all of them.
    """

    def __init__(
        self,
        job: Job,
        dataset: Dataset,
        model: nn.Module | None = None,
        device: str | None = None,
        lists: dict[str, ClassNames] | None = None,
    ) -> None:
        self.job, self.dataset, self.lists = job, dataset, lists or name_lists(dataset)
        self._open = contextlib.ExitStack()
        protocol = find_protocol(job.protocol, job.method).on(dataset.name)
        self.threshold = protocol.threshold if dataset.background else None
        model = job.load(device) if model is None else model
        self.segmenter: Segmenter = self._open.enter_context(
            job.segmenter(model, device=device, protocol=protocol, long_side=_long_side(model))
        )

    @property
    def class_names(self) -> list[str]:
        """One name per class, for tables: the first in the first list of names, or "background"."""
        names = [names[0] for names in next(iter(self.lists.values()))]
        return ["background", *names[1:]] if self.dataset.background else names

    def close(self) -> None:
        """Restore the model."""
        self._open.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def settings(self) -> dict[str, object]:
        """What a result depends on: a run resumes only if all of it is unchanged."""
        names = {name: _digest(names) for name, names in self.lists.items()}
        settings = {"threshold": self.threshold, "names": names}
        return self.dataset.described() | self.job.described(self.segmenter) | settings

    def __call__(self, item: Item) -> dict[str, object]:
        began = time.perf_counter()
        rgb, labels = self.dataset.read(item)
        if isinstance(labels, np.ndarray):
            labels, classes = self.counted(labels), len(self.dataset.classes)
            pixels = {}
            for name, predicted in self.predictions(rgb).items():
                confusion = confusion_matrix(labels, predicted.labels, classes)
                rows, columns = np.nonzero(confusion)
                pixels[name] = np.stack([rows, columns, confusion[rows, columns]], axis=1).tolist()
            found: dict[str, object] = {"pixels": pixels}
        else:
            found = {"hit": self.classify(rgb) == labels}
        return item | {"seconds": time.perf_counter() - began} | found

    def predict(self, rgb: Image.Image) -> Segmentation:
        """A picture's segmentation by the first list of names."""
        return next(iter(self.predictions(rgb).values()))

    def predictions(self, rgb: Image.Image) -> dict[str, Segmentation]:
        """By list of names, the segmentation into the dataset's classes; where none is sure, the background, if any."""
        dataset, lists = self.dataset, list(self.lists.values())
        if dataset.background:
            lists = [[Background(first), *rest] for first, *rest in lists]
        each = self.segmenter.segment_by(rgb, lists, threshold=self.threshold, post=self.job.post)
        predicted = {}
        for name, found in zip(self.lists, each, strict=True):
            labels = np.where(found.labels == found.nothing, 0, found.labels) if dataset.background else found.labels
            predicted[name] = replace(found, labels=labels, classes=tuple(self.class_names))
        return predicted

    def counted(self, labels: np.ndarray) -> np.ndarray:
        """The labels [H, W] of those pixels that the protocol looks at; others do not count."""
        top, left, height, width = self.segmenter.windows.seen(*labels.shape)
        seen = np.full_like(labels, IGNORED)
        seen[top : top + height, left : left + width] = labels[top : top + height, left : left + width]
        return seen

    @torch.inference_mode()
    def classify(self, rgb: Image.Image) -> int:
        """The dataset's candidate whose name is nearest to the image embedding."""
        segmenter, tower = self.segmenter, self.segmenter.tower
        text = segmenter.text_embeddings(self.dataset.candidates)
        image = prepared(rgb, tower.image_size, tower).to(tower.weight.dtype)
        embedding = tower.encode_image(segmenter.model, image[None])
        return int((F.normalize(embedding.float(), dim=-1).cpu() @ text.T).argmax())


def _digest(names: ClassNames) -> str:
    """A short hash of a list of names, so that a run resumes only with the same."""
    return hashlib.blake2b(json.dumps(names).encode(), digest_size=6).hexdigest()


def written(folder: Path) -> list[Path]:
    """The files that a finished run may have in its folder, besides its settings and lines."""
    return [*(folder / name for name in RESULTS), *folder.glob("worst-*.jpg")]


def _long_side(model: nn.Module) -> int:
    return round(LONG_SIDE * max(read_tower(model).image_size) / 224)


@dataclass(frozen=True)
class Scored:
    """What a run keeps of a picture: seconds, and either pixels by label and prediction, or a hit or miss.

    Attributes:
        pixels: by list of names: label, prediction (the number of classes for none) and count, [K, 3].
    """

    seconds: float
    pixels: dict[str, np.ndarray] | None
    hit: bool | None

    def confusion(self, classes: int, names: str) -> np.ndarray:
        matrix = np.zeros((classes, classes + 1), np.int64)
        if self.pixels is not None:
            pixels = self.pixels[names]
            matrix[pixels[:, 0], pixels[:, 1]] = pixels[:, 2]
        return matrix


class Run:
    """A run in a folder, new or interrupted earlier; `overwrite` starts it anew. Use it in a `with` statement.

    Args:
        folder: where it lives; it is made if need be.
        settings: what its results depend on.
        items: what is to be scored.

    Raises:
        ValueError: the folder holds a run with other settings, files that are not a run's, or corrupt ones; or another
            process is working in it.
    """

    def __init__(
        self, folder: Path, settings: dict[str, object], items: list[Item], *, overwrite: bool = False
    ) -> None:
        self.folder, self.settings, self.items = folder, settings, items
        self._lines = folder / "images.jsonl"
        self._lock = FileLock(folder / LOCK)
        self._overwrite = overwrite

    def __enter__(self) -> Run:
        folder, path = self.folder, self.folder / "run.json"
        if folder.exists() and not path.exists() and any(not file.name.startswith(".") for file in folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no run: choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(f"another process is working in {folder}: wait, or choose another folder") from error
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
            for old in (self._lines, *written(self.folder), path):
                old.unlink(missing_ok=True)
        if not path.exists():
            write_whole({path: lambda part: part.write_text(json.dumps(self.settings, indent=2) + "\n", "utf-8")})
            return
        try:
            before = dict(parse_json(path.read_text("utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is corrupt ({error}): --overwrite starts over") from error
        others = differing({**before, **self.settings}, before, self.settings)
        if others:
            changes = "; ".join(f"{key} was {before.get(key)!r}, is {self.settings.get(key)!r}" for key in others)
            raise ValueError(f"{self.folder} holds another run ({changes}): choose another folder, or --overwrite")

    def _done(self) -> dict[str, Scored]:
        """What has been scored, by the item's text."""
        if not self._lines.exists():
            return {}
        text = self._lines.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):  # interrupted in the middle of a line
            with self._lines.open("r+b") as file:
                file.truncate(len(whole))
        done = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = parse_json(line)
                seconds, hit = float(record.pop("seconds")), record.pop("hit", None)
                found = {} if hit is not None else dict(record.pop("pixels"))
                pixels = {name: np.array(each, np.int64).reshape(-1, 3) for name, each in found.items()} or None
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
                raise ValueError(f"{self._lines}, line {number}, is corrupt: --overwrite starts over") from error
            done[json.dumps(record)] = Scored(seconds, pixels, hit)
        return done

    def missing(self) -> list[Item]:
        """The items that have not been scored."""
        done = self._done()
        return [item for item in self.items if json.dumps(item) not in done]

    def keep(self, records: Iterable[dict]) -> Iterator[str]:
        """Keep each result of a `Scorer` as it comes, and yield its image."""
        with self._lines.open("a", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
                yield record["image"]

    def scores(self, classes: int, names: str = "official") -> tuple[Scores, list[tuple[float, Item]]]:
        """By a list of names: the sum over all items, all of which are scored, and the items by mIoU, worst first."""
        done = self._done()
        scored = [(item, done[json.dumps(item)]) for item in self.items]
        confusions = [(item, each.confusion(classes, names)) for item, each in scored if each.pixels is not None]
        hits = [each.hit for _, each in scored if each.hit is not None]
        total = sum((confusion for _, confusion in confusions), np.zeros((classes, classes + 1), np.int64))
        seconds = math.fsum(each.seconds for _, each in scored)
        rated = [(Scores(1, 0.0, confusion).miou, item) for item, confusion in confusions]
        worst = sorted((pair for pair in rated if not math.isnan(pair[0])), key=lambda pair: pair[0])
        return Scores(len(confusions), seconds, total, len(hits), sum(hits)), worst
