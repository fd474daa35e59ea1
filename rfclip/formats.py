"""Picture files: what Pillow opens, what is decoded here because Pillow reads it wrongly, and what is refused."""

from __future__ import annotations

import contextlib
import io
import math
import sys
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from rfclip.extras import require

if TYPE_CHECKING:
    from tifffile import TiffPage

STUB = "Pillow recognizes it, but does not decode it"
UNREAD = {  # formats of Pillow's
    "EPS": "it is a program, which Ghostscript would run",
    "FITS": "Pillow mixes up its byte order; convert it to TIFF",
    "BUFR": STUB,
    "GRIB": STUB,
    "HDF5": STUB,
    "MPEG": STUB,
} | ({} if sys.platform == "win32" else {"WMF": "Pillow decodes it on Windows only"})
HEIF, JXL = (".heic", ".heif", ".hif"), (".jxl",)
BATCH = "for several pictures, give a Segmenter a list of them, list(pictures)"

TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
RAW, JPEG, DEFLATE = 1, 7, (8, 32946)
BY_LIBTIFF = (RAW, 5, JPEG, *DEFLATE, 32773, 34925, 50000, 50001)  # LZW, PackBits, LZMA, Zstandard, WebP
REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))  # the bits of each byte
UNSIGNED, FLOAT = 1, 3  # kinds of samples
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, CMYK, YCBCR, LAB = 0, 1, 2, 5, 6, 8
ASSOCIATED, UNASSOCIATED = 1, 2  # kinds of alpha


def unread(path: Path) -> str:
    """Why a file of this name is no picture that can be read; "" if it may be one. The file is not opened."""
    suffix = path.suffix.lower()
    try:
        _require_plugin(suffix, "it")
    except ValueError as error:
        return str(error)
    if suffix in (*HEIF, *JXL):
        return ""
    name = Image.registered_extensions().get(suffix)
    if name not in (*Image.OPEN, "MPO"):  # MPO is opened as JPEG
        return "no format that Pillow reads"
    return UNREAD.get(str(name), "")


def read(file: BinaryIO, suffix: str = "") -> Image.Image:
    """Open the first picture in a file; pixels that Pillow would read wrongly are decoded.

    Args:
        file: seekable, at its start; it must stay open until the picture is loaded.
        suffix: of the file's name, in lower case.

    Raises:
        ValueError: the picture is refused, or needs an extra that is not installed.
        Exception: whatever Pillow and tifffile stumble over in a damaged file.
    """
    head = file.read(4)
    file.seek(0)
    if head in TIFF_HEADS:
        page = _page(file)
        if _pillow_reads(page.tags.valueof, page.parent.byteorder == "<"):
            with contextlib.suppress(UnidentifiedImageError):
                return _open(file)
        return _by_tifffile(page, file)
    try:
        return corrected(_open(file))
    except UnidentifiedImageError:
        _require_plugin(suffix, f"a picture in {suffix}")
        _register_plugins()
        return corrected(_open(file))


def corrected(image: Image.Image) -> Image.Image:
    """The same picture, decoded here if Pillow would read it wrongly.

    Args:
        image: any; only one that Pillow opened from a file can be such a picture.

    Raises:
        ValueError: it is refused, or Pillow has loaded it already, wrongly.
    """
    if not isinstance(image, ImageFile.ImageFile):
        return image
    check_size(image.width, image.height)
    if image.format in UNREAD:
        raise ValueError(f"{image.format} is not read: {UNREAD[image.format]}")
    opened = bool(image.tile)  # and not loaded
    if image.format == "TIFF":
        tags = cast(Any, image).tag_v2
        file, trusted = cast(BinaryIO, image.fp), _pillow_reads(tags.get, tags.prefix == b"II")
        if opened:
            page = _page(file, image.tell())
            return image if trusted else _by_tifffile(page, file)
        if not trusted:
            raise _loaded("TIFF")
    elif image.format in ("BMP", "DIB") and image.info.get("compression") in (1, 2):
        if not opened:
            raise _loaded("run-length encoded BMP")
        return _run_length_bmp(image, _content(image))
    elif image.format == "PNG" and opened and "transparency" in image.info:
        return _keyed_png(image)
    elif image.format == "JPEG2000" and (
        image.mode in ("P", "PA") or (opened and b"pclr" in _content(image).partition(b"\xff\x4f\xff\x51")[0])
    ):
        raise ValueError("a JPEG 2000 with a palette, whose colours Pillow mixes up: convert it to PNG")
    return image


