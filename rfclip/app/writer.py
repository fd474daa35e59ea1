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
from pathlib import Path
from typing import Any

from rfclip.datasets.names import ClassNames
from rfclip.files import OUTPUTS, parse_json, printable, stamp, write_whole
from rfclip.images import to_rgb
from rfclip.outputs import encode, read_rows, shards, write_shard
from rfclip.segment.classes import Background, title
from rfclip.segment.job import Job, differing
from rfclip.segment.result import Segmentation
from rfclip.segment.segmenter import Segmenter

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # after which no other file can be written either
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
    its `OUTPUTS`; or, instead of all "files", one "shard", the path of a Parquet file. The result says under "done" how
    many pictures were written, and under "failed" image and reason of each of the others.

    Args:
        job: the model with its settings.
        named: the names of each class.
        record: what `described` says of them.
        segmenter: the job's, if there is one already.
        mark: of its temporary files, as for `write_whole`.
    """

    def __init__(
        self, job: Job, named: ClassNames, record: dict[str, Any], segmenter: Segmenter | None = None, mark: str = ""
    ) -> None:
        self.job, self.named, self.record, self.mark = job, named, record, mark
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
                found = self.segmenter.segment(
                    to_rgb(picture["path"]), self.named, threshold=self.record["threshold"], pamr=self.job.pamr
                )
                row: dict[str, Any] = {"image": printable(picture["image"]), "path": printable(picture["path"])}
                row |= before | {"width": found.image.width, "height": found.image.height}
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


def save(found: Segmentation, record: dict[str, Any], files: dict[str, Path], mark: str = "") -> None:
    """Write those of `OUTPUTS` that `files` has a path for; the record is a row and what `described` says."""
    shares = found.shares
    classes = [entry | {"share": shares[entry["name"]]} for entry in record["classes"]]
    text = json.dumps(record | {"classes": classes}, indent=2, ensure_ascii=False) + "\n"
    mask, overlay, written = OUTPUTS
    saves = {
        mask: lambda part: found.mask().save(part, format="PNG"),
        overlay: lambda part: found.overlay().save(part, format="PNG"),
        written: lambda part: part.write_text(text, "utf-8"),
    }
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole({path: saves[output] for output, path in files.items()}, mark)


def plan_files(
    found: list[tuple[Path, Path]], out: Path, record: dict[str, Any], overwrite: bool
) -> tuple[list[dict], int, list[tuple[str, str]]]:
    """Tasks for a `Writer`, one per picture; how many pictures have results; and those with files in the way, and why.

    `found` are pictures and, below the folder `out`, the paths of their results without suffix. A picture that has
    changed since is segmented again.

    Raises:
        ValueError: a result there was made with other settings, and is not to be overwritten.
    """
    tasks, skipped, failed = [], 0, []
    for path, result in found:
        files = [out / result.parent / f"{result.name}{suffix}" for suffix in OUTPUTS]
        try:
            there = [] if overwrite else [file.name for file in files if file.exists()]
        except OSError as error:
            failed.append((str(path), str(error)))
            continue
        before = _record_of(files[-1], path) if there else None  # the last file to be renamed
        if before:
            _check_settings(files[-1], before, record)
        if not there or before and _changed(path, before):
            picture = _picture(path) | {"files": list(map(os.path.abspath, files))}
            tasks.append({"pictures": [picture]})
        elif before:
            skipped += 1
        else:
            what = f"{', '.join(there)} in {files[0].parent} {'is' if len(there) == 1 else 'are'}"
            failed.append((str(path), f"{what} another picture's results, or incomplete; --overwrite replaces them"))
    return tasks, skipped, failed


def plan_shards(
    found: list[tuple[Path, Path]], out: Path, record: dict[str, object], overwrite: bool
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


def _picture(path: Path) -> dict[str, str]:
    return {"path": os.path.realpath(path), "image": str(path)}


def _record_of(file: Path, path: Path) -> dict[str, Any] | None:
    """What a JSON file says of the results next to it, if they are of this picture."""
    try:
        record = parse_json(file.read_text("utf-8"))
        classes = [{key: value for key, value in entry.items() if key != "share"} for entry in record["classes"]]
        return record | {"classes": classes} if record["path"] == printable(os.path.realpath(path)) else None
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
