"""Atomic writes: a file is complete under its final name, or absent."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

OUTPUTS = (".mask.png", ".overlay.png", ".json")  # endings of the files that `rfclip segment` writes per picture


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


def write_whole(saves: Mapping[Path, Callable[[Path], object]]) -> None:
    """Save each file under a temporary name next to its own, and rename them all once every one is written.

    Temporary names are unique to the call, so that two processes may write the same file.
    """
    mark = uuid.uuid4().hex[:8]
    parts = {path: path.with_name(f".{mark}-{number}.part") for number, path in enumerate(saves)}
    try:
        for path, save in saves.items():
            save(parts[path])
        for path, part in parts.items():
            os.replace(part, path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
