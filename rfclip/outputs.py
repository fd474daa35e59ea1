"""Parquet files of masks, which `rfclip segment --format parquet` writes.

A row of a file is a picture: `image`, its path as given; `path`, the full path, which tells pictures apart; `width`,
`height`, `seconds`; and the mask as runs in row-major order: `lengths` pixels have the label in `values`. The file's
metadata "rfclip" is JSON that says what the labels mean and how they were made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np

from rfclip.extras import require
from rfclip.files import parse_json, write_whole


def encode(labels: np.ndarray) -> dict[str, np.ndarray]:
    """The runs of labels [H, W] in row-major order: `np.repeat(values, lengths).reshape(H, W)` restores them."""
    flat = labels.ravel()
    starts = np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1])
    return {"values": flat[starts], "lengths": np.diff(starts, append=flat.size)}


def write_shard(path: Path, rows: list[dict], record: dict[str, object], mark: str = "") -> None:
    """Write pictures' rows, and what their labels mean, to a Parquet file; `mark` as for `write_whole`."""
    pyarrow, parquet = _pyarrow()
    columns = {"image": "string", "path": "string", "bytes": "int64", "modified": "int64"}
    columns |= {"width": "int32", "height": "int32", "seconds": "float64"}
    schema = pyarrow.schema(
        [
            *columns.items(),
            ("values", pyarrow.list_(pyarrow.uint8())),
            ("lengths", pyarrow.list_(pyarrow.uint32())),
        ],
        metadata={"rfclip": json.dumps(record)},
    )
    table = pyarrow.Table.from_pylist(rows, schema=schema)

    def save(part: Path) -> None:
        with part.open("wb") as file:  # pyarrow takes only UTF-8 paths
            parquet.write_table(table, file)

    write_whole({path: save}, mark)


def shards(folder: Path) -> Iterator[tuple[Path, dict[str, object]]]:
    """The Parquet files that `write_shard` wrote to a folder, and what their labels mean.

    Raises:
        ValueError: pyarrow is not installed, or a file of such a name is not one of these.
    """
    _, parquet = _pyarrow()
    for path in sorted(folder.glob("masks-*.parquet")):
        try:
            with path.open("rb") as file:
                record = dict(parse_json(parquet.read_schema(file).metadata[b"rfclip"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a file of masks that `rfclip segment` wrote: {error}") from error
        yield path, record


def read_masks(folder: Path | str) -> Iterator[tuple[str, np.ndarray]]:
    """Every picture in a folder's Parquet files: its path as given, and its labels, uint8 [H, W].

    Raises:
        ValueError: as `shards`, or a file is damaged, or there is no such folder or no such file in it.
    """
    there = [path for path, _ in shards(Path(folder))]
    if not there:
        raise ValueError(
            f"{folder}: {'no masks-*.parquet in this folder' if Path(folder).is_dir() else 'no such folder'}"
        )
    return _labels_in(there)


def _labels_in(paths: list[Path]) -> Iterator[tuple[str, np.ndarray]]:
    for path in paths:
        for row in read_rows(path, ["image", "height", "width", "values", "lengths"]):
            labels = np.repeat(np.array(row["values"], np.uint8), row["lengths"])
            yield row["image"], labels.reshape(row["height"], row["width"])


def read_rows(path: Path, columns: list[str]) -> list[dict]:
    """Those columns of a Parquet file that it has.

    Raises:
        ValueError: the file is damaged.
    """
    _, parquet = _pyarrow()
    try:
        with path.open("rb") as file:
            there = set(parquet.read_schema(file).names)
            return parquet.read_table(file, columns=[name for name in columns if name in there]).to_pylist()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _pyarrow() -> tuple[ModuleType, ModuleType]:
    require("--format parquet", "parquet", "pyarrow")
    import pyarrow
    from pyarrow import parquet

    return pyarrow, parquet
