"""What `rfclip segment` writes: three files for each picture, or Parquet files of many pictures' run-length masks.

A row of a Parquet file is a picture: `image` (its path as given), `width`, `height`, `seconds`, and the mask as runs,
row by row from the left: as many pixels as `lengths` says have the label in `values`. The file's metadata "rfclip" is
JSON that says what the labels mean and how they came about.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rfclip import __version__
from rfclip.config import RefocusConfig
from rfclip.files import write_whole
from rfclip.segmenter import Segmentation, Segmenter

OUTPUTS = (".mask.png", ".overlay.png", ".json")
SHARD = 8, 64  # pictures in a Parquet file, for few pictures and for many


@dataclass(frozen=True)
class Job:
    """What is done to every picture, by names, so that a worker elsewhere can do it; fields as on the command line."""

    classes: list[tuple[str, ...]]
    model: str
    pretrained: str | None
    config: RefocusConfig | None
    backend: str
    device: str
    precision: str
    threshold: float | None
    pamr: bool

    def segmenter(self, device: str | None = None) -> Segmenter:
        """On the job's device, or, to check everything but the device, on another: there in fp32 and on any backend."""
        asked = device in (None, self.device)
        return Segmenter(
            self.model,
            self.pretrained,
            config=self.config,
            backend=self.backend if asked else "auto",
            device=self.device if asked else device,
            precision=self.precision if asked else "fp32",
        )

    def described(self, segmenter: Segmenter) -> dict[str, object]:
        """What the labels mean and how they came about."""
        return {
            "classes": [
                {"index": index, "name": names[0], "synonyms": list(names[1:])}
                for index, names in enumerate(self.classes)
            ],
            "threshold": self.threshold,
            "pamr": self.pamr,
            "nothing": 255,
            "model": segmenter.name,
            "pretrained": segmenter.pretrained,
            "config": json.loads(segmenter.config.to_json()),
            "rfclip": __version__,
        }


class Writer:
    """A worker (see `rfclip.engines`) that segments the pictures of a task and writes what comes out.

    A task has "pictures", each with its "path", its "image", which is the path as it was given, and in "files" the
    paths of its `OUTPUTS`; or in place of all "files" one "shard", the path of a Parquet file. The result says in
    "done" how many pictures were written, and in "failed" image and reason of each of the others.
    """

    def __init__(self, job: Job, segmenter: Segmenter | None = None):
        self.job, self.segmenter = job, job.segmenter() if segmenter is None else segmenter
        self.described = job.described(self.segmenter)

    def __call__(self, task: dict) -> dict:
        rows, failed = [], []
        for picture in task["pictures"]:
            try:
                began = time.perf_counter()
                found = self.segmenter(
                    picture["path"], self.job.classes, threshold=self.job.threshold, pamr=self.job.pamr
                )
                row = {"image": printable(picture["image"]), "width": found.image.width, "height": found.image.height}
                row["seconds"] = round(time.perf_counter() - began, 3)
                if "shard" in task:
                    row |= encode(found.labels)
                else:
                    self._write_files(found, row, [Path(file) for file in picture["files"]])
                rows.append(row)
            except (ValueError, OSError, MemoryError, RuntimeError) as error:  # torch's lack of memory is the last
                failed.append([picture["image"], str(error).removeprefix(f"{picture['path']} ")])
        if "shard" in task and rows:
            write_shard(Path(task["shard"]), rows, self.described)
        return {"done": len(rows), "failed": failed}

    def _write_files(self, found: Segmentation, row: dict, files: list[Path]) -> None:
        shares = found.shares
        classes = [entry | {"share": shares[entry["name"]]} for entry in self.described["classes"]]
        text = json.dumps(row | self.described | {"classes": classes}, indent=2, ensure_ascii=False) + "\n"
        mask, overlay, record = files
        mask.parent.mkdir(parents=True, exist_ok=True)
        write_whole(
            {
                mask: lambda part: found.mask().save(part, format="PNG"),
                overlay: lambda part: found.overlay().save(part, format="PNG"),
                record: lambda part: part.write_text(text, "utf-8"),
            }
        )


