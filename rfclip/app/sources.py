"""What `rfclip segment` takes beside pictures: addresses on the web, videos and cameras."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from rfclip.extras import require
from rfclip.files import OUTPUTS, VIDEO_OUTPUTS

KINDS = {"picture": OUTPUTS, "video": VIDEO_OUTPUTS}  # what there is to segment, and the endings of its results
VIDEOS = tuple(
    [
        ".mp4",
        ".m4v",
        ".mov",
        ".3gp",
        ".mkv",
        ".webm",
        ".avi",
        ".mpg",
        ".mpeg",
        ".ts",
        ".mts",
        ".m2ts",
        ".wmv",
        ".flv",
        ".ogv",
    ]
)


def is_url(given: object) -> bool:
    """Whether this is the address of something on the web."""
    return isinstance(given, str) and given.lower().startswith(("http://", "https://"))


def camera(given: object) -> str | None:
    """The number, name or path of a camera, from camera:0 and the like; None if this is none."""
    found = re.fullmatch("camera:(.+)", given) if isinstance(given, str) else None
    return found and found[1]


def is_path(given: Path | str) -> bool:
    """Whether this is a file's path, and neither an address nor a camera."""
    return not is_url(given) and camera(given) is None


def result_name(given: str) -> Path | None:
    """The name, with its suffix, that the results of an address or a camera are called by; None if it is a path."""
    if is_path(given):
        return None
    if camera(given):
        name = given
    else:
        try:
            address = urlsplit(given)
        except ValueError as error:
            raise ValueError(f"{given}: not an address: {error}") from error
        name = PurePosixPath(unquote(address.path)).name or address.hostname or ""
    # Without what Windows does not allow in a name.
    return Path(re.sub(r'[\x00-\x1f\x7f<>:"/\\|?*]', "_", name)[-100:].strip(". ") or "picture")


def special(
    found: Sequence[tuple[Path | str, Path]], *, stride: int | None, files: bool, here: bool
) -> tuple[dict[Path | str, dict[str, Any]], list[tuple[str, str]]]:
    """For what is no plain picture its "kind", one of `KINDS`, and its other settings; and what fails, and why.

    Args:
        found: as `find_images` returns it.
        stride: of the frames of videos that are segmented; None: 1.
        files: whether results are written as files, and not as Parquet.
        here: whether this process does the work.

    Raises:
        ValueError: an extra is needed and missing, or an option is given for a kind that is not there.
    """
    settings: dict[Path | str, dict[str, Any]] = {}
    failed = []
    for path, _ in found:
        if camera(path) or (not is_url(path) and Path(path).suffix.lower() in VIDEOS):
            require(str(path), "video", "av")
            settings[path] = {"kind": "video", "frame_stride": stride or 1}
        if path in settings and not files:
            failed.append((str(path), "only pictures become masks in Parquet: leave out --format parquet"))
        elif camera(path) and not here:
            failed.append((str(path), "a camera is of this computer: leave out --engine ray"))
    if stride and not settings:
        raise ValueError("--stride is that of a video's frames, and no video is given")
    return settings, failed
