"""A temporary folder that the next start removes if its own process could not."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

PREFIX = "rfclip-serve-"
LOCK = ".rfclip-serve.lock"  # held by the living: the system lets go of it however a process ends


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A new folder, removed afterwards; those that dead processes of the same user left are removed first."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if not left.is_symlink() and left.is_dir() and _ours(left) and _dead(left):
            _remove(left)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    try:
        with _held(folder):
            yield folder
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a folder, its lock last: what cannot be removed now keeps it, and goes at the next start."""
    for _ in range(3):  # a thread may still write
        with contextlib.suppress(OSError):
            for path in folder.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != LOCK:
                    path.unlink()
            shutil.rmtree(folder)
            return


if sys.platform == "win32":

    def _ours(folder: Path) -> bool:
        return True  # the folder for temporary files is each user's own

    def _held(folder: Path) -> IO[bytes]:
        return (folder / LOCK).open("wb")  # an open file cannot be removed

    def _dead(folder: Path) -> bool:
        try:
            (folder / LOCK).unlink()
        except OSError:
            return False
        return True

else:
    import fcntl

    def _ours(folder: Path) -> bool:
        return folder.lstat().st_uid == os.geteuid()

    def _held(folder: Path) -> IO[bytes]:
        new = folder / f"{LOCK}.new"
        file = new.open("wb")
        fcntl.flock(file, fcntl.LOCK_EX)
        new.rename(folder / LOCK)  # only now, so that nobody finds it without its lock
        return file

    def _dead(folder: Path) -> bool:
        try:
            file = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        finally:
            os.close(file)
        return True
