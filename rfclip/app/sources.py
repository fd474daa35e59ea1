"""What `rfclip segment` takes beside plain pictures: addresses on the web, videos, cameras, and what goes in tiles."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from rfclip.extras import require
from rfclip.files import OUTPUTS, TILED_OUTPUTS, VIDEO_OUTPUTS

# What there is to segment, and the endings of its results.
KINDS = {"picture": OUTPUTS, "video": VIDEO_OUTPUTS, "tiled": TILED_OUTPUTS}
VIDEOS = (".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv")
GEOREFERENCED = (33550, 33922, 34264, 34735)  # tags of GeoTIFF: pixels, points, a matrix, and coordinates


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
    found: Sequence[tuple[Path | str, Path]],
    *,
    stride: int | None = None,
    scale: float | None = None,
    bands: str | None = None,
    values: str | None = None,
    files: bool = True,
    here: bool = True,
) -> tuple[dict[Path | str, dict[str, Any]], list[tuple[str, str]]]:
    """For what is no plain picture its "kind", one of `KINDS`, and its other settings; and what fails, and why.

    Videos are known by their suffix. Pictures go tile by tile if they are georeferenced or exceed Pillow's limit of
    pixels, and all of them if one of the options for such pictures is given.

    Args:
        found: as `find_images` returns it.
        stride: of the frames of videos that are segmented; None: 1.
        scale: of pictures in tiles; None: 1.
        bands: of pictures in tiles, which are red, green and blue; None: see `large`.
        values: of pictures in tiles, which are black and white; None: as in any picture.
        files: whether results are written as files, and not as Parquet.
        here: whether this process does the work.

    Raises:
        ValueError: an extra is needed and missing, or an option is not as expected, or for what is not there.
    """
    tiling: dict[str, Any] = {
        "kind": "tiled",
        "scale": 1.0 if scale is None else scale,
        "bands": bands and _numbers("--bands", bands, int, 3),
        "range": values and _numbers("--range", values, float, 2),
        "short_side": None,  # instead of the scale
        "long_side": None,
    }
    if not 0 < tiling["scale"] < math.inf:
        raise ValueError(f"--scale {scale}: expected a number above 0")
    if bands and min(tiling["bands"]) < 1:
        raise ValueError(f"--bands {bands}: bands count from 1")
    if values and not -math.inf < tiling["range"][0] < tiling["range"][1] < math.inf:
        raise ValueError(f"--range {values}: expected the lower value first")
    asked = scale is not None or bands is not None or values is not None
    settings: dict[Path | str, dict[str, Any]] = {}
    failed = []
    for path, _ in found:
        if camera(path) or (is_path(path) and Path(path).suffix.lower() in VIDEOS):
            require(str(path), "video", "av")
            settings[path] = {"kind": "video", "frame_stride": stride or 1}
        elif is_path(path) and (asked or _in_tiles(Path(path))):
            require(str(path), "geo", "rasterio")
            settings[path] = tiling
        if path in settings and not files:
            failed.append((str(path), "only plain pictures become masks in Parquet: leave out --format parquet"))
        elif camera(path) and not here:
            failed.append((str(path), "a camera is of this computer: leave out --engine ray"))
        elif is_url(path) and asked:
            failed.append((str(path), "--scale, --bands and --range are for files: download it first"))
    if stride and not any(each["kind"] == "video" for each in settings.values()):
        raise ValueError("--stride is that of a video's frames, and no video is given")
    if asked and tiling not in settings.values() and not failed:
        raise ValueError("--scale, --bands and --range are for pictures that are files, and none is given")
    return settings, failed


def _numbers(option: str, text: str, kind: type[int] | type[float], count: int) -> list[Any]:
    try:
        found = [kind(number) for number in text.split(",")]
    except ValueError:
        found = []
    if len(found) != count:
        raise ValueError(f"{option} {text}: expected {count} numbers with commas between them")
    return found


def _in_tiles(path: Path) -> bool:
    """Whether a picture is georeferenced, or has too many pixels to be read at once; other files are not."""
    import tifffile
    from PIL import Image

    from rfclip.formats import TIFF_HEADS

    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            head = file.read(4)
            file.seek(0)
            if head not in TIFF_HEADS:
                width, height = Image.open(file).size
            else:
                page: Any = tifffile.TiffFile(file).pages[0]
                if any(tag in page.tags for tag in GEOREFERENCED):
                    return True
                width, height = page.imagewidth, page.imagelength
    except Image.DecompressionBombError:
        return True
    except Exception:  # whatever a damaged file makes its reader stumble over: reading it will say so
        return False
    return Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS
