"""Large and georeferenced pictures, tile by tile, in memory that does not grow with the picture."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from rfclip import formats
from rfclip.datasets.names import ClassNames
from rfclip.methods.rule import Rule
from rfclip.segment.classes import title
from rfclip.segment.drawing import class_colours
from rfclip.segment.result import Segmentation
from rfclip.segment.segmenter import Segmenter
from rfclip.segment.windows import Windows
from rfclip.tiny.scenes import MARK

if TYPE_CHECKING:
    from rasterio.io import DatasetReader
    from rasterio.windows import Window

# GDAL's name of a format by a file's first bytes. It has others, which name files and addresses for it to read.
DRIVERS = {b"II": "GTiff", b"MM": "GTiff", b"\xff\xd8": "JPEG", b"\x89P": "PNG"} | dict.fromkeys(
    (b"\0\0", b"\xff\x4f"), "JP2OpenJPEG"
)
CACHE = 256  # MB of decoded tiles that GDAL keeps
BLOCK = 2048  # pixels: the side of what is segmented at a time, at most
SOURCE = 4096  # pixels: the side of what is read from a file at a time, at most, to be resized
TILE = 512  # pixels: the side of the mask's tiles, roughly
SHOWN = 2048  # pixels: the longer side of the overlay, at most
PAMR = 10 * 16  # pixels: how far PAMR's ten iterations reach
NOTHING = 255  # the label of pixels that are in no class, or without data
DARK = 32  # of 255: a picture without a brighter value is said to be dark
RANGE = "give --range LOW,HIGH, the values that are black and white"


Area = tuple[int, int, int, int]  # top, left, height and width


@dataclass(frozen=True)
class Raster:
    """An open file, or an overview in it, as an RGB picture of 8 bits a channel, at some size.

    Attributes:
        bands: those that are red, green and blue, from 1.
        values: what is black and what is white; None: as in any picture.
    """

    dataset: DatasetReader
    height: int
    width: int
    bands: Sequence[int]
    values: Sequence[float] | None

    def areas(self, side: int) -> list[Area]:
        """Squares that cover the picture, row by row, cut off at the right and at the bottom."""
        places = [(top, left) for top in range(0, self.height, side) for left in range(0, self.width, side)]
        return [(top, left, min(side, self.height - top), min(side, self.width - left)) for top, left in places]

    @property
    def side(self) -> int:
        """Of the largest square that is read at a time."""
        return max(1, int(SOURCE / max(1, self.dataset.height / self.height, self.dataset.width / self.width)))

    def read(self, area: Area) -> tuple[Image.Image, np.ndarray]:
        """A part, and which of its pixels have data, bool [height, width]; those without are white.

        However a picture is divided, its parts are those of the whole.
        """
        from rasterio.windows import Window

        dataset, (top, left, height, width) = self.dataset, area
        down = _span(top, height, dataset.height, self.height)
        across = _span(left, width, dataset.width, self.width)
        window = Window.from_slices((down.first, down.stop), (across.first, across.stop))
        pixels = dataset.read(self.bands, window=window)
        there = (dataset.dataset_mask(window=window) > 0) & np.isfinite(pixels).all(axis=0)
        pixels[:, ~there] = 0
        pixels = pixels.transpose(1, 2, 0)
        colours = _colours(dataset, self.bands)
        image = self._bytes(pixels if colours is None else colours[pixels[..., 0]])
        image.paste("white", mask=Image.fromarray(~there))
        if dataset.shape != (self.height, self.width):
            image = _resized(image, Window(across.start, down.start, across.length, down.length), (height, width))
            there = there[down.nearest][:, across.nearest]
        tags = dataset.tags()
        if MARK["Software"] in (tags.get("Software"), tags.get("TIFFTAG_SOFTWARE")):
            image.info.update(MARK)
        return image, there

    def _bytes(self, pixels: np.ndarray) -> Image.Image:
        if self.values is not None:
            low, high = self.values
            pixels = np.clip((pixels.astype(np.result_type(pixels, np.float32)) - low) / (high - low), 0, 1)
        elif pixels.dtype.kind == "f":
            if not (pixels.min() >= 0 and pixels.max() <= 1):
                raise ValueError(
                    f"its values go from {pixels.min():.4g} to {pixels.max():.4g}, not from 0 to 1: {RANGE}"
                )
        elif pixels.dtype not in (np.uint8, np.uint16):
            raise ValueError(f"its values are {pixels.dtype}: {RANGE}")
        return formats.from_array(pixels)


class Span(NamedTuple):
    """What a part of a picture is of the file's, along an axis: pixels to read, and of these where the part lies."""

    first: int
    stop: int
    start: float
    length: float
    nearest: np.ndarray