def plan_files(
    found: list[tuple[Path, Path]], out: Path, overwrite: bool
) -> tuple[list[dict], int, list[tuple[str, str]]]:
    """Tasks for a `Writer`, one a picture; how many pictures have results; and those whose names others' results have.

    `found` are pictures and, below the folder `out`, the paths of their results without suffix.
    """
    tasks, skipped, failed = [], 0, []
    for path, result in found:
        files = [out / result.parent / f"{result.name}{suffix}" for suffix in OUTPUTS]
        if overwrite or not any(file.exists() for file in files):
            picture = {"path": os.path.abspath(path), "image": str(path), "files": list(map(os.path.abspath, files))}
            tasks.append({"pictures": [picture]})
        elif _same_picture(files[-1], path):
            skipped += 1
        else:
            failed.append((str(path), f"another picture's results are in {files[0].parent} under this name"))
    return tasks, skipped, failed


def plan_shards(
    found: list[tuple[Path, Path]], out: Path, described: dict[str, object], overwrite: bool
) -> tuple[list[dict], int]:
    """Tasks for a `Writer`, one a Parquet file, and how many pictures are in such files in `out` already.

    Raises:
        ValueError: as `shards`, or a file there came about otherwise than described, and is not to be overwritten.
    """
    done: set[str] = set()
    for path, before in list(shards(out)):
        differing = [key for key in described if before.get(key) != described[key]]
        if overwrite:
            path.unlink()
        elif differing:
            raise ValueError(f"{path} came about with other {', '.join(differing)}: another --out, or --overwrite")
        else:
            done.update(_pyarrow()[1].read_table(path, columns=["image"])["image"].to_pylist())
    todo = [path for path, _ in found if printable(path) not in done]
    size = min(max(SHARD[0], len(todo) // SHARD[1]), SHARD[1])
    tasks = []
    for start in range(0, len(todo), size):
        pictures = [{"path": os.path.abspath(path), "image": str(path)} for path in todo[start : start + size]]
        # The same name for the same pictures, so that a second try replaces the first.
        name = hashlib.blake2b(json.dumps(pictures).encode(), digest_size=8).hexdigest()
        tasks.append({"pictures": pictures, "shard": os.path.abspath(out / f"masks-{name}.parquet")})
    return tasks, len(found) - len(todo)


def _same_picture(record: Path, path: Path) -> bool:
    """Whether the results recorded there are of a picture of this file name; a missing or strange record says yes."""
    try:
        return Path(json.loads(record.read_text("utf-8"))["image"]).name == printable(path.name)
    except (OSError, ValueError, KeyError, TypeError):
        return True


def printable(path: Path | str) -> str:
    """A path as text that every file can hold."""
    return os.fsencode(path).decode("utf-8", "replace")


def encode(labels: np.ndarray) -> dict[str, np.ndarray]:
    """The runs of labels [H, W], read row by row: `np.repeat(values, lengths).reshape(H, W)` gives them back."""
    flat = labels.ravel()
    starts = np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1])
    return {"values": flat[starts], "lengths": np.diff(starts, append=flat.size)}


def write_shard(path: Path, rows: list[dict], described: dict[str, object]) -> None:
    """Write pictures' rows, and what their labels mean, as a Parquet file."""
    pyarrow, parquet = _pyarrow()
    columns = {"image": "string", "width": "int32", "height": "int32", "seconds": "float64"}
    schema = pyarrow.schema(
        [
            *columns.items(),
            ("values", pyarrow.list_(pyarrow.uint8())),
            ("lengths", pyarrow.list_(pyarrow.uint32())),
        ],
        metadata={"rfclip": json.dumps(described)},
    )
    table = pyarrow.Table.from_pylist(rows, schema=schema)
    write_whole({path: lambda part: parquet.write_table(table, part)})


def shards(folder: Path) -> Iterator[tuple[Path, dict[str, object]]]:
    """The Parquet files of a folder that `write_shard` wrote, and what their labels mean.

    Raises:
        ValueError: pyarrow is not installed, or a file of such a name is none of these.
    """
    _, parquet = _pyarrow()
    for path in sorted(folder.glob("masks-*.parquet")):
        try:
            described = json.loads(parquet.read_schema(path).metadata[b"rfclip"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a file of masks that `rfclip segment` wrote: {error}") from error
        yield path, described


def read_masks(folder: Path | str) -> Iterator[tuple[str, np.ndarray]]:
    """Every picture in a folder's Parquet files: its path as it was given, and its labels, uint8 [H, W].

    Raises:
        ValueError: as `shards`.
    """
    _, parquet = _pyarrow()
    for path, _ in shards(Path(folder)):
        for row in parquet.read_table(path).to_pylist():
            labels = np.repeat(np.array(row["values"], np.uint8), row["lengths"])
            yield row["image"], labels.reshape(row["height"], row["width"])


def _pyarrow():
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError('--format parquet needs pyarrow: pip install "rfclip[ray]"') from error
    return pyarrow, parquet
