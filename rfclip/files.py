"""Files that are whole under their final name, or not there."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path


def printable(path: Path | str) -> str:
    """A path as text that every file can hold, another for another path."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def write_whole(saves: dict[Path, Callable[[Path], object]]) -> None:
    """Save each file under a temporary name beside its own, and rename them once all are written.

    The temporary names are of this call alone, so that two processes may write the same file.
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
