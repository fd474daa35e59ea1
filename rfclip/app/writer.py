"""Workers that segment pictures and write the results: three files per picture, or many masks per Parquet file.

`plan_files` and `plan_shards` divide the pictures into tasks, and a `Writer` does a task.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image

from rfclip.app.fetch import read
from rfclip.app.large import label_large
from rfclip.app.sources import KINDS, is_path
from rfclip.app.video import label_video
from rfclip.datasets.names import ClassNames
from rfclip.files import OUTPUTS, parse_json, printable, stamp, write_whole
from rfclip.outputs import encode, read_rows, shards, write_shard
from rfclip.segment.classes import Background, title
from rfclip.segment.job import Job, differing
from rfclip.segment.result import Segmentation, writers
from rfclip.segment.segmenter import Segmenter

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # after which no other file can be written either
FOUND = ("share", "confidence")  # what a record says of a class that depends on the picture
SHARD = 8, 64  # pictures in a Parquet file, when there are few pictures and when there are many


def described(
    job: Job, segmenter: Segmenter, named: ClassNames, threshold: float | None, weights: str | None = None
) -> dict[str, Any]:
    """What the labels mean and how they were made; `weights` is the segmenter's digest if that is known."""
    synonyms = [list(names) if isinstance(names, Background) else list(names[1:]) for names in named]
    classes = [
        {"index": index, "name": title(names), "synonyms": others}
        for index, (names, others) in enumerate(zip(named, synonyms, strict=True))
    ]
    return {"classes": classes, "nothing": 255, "threshold": threshold} | job.described(segmenter, weights)


class Writer:
    """A worker (see `rfclip.app.engines`) that segments the pictures of a task and writes the results.

    A task has "pictures", each with its "path", its "image", which is the path as given, and in "files" the paths of
    its `OUTPUTS`; or, instead of all "files", one "shard", the path of a Parquet file. What is no plain picture has
    "settings" as well, see `sources.special`. The result says under "done" how many pictures were written, and under
    "failed" image and reason of each of the others.

    Args:
        job: the model with its settings.
        named: the names of each class.
        record: what `described` says of them.
        segmenter: the job's, if there is one already.
        mark: of its temporary files, as for `write_whole`.
        watch: is told how far a long one is: its name, how much is done, and of how much, if that is known.
    """

    def __init__(
        self,
        job: Job,
        named: ClassNames,
        record: dict[str, Any],
        segmenter: Segmenter | None = None,
        mark: str = "",
        watch: Callable[[str, int, int | None], None] = lambda *_: None,
    ) -> None:
        self.job, self.named, self.record, self.mark, self.watch = job, named, record, mark, watch
        self._open = contextlib.ExitStack()
        self.segmenter = self._open.enter_context(job.segmenter()) if segmenter is None else segmenter

    def __call__(self, task: dict) -> dict:
        """Do a task.

        Raises:
            OSError: the disk is full, so that the other pictures would be segmented in vain.
        """
        rows, failed = [], []
        for picture in task["pictures"]:
            try:
                began, before = time.perf_counter(), _stamp(picture["path"])
                row: dict[str, Any] = {"image": printable(picture["image"]), "path": printable(picture["path"])}
                row |= before
                if "settings" in picture:
                    self._label(picture, row, began)
                    rows.append(row)
                    continue
                found = self._segment(read(picture["path"]), confidence="shard" not in task)
                row |= {"width": found.image.width, "height": found.image.height}
                row["seconds"] = round(time.perf_counter() - began, 3)
                if "shard" in task:
                    row |= encode(found.labels)
                else:
                    files = dict(zip(OUTPUTS, map(Path, picture["files"]), strict=True))
                    save(found, row | self.record, files, self.mark)
                rows.append(row)
            except (ValueError, OSError, MemoryError, RuntimeError) as error:  # torch out of memory: RuntimeError
                if isinstance(error, OSError) and error.errno in FULL:
                    raise
                failed.append([picture["image"], str(error).removeprefix(f"{picture['path']} ")])
        if "shard" in task and rows:
            write_shard(Path(task["shard"]), rows, self.record, self.mark)
        return {"done": len(rows), "failed": failed}

    def _segment(self, rgb: Image.Image, confidence: bool = False) -> Segmentation:
        options: dict[str, Any] = {"threshold": self.record["threshold"], "post": self.job.post}
        return self.segmenter.segment(rgb, self.named, confidence=confidence, **options)

    def _label(self, picture: dict, row: dict[str, Any], began: float) -> None:
        """Write the results of what is no plain picture."""
        source, settings, facts, shown = picture["path"], picture["settings"], dict[str, Any](), list[Segmentation]()
        watch = partial(self.watch, Path(picture["image"]).name)

        def video(part: Path) -> None:
            facts.update(label_video(source, settings["frame_stride"], self._segment, part, watch))

        def mask(part: Path) -> None:
            options = {"threshold": self.record["threshold"], "post": self.job.post}
            found, small = label_large(source, settings, self.segmenter, self.named, part, watch, **options)
            facts.update(found)
            shown.append(small)

        def overlay(part: Path) -> None:
            shown[0].overlay().save(part, format="PNG")

        def record(part: Path) -> None:
            seconds = {"seconds": round(time.perf_counter() - began, 3)}
            part.write_text(_text(row | facts | seconds | self.record | settings, facts["shares"]), "utf-8")

        saves = {"video": (video, record), "tiled": (mask, overlay, record)}[settings["kind"]]
        files = list(map(Path, picture["files"]))
        files[0].parent.mkdir(parents=True, exist_ok=True)
        write_whole(dict(zip(files, saves, strict=True)), self.mark)


