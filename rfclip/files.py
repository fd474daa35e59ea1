"""Files: atomic writes, where a file is complete under its final name or absent; names, stamps and JSON."""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Endings of the files that `rfclip segment` writes: per picture, video and picture in tiles, and any of them.
OUTPUTS = (".mask.png", ".overlay.png", ".json")
VIDEO_OUTPUTS = (".overlay.mp4", ".json")
TILED_OUTPUTS = (".mask.tif", ".overlay.png", ".json")
RESULTS = (*OUTPUTS, *VIDEO_OUTPUTS, *TILED_OUTPUTS)


def printable(path: Path | str) -> str:
    """A path as text that any file can hold; distinct paths stay distinct."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def stamp(path: Path | str) -> tuple[int, int]:
    """Size and time of a file, in bytes and nanoseconds, which tell it from another of the same path.

    Raises:
        OSError: there is no such file.
    """
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def same_name(path: Path) -> str:
    """Text that is equal for paths which name the same file: macOS and Windows ignore the case."""
    return str(path).casefold() if sys.platform in ("darwin", "win32") else str(path)


def parse_json(text: str | bytes) -> Any:
    """What JSON says; ValueError for whatever is wrong with it."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error


def write_whole(saves: Mapping[Path, Callable[[Path], object]], mark: str = "") -> None:
    """Save each file under a temporary name next to its own, and rename them all once every one is written.

    Temporary names are unique to the call, so that two processes may write the same file. They begin with a dot and
    the mark, so that what a killed process left can be found.
    """
    unique = f".{mark}{uuid.uuid4().hex[:8]}"
    parts = {path: path.with_name(f"{unique}-{number}.part") for number, path in enumerate(saves)}
    try:
        for path, save in saves.items():
            save(parts[path])
        for path, part in parts.items():
            os.replace(part, path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
