"""Files that are whole under their final name, or not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(saves: dict[Path, Callable[[Path], object]]) -> None:
    """Save each file under a temporary name beside its own, and rename them once all are written."""
    parts = {path: path.with_name(f".{path.name}.part") for path in saves}
    try:
        for path, save in saves.items():
            save(parts[path])
        for path, part in parts.items():
            os.replace(part, path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