def save(found: Segmentation, record: dict[str, Any], files: dict[str, Path], mark: str = "") -> None:
    """Write those of `OUTPUTS` that `files` has a path for; the record is a row and what `described` says."""
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    write = writers(found, record)
    write_whole({path: write[output] for output, path in files.items()}, mark)


def _text(record: dict[str, Any], shares: dict[str, float]) -> str:
    """A record as JSON, each class with its share, and each row of what changes "over_time" on a line of its own."""
    classes = [entry | {"share": shares[entry["name"]]} for entry in record["classes"]]
    plain = {key: value for key, value in record.items() if key not in ("shares", "over_time")}
    text = json.dumps(plain | {"classes": classes}, indent=2, ensure_ascii=False)
    if "over_time" in record:
        rows = ",\n    ".join(map(json.dumps, record["over_time"]))
        text = text.removesuffix("\n}") + f',\n  "over_time": [\n    {rows}\n  ]\n}}'
    return text + "\n"


def plan_files(
    found: Sequence[tuple[Path | str, Path]],
    out: Path,
    record: dict[str, Any],
    overwrite: bool,
    special: Mapping[Path | str, dict[str, Any]] = MappingProxyType({}),
) -> tuple[list[dict], int, list[tuple[str, str]]]:
    """Tasks for a `Writer`, one per picture; how many pictures have results; and those with files in the way, and why.

    `found` are pictures and, below the folder `out`, the paths of their results without suffix. A picture that has
    changed since is segmented again, as far as that is known: of an address or a camera it is not. `special` are the
    settings of those that are no plain pictures.

    Raises:
        ValueError: a result there was made with other settings, and is not to be overwritten.
    """
    tasks, skipped, failed = [], 0, []
    for path, result in found:
        settings = special.get(path, {})
        endings = KINDS[settings.get("kind", "picture")]
        files = [out / result.parent / f"{result.name}{suffix}" for suffix in endings]
        try:
            there = [] if overwrite else [file.name for file in files if file.exists()]
        except OSError as error:
            failed.append((str(path), str(error)))
            continue
        before = _record_of(files[-1], path) if there else None  # the last file to be renamed
        if before:
            _check_settings(files[-1], before, record | settings)
        if not there or before and _changed(path, before):
            picture = _picture(path) | {"files": list(map(os.path.abspath, files))}
            picture |= {"settings": settings} if settings else {}
            tasks.append({"pictures": [picture]})
        elif before:
            skipped += 1
        else:
            what = f"{', '.join(there)} in {files[0].parent} {'is' if len(there) == 1 else 'are'}"
            failed.append((str(path), f"{what} another picture's results, or incomplete; --overwrite replaces them"))
    return tasks, skipped, failed


def plan_shards(
    found: Sequence[tuple[Path | str, Path]], out: Path, record: dict[str, object], overwrite: bool
) -> tuple[list[dict], int, list[Path]]:
    """Tasks for a `Writer`, one per Parquet file; how many pictures are already in such files; what to remove last.

    Raises:
        ValueError: as `shards`, or a file there was made with other settings or of pictures that have changed since,
            and is not to be overwritten.
    """
    there = list(shards(out))
    done: dict[str, dict] = {}
    for path, before in [] if overwrite else there:
        _check_settings(path, before, record)
        done |= {row["path"]: row for row in read_rows(path, ["path", "bytes", "modified"])}
    pictures = [_picture(path) for path, _ in found]
    for picture in pictures:
        if _changed(picture["path"], done.get(printable(picture["path"]), {})):
            raise ValueError(f"{picture['image']} has changed since it was segmented: another --out, or --overwrite")
    todo = [picture for picture in pictures if printable(picture["path"]) not in done]
    size = min(max(SHARD[0], len(todo) // SHARD[1]), SHARD[1])
    tasks = []
    for start in range(0, len(todo), size):
        pictures = todo[start : start + size]
        # The same name for the same pictures, so that a second attempt replaces the first.
        name = hashlib.blake2b(json.dumps(pictures).encode(), digest_size=8).hexdigest()
        tasks.append({"pictures": pictures, "shard": os.path.abspath(out / f"masks-{name}.parquet")})
    written = {task["shard"] for task in tasks}
    stale = [path for path, _ in there if overwrite and os.path.abspath(path) not in written]
    return tasks, len(found) - len(todo), stale


def _picture(path: Path | str) -> dict[str, Any]:
    return {"path": _place(path), "image": str(path)}


def _place(path: Path | str) -> str:
    """What tells a picture from all others: its path without links, its address, or the camera."""
    return os.path.realpath(path) if is_path(path) else str(path)


def _record_of(file: Path, path: Path | str) -> dict[str, Any] | None:
    """What a JSON file says of the results next to it, if they are of this picture."""
    try:
        record = parse_json(file.read_text("utf-8"))
        classes = [{key: value for key, value in entry.items() if key not in FOUND} for entry in record["classes"]]
        return record | {"classes": classes} if record["path"] == printable(_place(path)) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _check_settings(path: Path, before: dict[str, Any], record: dict[str, Any]) -> None:
    """Refuse results of other settings; what an older version did not write down does not count."""
    others = differing([key for key in record if key in before], before, record)
    if others:
        raise ValueError(f"{path} was made with other {', '.join(others)}: another --out, or --overwrite")


def _stamp(path: Path | str) -> dict[str, int]:
    """What tells a picture from another of the same path; nothing if there is none, which opening it will say."""
    try:
        return dict(zip(("bytes", "modified"), stamp(path), strict=True))
    except OSError:
        return {}


def _changed(path: Path | str, before: dict[str, Any]) -> bool:
    """Whether a picture is not the one that a result is of."""
    return any(before.get(key, value) != value for key, value in _stamp(path).items())