def check_size(width: int, height: int) -> None:
    """Refuse a picture without pixels, or beyond Pillow's limit."""
    if not width or not height:
        raise ValueError(f"image of {width} x {height} pixels: expected at least one")
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(
            f"image of {width} x {height} pixels: the limit is {limit} (PIL.Image.MAX_IMAGE_PIXELS); shrink it"
        )


def from_array(array: np.ndarray) -> Image.Image:
    """Pillow's image in 8 bits of an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], in uint8, uint16, or float.

    Raises:
        ValueError: another shape or dtype, or floats beyond [0, 1].
    """
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or 0 in array.shape:
        what_to_do = ""
        if array.ndim == 4:
            what_to_do = f"; {BATCH}"
        elif array.ndim == 3 and array.shape[0] in (1, 3, 4):
            what_to_do = "; channels come last: array.transpose(1, 2, 0)"
        raise ValueError(
            f"image: got an array {array.shape}, expected [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], not empty"
            f"{what_to_do}"
        )
    if array.dtype.newbyteorder("=") == np.uint16:
        array = (array.astype(np.uint32) * 255 + 32767) // 65535
    elif array.dtype.kind == "f":
        least, most = array.min(), array.max()
        if not (least >= 0 and most <= 1):
            if not np.isfinite(array).all():
                what_to_do = "replace what is not finite"
            elif least >= 0:
                what_to_do = "divide by 255, or convert to uint8"
            else:
                what_to_do = "give the picture as it was before it was normalized"
            raise ValueError(
                f"image: floats must lie in [0, 1], got values from {least:.4g} to {most:.4g}; {what_to_do}"
            )
        array = (array.astype(np.result_type(array, np.float32)) * 255).round()  # 16 bits would be too coarse
    elif array.dtype != np.uint8:
        what_to_do = "; convert values from 0 to 255 to uint8" if array.dtype.kind in "iu" else ""
        raise ValueError(f"image: got {array.dtype}, expected uint8, uint16, or float in [0, 1]{what_to_do}")
    return Image.fromarray(np.ascontiguousarray(array.astype(np.uint8)))


def to_uint16(values: np.ndarray) -> np.ndarray:
    """Pillow's 32-bit integers, which hold 16-bit grayscale.

    Raises:
        ValueError: values beyond 0 to 65535, for which no scale is known.
    """
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"32-bit integers from {values.min()} to {values.max()}: expected 0 to 65535; scale them to 16 bits"
        )
    return values.astype(np.uint16)


def _open(file: BinaryIO) -> Image.Image:
    file.seek(0)
    Image.init()
    return Image.open(file, formats=[name for name in Image.ID if name not in UNREAD])


def _require_plugin(suffix: str, what: str) -> None:
    if suffix in HEIF:
        require(what, "formats", "pillow_heif")
    if suffix in JXL:
        require(what, "formats", "pillow_jxl")


def _register_plugins() -> None:
    if find_spec("pillow_heif"):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    if find_spec("pillow_jxl"):
        import pillow_jxl  # noqa: F401  registers itself


def _loaded(kind: str) -> ValueError:
    return ValueError(f"image: a {kind} that Pillow has loaded, perhaps wrongly; give the path of its file")


def _content(image: ImageFile.ImageFile) -> bytes:
    """The file's bytes; Pillow can go on from where it was."""
    file = cast(BinaryIO, image.fp)
    position = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(position)
    return data


# PNG and BMP ---------------------------------------------------------------------------------------------------------