def _span(start: int, count: int, old: int, new: int) -> Span:
    """For `count` of `new` pixels, which `old` ones are resized to by bicubic interpolation."""
    ratio = old / new
    beyond = 2 * max(1, ratio) if old != new else 0
    first, stop = max(0, math.floor(start * ratio - beyond)), min(old, math.ceil((start + count) * ratio + beyond))
    nearest = ((np.arange(start, start + count) + 0.5) * ratio).astype(int).clip(max=old - 1) - first
    return Span(first, stop, start * ratio - first, count * ratio, nearest)


def _resized(image: Image.Image, window: Window, size: tuple[int, int]) -> Image.Image:
    """A window of a picture, whose sides may lie between pixels, at (height, width), by GDAL: Pillow rounds them."""
    from rasterio.enums import Resampling
    from rasterio.io import MemoryFile

    shape = {"width": image.width, "height": image.height, "count": 3, "dtype": "uint8"}
    with MemoryFile() as memory:
        with memory.open(driver="GTiff", **shape) as file:
            file.write(np.asarray(image).transpose(2, 0, 1))
        with memory.open() as file:
            pixels = file.read(window=window, out_shape=(3, *size), resampling=Resampling.cubic)
    return Image.fromarray(pixels.transpose(1, 2, 0))


def label_large(
    source: str,
    settings: dict[str, Any],
    segmenter: Segmenter,
    named: ClassNames,
    path: Path,
    watch: Callable[[int, int | None], None],
    *,
    threshold: float | None,
    post: str | None,
) -> tuple[dict[str, Any], Segmentation]:
    """Write the mask as a GeoTIFF, on the picture's own grid if it is not scaled.

    Labels are those that the picture would get at once, at its own size times the scale: each block is segmented with
    all the windows that touch it. Pixels without data are in no class.

    Args:
        source: a file.
        settings: "scale", "bands" and "range".
        segmenter, named, threshold, post: as for `Segmenter.segment`.
        path: of the mask; its suffix does not matter.
        watch: is told how many blocks are done, and of how many.

    Returns:
        What the record says of the picture, and the classes' "shares" of it; and the labels on a small picture of it.

    Raises:
        ValueError: the file cannot be read so or is smaller than a window, or the method looks at pictures as a whole.
        OSError: the mask cannot be written.
    """
    post = segmenter.protocol.post if post is None else post
    names, windows = tuple(map(title, named)), segmenter.windows
    _check_local(segmenter, post)
    with _opened(source, settings, settings["scale"]) as raster:
        size = raster.height, raster.width
        with _opened(source, settings, min(1, SHOWN / max(size)) * settings["scale"]) as small:
            shown = _shown(small, source)
        side = math.isqrt(segmenter.memory_limit // (16 * sum(map(len, named))))  # logits of float32, and as much again
        side, unit = min(BLOCK, raster.side, side), math.lcm(16, windows.stride)
        tile = unit * max(1, min(TILE, side) // unit)
        side = tile * max(1, side // tile)  # so that a block is of whole tiles, and begins where a window does
        areas = raster.areas(side)
        pixels, data = np.zeros(256, np.int64), 0
        with _created(path, raster, tile, names) as write:
            for done, area in enumerate(areas, 1):
                labels, there = _labels(raster, area, segmenter, named, threshold, post)
                write(labels, area)
                pixels, data = pixels + np.bincount(labels.ravel(), minlength=256), data + int(there.sum())
                watch(done, len(areas))
    facts = {
        "width": size[1],
        "height": size[0],
        "rgb_bands": list(raster.bands),
        "data": data / math.prod(size),
        "shares": {name: int(count) / math.prod(size) for name, count in zip(names, pixels, strict=False)},
    }
    with _writing():
        small_labels = _read_back(path, pixels, shown.size)
    return facts, Segmentation(shown, small_labels, names)


def _check_local(segmenter: Segmenter, post: str) -> None:
    """Refuse a protocol by which the labels of a part depend on the rest of the picture."""
    protocol, rule = segmenter.protocol, segmenter.protocol.load_rule()
    if (
        segmenter.windows.window is None
        or protocol.resizing not in ("antialiased", "mmcv")
        or rule.image == "picture"
        or rule.regional
        or type(rule).picture is not Rule.picture
        or type(rule).labels is not Rule.labels
    ):
        raise ValueError("its protocol looks at pictures as a whole, and not tile by tile: --protocol common does not")
    if post == "pearl":
        raise ValueError(
            "PEARL's propagation looks at pictures as a whole, and not tile by tile: give --post none or pamr"
        )


@contextlib.contextmanager
def _opened(source: str, settings: dict[str, Any], scale: float) -> Iterator[Raster]:
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning, RasterioIOError

    with open(source, "rb") as file:
        driver = DRIVERS.get(file.read(2))
    if driver is None:
        raise ValueError("it is no TIFF, JPEG, PNG or JPEG 2000, which can be read tile by tile")
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(rasterio.Env(GDAL_CACHEMAX=CACHE))
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        try:
            dataset = stack.enter_context(rasterio.open(Path(source), driver=driver))
            _check(dataset)
            size = [max(1, round(side * scale)) for side in dataset.shape]
            bands = _rgb(dataset, settings["bands"])
            smaller = [level for level, factor in enumerate(dataset.overviews(bands[0])) if factor * scale <= 1]
            if smaller:
                dataset = stack.enter_context(rasterio.open(Path(source), driver=driver, overview_level=smaller[-1]))
            yield Raster(dataset, size[0], size[1], bands, settings["range"])
        except RasterioIOError as error:
            raise ValueError(f"{source} cannot be read tile by tile: {error.__cause__ or error}") from error


def _check(dataset: DatasetReader) -> None:
    """Refuse what would be seen wrongly, or takes too much memory."""
    if dataset.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES":
        raise ValueError("its values are 0 where it is white: convert it")
    if dataset.tags().get("EXIF_Orientation", "1") != "1":
        raise ValueError("it is turned by its EXIF orientation: save it upright")
    limit, (rows, columns) = Image.MAX_IMAGE_PIXELS, dataset.block_shapes[0]
    if limit is not None and rows * columns > limit:
        raise ValueError(f"its tiles are of {columns} x {rows} pixels: save it with smaller ones")


def _rgb(dataset: DatasetReader, given: Sequence[int] | None) -> Sequence[int]:
    """The bands that are red, green and blue: those given, those that the file calls so, the first three, or one."""
    from rasterio.enums import ColorInterp

    kinds, colours = dataset.colorinterp, (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
    if given is not None and max(given) > dataset.count:
        raise ValueError(f"--bands {','.join(map(str, given))}: it has {dataset.count}")
    named = [kinds.index(each) + 1 for each in colours if each in kinds]
    return given or (named if len(named) == 3 else [1, 2, 3] if dataset.count >= 3 else [1, 1, 1])


def _colours(dataset: DatasetReader, bands: Sequence[int]) -> np.ndarray | None:
    """The colour table of an indexed picture, uint8 [values, 3]."""
    from rasterio.enums import ColorInterp

    if dataset.colorinterp[bands[0] - 1] != ColorInterp.palette:
        return None
    table = np.zeros((np.iinfo(dataset.dtypes[0]).max + 1, 3), np.uint8)
    for index, colour in dataset.colormap(bands[0]).items():
        table[index] = colour[:3]
    return table


def _shown(raster: Raster, source: str) -> Image.Image:
    """A small picture for people, which also tells whether the large one can be seen at all."""
    image, brightest = Image.new("RGB", (raster.width, raster.height)), 0
    for area in raster.areas(raster.side):
        part, there = raster.read(area)
        image.paste(part, (area[1], area[0]))
        brightest = max(brightest, int(np.asarray(part)[there].max(initial=0)))
    if raster.values is None and 0 < brightest < DARK:
        warnings.warn(f"{source} is nearly black, so that little is seen: {RANGE}", stacklevel=3)
    return image


def _labels(
    raster: Raster,
    area: Area,
    segmenter: Segmenter,
    named: ClassNames,
    threshold: float | None,
    post: str,
) -> tuple[np.ndarray, np.ndarray]:
    """The labels of an area, and which of its pixels have data."""
    top, left, height, width = area
    windows, beyond = segmenter.windows, PAMR if post == "pamr" else 0
    first, last = _touching(windows, raster.height, top - beyond, top + height + beyond)
    start, end = _touching(windows, raster.width, left - beyond, left + width + beyond)
    rgb, there = raster.read((first, start, last - first, end - start))
    inside = slice(top - first, top - first + height), slice(left - start, left - start + width)
    there = there[inside]
    if not there.any():
        return np.full((height, width), NOTHING, np.uint8), there
    near = copy.copy(segmenter)  # which sees the picture at its own size
    near.windows = replace(windows, short_side=min(rgb.size), long_side=None)
    labels = near.segment(rgb, named, threshold=threshold, post=post).labels[inside]
    return np.where(there, labels, np.uint8(NOTHING)), there


def _touching(windows: Windows, length: int, start: int, stop: int) -> tuple[int, int]:
    """Where the first window begins, and the last ends, of those that see pixels from start to stop along an axis."""
    side = windows.window
    assert side is not None
    if length < side:
        raise ValueError(f"it has {length} pixels along a side, and a window has {side}: give a larger --scale")
    starts = [top for top, _ in windows.corners(length, side) if top < stop and start < top + side]
    return starts[0], starts[-1] + side


@contextlib.contextmanager
def _created(
    path: Path, raster: Raster, tile: int, names: tuple[str, ...]
) -> Iterator[Callable[[np.ndarray, Area], None]]:
    """A new mask with the colours and names of its classes, and what writes labels to an area of it."""
    import rasterio
    from rasterio.windows import Window

    old = raster.dataset.transform
    place: dict[str, Any] = {"crs": raster.dataset.crs} if raster.dataset.crs else {}
    if not old.is_identity:
        down, across = raster.dataset.height / raster.height, raster.dataset.width / raster.width
        place["transform"] = rasterio.Affine(old.a * across, old.b * down, old.c, old.d * across, old.e * down, old.f)
    colours = class_colours(names)
    form = {"driver": "GTiff", "tiled": True, "blockxsize": tile, "blockysize": tile, "compress": "deflate"}
    size = {"width": raster.width, "height": raster.height, "count": 1, "dtype": "uint8", "nodata": NOTHING}
    with _writing():
        mask = rasterio.open(path, "w", BIGTIFF="IF_SAFER", **form, **size, **place)
    with mask:
        mask.write_colormap(1, {index: (*colours[name], 255) for index, name in enumerate(names)})
        mask.update_tags(classes=json.dumps(names, ensure_ascii=False))
        mask.update_tags(1, **{f"class_{index}": name for index, name in enumerate(names)})

        def write(labels: np.ndarray, area: Area) -> None:
            top, left, height, width = area
            with _writing():
                mask.write(labels, 1, window=Window(left, top, width, height))

        yield write


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Of an error, say that it is not one of reading."""
    from rasterio.errors import RasterioIOError

    try:
        yield
    except RasterioIOError as error:
        raise OSError(f"its mask cannot be written: {error.__cause__ or error}") from error


def _read_back(path: Path, pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The labels of the mask at a smaller size; GDAL does not always say that a disk is full."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, driver="GTiff") as mask:
            written = sum(np.bincount(mask.read(1, window=w).ravel(), minlength=256) for _, w in mask.block_windows(1))
            if not np.array_equal(written, pixels):
                raise OSError("its mask cannot be written whole: is the disk full?")
            return mask.read(1, out_shape=size[::-1])