def _keyed_png(image: ImageFile.ImageFile) -> Image.Image:
    """A PNG whose transparent colour is scaled as its pixels are: Pillow compares 8 bits with the file's depth."""
    raw = image.tile[0][3]
    if image.mode == "L" and raw in ("L;2", "L;4"):
        bits = int(str(raw)[-1])
        scaled = image.copy()
        scaled.info["transparency"] = (image.info["transparency"] % (1 << bits)) * (255 // ((1 << bits) - 1))
        return scaled
    if image.mode != "RGB" or raw != "RGB;16B":
        return image
    data = _content(image)
    halves = []
    for half in ("RGB;16B", "RGB;16L"):  # Pillow keeps the first or the second byte of each sample
        decoded = Image.open(io.BytesIO(data), formats=["PNG"])
        decoded.tile = [decoded.tile[0]._replace(args=half)]
        halves.append(np.asarray(decoded))
    values = halves[0].astype(np.uint16) << 8 | halves[1]
    opaque = (values != np.array(image.info["transparency"])).any(-1, keepdims=True)
    result = Image.fromarray(np.concatenate([halves[0], opaque * np.uint8(255)], axis=-1))
    result.info = {key: value for key, value in decoded.info.items() if key != "transparency"}
    return result


def _run_length_bmp(image: ImageFile.ImageFile, data: bytes) -> Image.Image:
    """A BMP in which every pixel is encoded; the format leaves open what pixels are that are skipped."""
    if image.mode not in ("L", "P"):
        raise ValueError("a run-length encoded BMP of two colours: save it without compression")
    width, height = image.size
    four, at, args = image.info["compression"] == 2, image.tile[0][2], cast(tuple[Any, ...], image.tile[0][3])
    pixels, line = bytearray(), 0
    while len(pixels) < width * height:
        if at + 2 > len(data):
            raise ValueError("the BMP ends before its last row")
        count, value = data[at : at + 2]
        at += 2
        if count:
            run = bytes([value >> 4, value & 15]) * 128 if four else bytes([value]) * 255
            line += count
            pixels += run[:count]
        elif value > 2:
            size = (value + 1) // 2 if four else value
            run = data[at : at + size]
            run = bytes(nibble for byte in run for nibble in (byte >> 4, byte & 15)) if four else run
            line += value
            pixels += run[:value]
            at += size + size % 2
        elif value == 0 and line == width:
            line = 0
        else:
            raise ValueError("a run-length encoded BMP that leaves out pixels: save it without compression")
        if line > width:
            raise ValueError("a damaged BMP: a run goes beyond its row")
    rows = np.frombuffer(pixels, np.uint8).reshape(height, width)[:: args[-1]]
    result = Image.fromarray(np.ascontiguousarray(rows))
    if image.palette is not None:
        result.putpalette(cast(bytes, image.palette.palette), str(image.palette.rawmode))
    return result


# TIFF ----------------------------------------------------------------------------------------------------------------


def _page(file: BinaryIO, number: int = 0) -> TiffPage:
    """A page's tags, once nothing speaks against reading it."""
    import tifffile

    file.seek(0)
    try:
        page = cast("TiffPage", tifffile.TiffFile(file).pages[number])
        check_size(page.imagewidth, page.imagelength)
        _check_segments(page, file)
    except ValueError:  # as of tifffile's own
        raise
    except Exception as error:  # whatever tags of another type or number make it stumble over
        raise ValueError(f"a damaged TIFF: {error}") from error
    return page


def _pillow_reads(get: Callable[[int, Any], Any], little_endian: bool) -> bool:
    """Whether the tests have found Pillow right about a layout, given its tags; it may still refuse it."""
    bits, kinds = _values(get(258, 1)), _values(get(339, UNSIGNED))
    compression, photometric = get(259, RAW), get(262, WHITE_IS_ZERO)
    contiguous, reversed_bits = get(284, 1) == 1, get(266, 1) == 2
    if compression not in BY_LIBTIFF or len(bits) != 1 or len(kinds) != 1:
        return False
    (depth,), (kind,) = bits, kinds
    if kind == UNSIGNED and depth <= 8:
        if compression == JPEG or photometric == LAB:
            return contiguous
        if not contiguous and get(338, ()) and (compression == RAW or photometric != RGB):
            return False
        inverted_bytes = depth == 8 and photometric == WHITE_IS_ZERO
        reads_bits = not reversed_bits or (contiguous and not inverted_bytes)
        return compression != RAW or (photometric != YCBCR and reads_bits)
    if kind == UNSIGNED and depth == 16:
        return photometric in (BLACK_IS_ZERO, RGB, CMYK) and contiguous and not reversed_bits
    return kind == FLOAT and depth == 32 and photometric == BLACK_IS_ZERO and little_endian and contiguous


def _values(found: Any) -> set[int]:
    return set(map(int, found)) if isinstance(found, (tuple, list)) else {int(found)}


def _named(code: Any) -> Any:
    return getattr(code, "name", code)


def _check_segments(page: TiffPage, file: BinaryIO) -> None:
    """Refuse strips and tiles that are missing or cut off; libtiff and tifffile fill them up in part."""
    if page.compression not in BY_LIBTIFF:
        raise ValueError(
            f"a TIFF compressed with {_named(page.compression)}, where damage would go unseen: save it with another "
            "compression, such as deflate or LZW"
        )
    size = file.seek(0, io.SEEK_END)
    segments = list(zip(page.dataoffsets, page.databytecounts, strict=False))
    if len(segments) != math.prod(page.chunked) or any(
        start < 8 or count < 1 or start + count > size for start, count in segments
    ):
        raise ValueError("a damaged TIFF: a strip or tile is missing, or goes beyond the end of the file")
    for start, count in segments if page.compression == JPEG else []:
        file.seek(start + max(0, count - 16))
        if not file.read(min(count, 16)).rstrip(b"\0").endswith(b"\xff\xd9"):
            raise ValueError("a damaged TIFF: a strip or tile ends before its JPEG does")


def _by_tifffile(page: TiffPage, file: BinaryIO) -> Image.Image:
    photometric, extra = page.photometric, page.extrasamples
    colours = 3 if photometric == RGB else 1
    alpha = extra[0] if extra else None
    dtype = page.dtype
    if (
        page.compression not in (RAW, *DEFLATE)
        or photometric not in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB)
        or page.imagedepth != 1
        or page.samplesperpixel != colours + len(extra)
        or len(extra) > 3
        or not (alpha in (None, ASSOCIATED, UNASSOCIATED) or (photometric == RGB and not any(extra)))
        or dtype is None
        or dtype.kind not in "uif"
        or dtype.itemsize * 8 != page.bitspersample
        or dtype in (np.int64, np.uint64)
    ):
        raise ValueError(
            f"a TIFF of {page.samplesperpixel} samples of {page.bitspersample} bits per pixel, "
            f"{_named(photometric)}, compressed with {_named(page.compression)}: Pillow cannot be "
            "trusted with it, and tifffile is used for gray and RGB without compression or with deflate; save it so, "
            "or as PNG"
        )
    _check_lengths(page, file)
    samples = page.asarray(maxworkers=1)
    if page.planarconfig == 2 and page.samplesperpixel > 1:
        samples = np.moveaxis(samples, 0, -1)
    samples = _scaled(samples.reshape(page.imagelength, page.imagewidth, -1))
    values = samples[..., :colours]
    top = 1 if values.dtype.kind == "f" else 65535
    if photometric == WHITE_IS_ZERO:
        values = top - values
    if alpha == ASSOCIATED:  # over white
        values = np.minimum(values + (top - samples[..., colours : colours + 1].astype(np.float64)), top)
        values = values.astype(samples.dtype)
    elif alpha == UNASSOCIATED:
        opacity = samples[..., colours : colours + 1]
        values = np.concatenate([np.repeat(values, 3 // colours, axis=-1), opacity], axis=-1)
    image = from_array(values)
    image.getexif()[0x0112] = page.tags.valueof(274, 1)
    if page.iccprofile:
        image.info["icc_profile"] = page.iccprofile
    return image


def _check_lengths(page: TiffPage, file: BinaryIO) -> None:
    """Refuse segments of fewer or more bytes than their pixels take, before tifffile allocates them."""
    rows = page.tilelength if page.is_tiled else min(page.rowsperstrip, page.imagelength)
    columns = page.tilewidth if page.is_tiled else page.imagewidth
    check_size(columns, rows)
    row = columns * page.bitspersample // 8 * (page.samplesperpixel if page.planarconfig == 1 else 1)
    strips = -(-page.imagelength // rows)
    for index, (start, length) in enumerate(zip(page.dataoffsets, page.databytecounts, strict=True)):
        last = not page.is_tiled and index % strips == strips - 1
        least = row * (page.imagelength - (strips - 1) * rows if last else rows)
        if page.compression in DEFLATE:
            file.seek(start)
            data = file.read(length)
            data = data if page.fillorder == 1 else data.translate(REVERSED)
            length = len(zlib.decompressobj().decompress(data, row * rows + 1))
            if length > row * rows:
                raise ValueError(f"a damaged TIFF: a strip or tile of more than {row * rows} bytes")
        if length < least:
            raise ValueError(f"a damaged TIFF: a strip or tile of {length} bytes, expected {least}")


def _scaled(samples: np.ndarray) -> np.ndarray:
    """Integers over their whole range as uint16: the least is black, as the specification has it; floats as they are.

    Pillow saves 16-bit grayscale in signed 32-bit integers, which are therefore not scaled.
    """
    dtype = samples.dtype.newbyteorder("=")
    samples = samples.astype(dtype, copy=False)
    if dtype == np.int32:
        return to_uint16(samples)
    if dtype.kind == "f":
        return samples.astype(np.result_type(dtype, np.float32), copy=False)
    bits = dtype.itemsize * 8
    if dtype.kind == "i":
        samples = samples.view(f"u{dtype.itemsize}") ^ np.array(1 << (bits - 1), f"u{dtype.itemsize}")
    return samples.astype(np.uint16) * 257 if bits == 8 else (samples >> (bits - 16)).astype(np.uint16)
