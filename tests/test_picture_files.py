"""Files that Pillow reads wrongly, or not at all.

Pixels are worked out here from what was written, and compared with those that OpenCV reads where it can.
"""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from picture_files import packed, tiff
from PIL import Image

from rfclip.images import to_rgb

pytestmark = pytest.mark.filterwarnings("error")

RNG = np.random.default_rng(0)
H, W = 21, 35


def shown(tmp_path, data, name="picture.tif"):
    """The pixels of a file's content, the same from a path and from an image that Pillow opened."""
    path = tmp_path / name
    path.write_bytes(data)
    pixels = np.asarray(to_rgb(path))
    try:
        opened = Image.open(path)
    except OSError:
        return pixels.astype(int)
    with opened:
        assert np.array_equal(to_rgb(opened), pixels)
    return pixels.astype(int)


def by_opencv(data):
    """The samples of a file as OpenCV reads them, [H, W, n]; None if it cannot."""
    try:
        read = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    return None if read is None else np.atleast_3d(read)[..., ::-1]


def refused(tmp_path, data, *words, name="picture.tif"):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} cannot be read as an image: .") as error:
        to_rgb(path)
    for word in words:
        assert word in str(error.value)


# Formats that Pillow only names, or mixes up --------------------------------------------------------------------------


def test_fits(tmp_path):
    cards = ["SIMPLE  =                    T", "BITPIX  =                   16", "NAXIS   =                    2"]
    cards += ["NAXIS1  =                    4", "NAXIS2  =                    3", "END"]
    header = "".join(card.ljust(80) for card in cards).ljust(2880).encode()
    data = header + np.arange(12, dtype=">u2").tobytes().ljust(2880, b"\0")
    refused(tmp_path, data, "or EPS or FITS", name="sky.fits")
    with Image.open(tmp_path / "sky.fits") as opened, pytest.raises(ValueError, match="FITS is not read: Pillow mixes"):
        to_rgb(opened)


def boxed(kind, content):
    return struct.pack(">I4s", 8 + len(content), kind) + content


@pytest.mark.parametrize("palette", [True, False], ids=["palette", "gray"])
def test_jpeg_2000(tmp_path, palette):
    gray, written = Image.fromarray(RNG.integers(0, 4, (8, 8), dtype=np.uint8)), io.BytesIO()
    gray.save(written, "JPEG2000", irreversible=False)
    data = written.getvalue()
    if not palette:
        assert np.array_equal(shown(tmp_path, data, "gray.jp2"), np.stack([gray] * 3, axis=-1))
        return
    colours = bytes([200, 0, 0, 200, 0, 0, 0, 99, 0, 0, 0, 50])  # two are the same
    at = data.index(b"jp2h") - 4
    (size,) = struct.unpack_from(">I", data, at)
    boxes = data[at + 8 : at + size] + boxed(b"pclr", struct.pack(">HB3B", 4, 3, 7, 7, 7) + colours)
    boxes += boxed(b"cmap", struct.pack(">HBBHBBHBB", 0, 1, 0, 0, 1, 1, 0, 1, 2))
    for kept in (boxes, boxes.replace(struct.pack(">BBBI", 1, 0, 0, 17), struct.pack(">BBBI", 1, 0, 0, 16))):
        refused(tmp_path, data[:at] + boxed(b"jp2h", kept) + data[at + size :], "with a palette", name="a.jp2")


# BMP -----------------------------------------------------------------------------------------------------------------

PALETTE = RNG.integers(0, 256, (16, 3), dtype=np.uint8)
ROWS = np.array([[1, 1, 1, 2, 3, 4, 5], [6, 6, 6, 6, 6, 6, 6], [0, 15, 0, 15, 0, 15, 7]])  # the lowest first


def run_length_bmp(codes, four=False, gap=0):
    entries = b"".join(bytes([*colour[::-1], 0]) for colour in PALETTE)
    start = 54 + len(entries) + gap
    head = struct.pack("<2sIHHI", b"BM", start + len(codes), 0, 0, start)
    height, width = ROWS.shape
    info = struct.pack(
        "<IiiHHIIiiII", 40, width, height, 1, 4 if four else 8, 2 if four else 1, len(codes), 0, 0, 16, 0
    )
    return head + info + entries + bytes(gap) + bytes(codes)


EIGHT = {
    "runs": [3, 1, 1, 2, 1, 3, 1, 4, 1, 5, 0, 0, 7, 6, 0, 0, *[1, 0, 1, 15] * 3, 1, 7, 0, 0, 0, 1],
    "as-stored": [3, 1, 0, 4, 2, 3, 4, 5, 0, 0, 7, 6, 0, 0, 0, 7, 0, 15, 0, 15, 0, 15, 7, 0, 0, 0, 0, 1],
    "without-an-end": [3, 1, 0, 4, 2, 3, 4, 5, 0, 0, 7, 6, 0, 0, 0, 7, 0, 15, 0, 15, 0, 15, 7, 0],
}
FOUR = {
    "runs": [3, 0x11, 1, 0x20, 1, 0x30, 1, 0x40, 1, 0x50, 0, 0, 7, 0x66, 0, 0, 6, 0x0F, 1, 0x70, 0, 0, 0, 1],
    "as-stored": [3, 0x11, 0, 4, 0x23, 0x45, 0, 0, 7, 0x66, 0, 0, 0, 7, 0x0F, 0x0F, 0x0F, 0x70, 0, 1],
    "odd-length": [3, 0x11, 0, 3, 0x23, 0x40, 1, 0x50, 0, 0, 7, 0x66, 0, 0, 6, 0x0F, 1, 0x70, 0, 1],
}
LEFT_OUT = {
    "delta": [3, 1, 0, 2, 4, 0, 0, 0, 7, 6, 0, 0, 7, 6, 0, 1],
    "delta-over-rows": [3, 1, 0, 2, 0, 1, 4, 6, 0, 0, 7, 6, 0, 1],
    "short-row": [3, 1, 0, 0, 7, 6, 0, 0, 7, 6, 0, 1],
    "empty-row": [7, 1, 0, 0, 0, 0, 7, 6, 0, 1],
    "short-picture": [7, 1, 0, 0, 7, 6, 0, 1],
}


@pytest.mark.parametrize("gap", [0, 1], ids=["even", "odd"])
@pytest.mark.parametrize(
    "four, codes", [(False, codes) for codes in EIGHT.values()] + [(True, c) for c in FOUR.values()]
)
def test_run_length_bmp(tmp_path, four, codes, gap):
    data = run_length_bmp(codes, four, gap)
    found = shown(tmp_path, data, "runs.bmp")
    assert np.array_equal(found, PALETTE[ROWS[::-1]])
    if codes != EIGHT["without-an-end"]:  # which OpenCV misses
        assert np.array_equal(found, by_opencv(data))


@pytest.mark.parametrize("case", LEFT_OUT)
def test_bmp_that_leaves_out_pixels(tmp_path, case):
    refused(tmp_path, run_length_bmp(LEFT_OUT[case]), "leaves out pixels", name="runs.bmp")


def test_damaged_bmp(tmp_path):
    refused(tmp_path, run_length_bmp([8, 1, 0, 0, 7, 6, 0, 0, 7, 6, 0, 1]), "beyond its row", name="runs.bmp")
    refused(tmp_path, run_length_bmp([7, 1, 0, 0, 7]), "ends before its last row", name="runs.bmp")
    refused(tmp_path, run_length_bmp([0, 7, 1, 1]), "ends before its last row", name="runs.bmp")
    (tmp_path / "runs.bmp").write_bytes(run_length_bmp(EIGHT["runs"]))
    with Image.open(tmp_path / "runs.bmp") as opened:
        opened.load()
        with pytest.raises(ValueError, match="a run-length encoded BMP that Pillow has loaded"):
            to_rgb(opened)


# PNG -----------------------------------------------------------------------------------------------------------------


def png(values, bits, kind, key, interlaced=False):
    """A PNG of samples [H, W, n] with one transparent colour; `kind` is 0 for gray and 2 for RGB."""
    height, width, _ = values.shape
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    data = b""
    for top, left, down, across in passes:
        part = values[top::down, left::across]
        for row in part if part.size else []:
            data += b"\0" + packed(row.reshape(1, -1), bits, ">")
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, int(interlaced)),
        b"tRNS": struct.pack(f">{len(key)}H", *key),
        b"IDAT": zlib.compress(data),
        b"IEND": b"",
    }
    content = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + b"".join(content)


@pytest.mark.parametrize("interlaced", [False, True], ids=["rows", "interlaced"])
@pytest.mark.parametrize("bits, kind", [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2)])
def test_png_with_a_transparent_colour(tmp_path, bits, kind, interlaced):
    values = samples("u2" if bits == 16 else "u1", 3 if kind else 1, bits)[0]
    values[3:9, 3:9] = key = values[10, 10]
    if bits == 16:
        values[9:12, 3:9] = key ^ 1  # the same upper bytes
    share = values / ((1 << bits) - 1)
    keyed, data = (values == key).all(-1, keepdims=True), png(values, bits, kind, key, interlaced)
    found = shown(tmp_path, data, "keyed.png")
    read = by_opencv(data)
    read = read / np.iinfo(read.dtype).max
    # OpenCV reads alpha, red, green and blue, and does not see the key of gray.
    other = read[..., 1:] * read[..., :1] + 1 - read[..., :1] if kind else np.where(keyed, 1, read)
    tolerance = 1 if (bits, kind) == (16, 2) else 0.51  # Pillow keeps the upper byte
    for want in (np.where(keyed, 1, share), other):
        np.testing.assert_allclose(found, np.broadcast_to(want * 255, (H, W, 3)), rtol=0, atol=tolerance)


# TIFF ----------------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "strip": {},
    "strips": {"rows": 4},
    "tiles": {"tile": 16},
    "deflate": {"rows": 4, "deflate": True},
    "deflated-tiles": {"tile": 16, "deflate": True},
    "reversed-bits": {"rows": 4, "fill_order": 2},
    "reversed-deflate": {"rows": 4, "deflate": True, "fill_order": 2},
}
COLOURS = {"white-is-zero": (0, 1), "black-is-zero": (1, 1), "rgb": (2, 3), "rgb-planes": (2, 3)}
DTYPES = ("u1", "u2", "u4", "i1", "i2", "f2", "f4", "f8")


def samples(dtype, count, bits=None):
    """Random samples that reach both ends of their range, and the share of white of each."""
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        values = RNG.random((H, W, count)).astype(dtype)
        return values, values.astype(np.float64)
    bits = bits or dtype.itemsize * 8
    least = -(1 << (bits - 1)) if dtype.kind == "i" else 0
    values = RNG.integers(least, least + (1 << bits), (H, W, count), dtype=np.int64)
    values[0, :2] = [[least], [least + (1 << bits) - 1]]
    return values.astype(dtype), (values - least) / ((1 << bits) - 1)


@pytest.mark.parametrize("order", "<>", ids=["little-endian", "big-endian"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("colours", COLOURS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiff(tmp_path, dtype, colours, layout, order):
    photometric, count = COLOURS[colours]
    values, share = samples(dtype, count)
    share = 1 - share if photometric == 0 else share
    planar = 2 if colours == "rgb-planes" else 1
    data = tiff(values, photometric, order=order, planar=planar, **LAYOUTS[layout])
    found = shown(tmp_path, data)
    tolerance = 1 if dtype == "u2" and count == 3 else 0.51  # Pillow keeps the upper byte
    np.testing.assert_allclose(found, np.broadcast_to(share * 255, (H, W, 3)), rtol=0, atol=tolerance)
    if planar == 2:  # OpenCV mixes up the planes of all but bytes
        return
    read = by_opencv(data)
    assert (read is None) == (dtype == "f2" or (dtype in ("u1", "i1") and layout == "tiles"))
    if read is not None:
        bounds = (0, 1) if read.dtype.kind == "f" else (np.iinfo(read.dtype).min, np.iinfo(read.dtype).max)
        read = np.interp(read, bounds, (0, 1))
        read = 1 - read if photometric == 0 and values.itemsize > 1 else read  # OpenCV leaves that to its caller
        np.testing.assert_allclose(found, np.broadcast_to(read * 255, (H, W, 3)), rtol=0, atol=tolerance)


@pytest.mark.parametrize("order", "<>", ids=["little-endian", "big-endian"])
@pytest.mark.parametrize("tile", [None, 16], ids=["strips", "tiles"])
@pytest.mark.parametrize("colours", COLOURS)
@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "i2"])
def test_tiff_of_differences(tmp_path, dtype, colours, tile, order):
    photometric, count = COLOURS[colours]
    values, share = samples(dtype, count)
    share = 1 - share if photometric == 0 else share
    planar = 2 if colours == "rgb-planes" else 1
    data = tiff(values, photometric, order=order, planar=planar, tile=tile, rows=4, deflate=True, predictor=2)
    tolerance = 1 if dtype == "u2" and count == 3 else 0.51  # Pillow keeps the upper byte
    np.testing.assert_allclose(shown(tmp_path, data), np.broadcast_to(share * 255, (H, W, 3)), rtol=0, atol=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("photometric", [0, 1, 3], ids=["white-is-zero", "black-is-zero", "palette"])
def test_tiff_of_few_bits(tmp_path, photometric, bits, layout):
    values, share = samples("u1", 1, bits)
    colours = RNG.integers(0, 256, (3, 1 << bits))
    tags = [(320, "H", (colours * 257).ravel())] if photometric == 3 else []
    data = tiff(values, photometric, bits, tags=tags, **LAYOUTS[layout])
    if photometric == 3 and layout == "reversed-bits":
        return refused(tmp_path, data)  # Pillow knows no such palette
    want = [1 - share, share, share, colours.T[values[..., 0]] / 255][photometric]
    np.testing.assert_allclose(shown(tmp_path, data), np.broadcast_to(want * 255, (H, W, 3)), rtol=0, atol=0.51)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("planar", [1, 2], ids=["contiguous", "planes"])
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_cmyk_tiff(tmp_path, dtype, planar, layout):
    values, share = samples(dtype, 4)
    data = tiff(values, 5, planar=planar, **LAYOUTS[layout])
    if layout.startswith("reversed") or (planar == 2 and dtype == "u2"):
        return refused(tmp_path, data, "SEPARATED")
    np.testing.assert_allclose(shown(tmp_path, data), (1 - share[..., :3]) * (1 - share[..., 3:]) * 255, rtol=0, atol=2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("planar", [1, 2], ids=["contiguous", "planes"])
def test_ycbcr_tiff(tmp_path, planar, layout):
    values = samples("u1", 3)[0] // 4 + 96  # within the gamut
    data = tiff(values, 6, planar=planar, tags=[(530, "H", [1, 1])], **LAYOUTS[layout])
    if "deflate" not in layout or "reversed" in layout:
        return refused(tmp_path, data, "YCBCR")
    luma, blue, red = np.moveaxis(values.astype(float), -1, 0)
    blue, red = blue - 128, red - 128
    want = np.stack([luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue], axis=-1)
    np.testing.assert_allclose(shown(tmp_path, data), want, rtol=0, atol=2)


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "i2", "f4"])
@pytest.mark.parametrize("planar", [1, 2], ids=["contiguous", "planes"])
@pytest.mark.parametrize("kind", [1, 2], ids=["associated", "unassociated"])
@pytest.mark.parametrize("colours", [1, 3], ids=["gray", "rgb"])
@pytest.mark.parametrize("deflate", [False, True], ids=["plain", "deflate"])
def test_tiff_with_alpha(tmp_path, deflate, colours, kind, planar, dtype):
    values, share = samples(dtype, colours + 1)
    photometric = 2 if colours == 3 else 1
    opacity = share[..., -1:]
    if kind == 1:
        low = np.minimum(values[..., :-1], values[..., -1:])
        share = np.where(values[..., :-1] > values[..., -1:], opacity, share[..., :-1])
        values = np.concatenate([low, values[..., -1:]], axis=-1)
        want = share + 1 - opacity
    else:
        want = share[..., :-1] * opacity + 1 - opacity
    found = shown(tmp_path, tiff(values, photometric, planar=planar, rows=5, extra=[kind], deflate=deflate))
    tolerance = 3 if dtype in ("u1", "u2") else 1.5  # Pillow keeps the upper bytes
    opaque = opacity > 0.1  # below, Pillow divides by few levels
    np.testing.assert_allclose(found * opaque, want * 255 * opaque * np.ones(3), rtol=0, atol=tolerance)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_a_tiff_that_pillow_reads_wrongly(tmp_path, orientation):
    values, _ = samples("u2", 1)
    plain = Image.fromarray(((65535 - values[..., 0].astype(int)) / 257).round().astype(np.uint8))
    turned = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(orientation)
    want = plain if turned is None else plain.transpose(turned)
    data = tiff(values, 0, tags=[(274, "H", [orientation])])
    assert np.array_equal(shown(tmp_path, data), np.asarray(want.convert("RGB")))


def test_the_page_that_was_sought(tmp_path):
    pages = [Image.fromarray(RNG.integers(0, 65536, (5, 7), dtype=np.uint16)) for _ in range(3)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    with Image.open(tmp_path / "pages.tif") as opened:
        opened.seek(2)
        assert np.array_equal(to_rgb(opened), to_rgb(pages[2]))


def test_a_tiff_that_pillow_has_loaded(tmp_path):
    (tmp_path / "white.tif").write_bytes(tiff(samples("u2", 1)[0], 0))
    with Image.open(tmp_path / "white.tif") as opened:
        opened.load()
        with pytest.raises(ValueError, match="a TIFF that Pillow has loaded, perhaps wrongly; give the path"):
            to_rgb(opened)


REFUSED_TIFF = {
    "12-bit": (("u2", 1, 12), 1, {}, "samples of 12 bits"),
    "ycbcr": (("u1", 3), 6, {}, "YCBCR"),
    "lab-planes": (("u1", 3), 8, {"planar": 2}, "CIELAB"),
    "three-bands": (("u2", 3), 1, {"extra": [0, 0]}, "3 samples of 16 bits"),
    "int32": (("i4", 1), 1, {}, "expected 0 to 65535"),
    "uint64": (("u8", 1, 32), 1, {"bits": 64}, "samples of 64 bits"),
}


@pytest.mark.parametrize("case", REFUSED_TIFF)
def test_tiff_that_is_refused(tmp_path, case):
    arguments, photometric, options, words = REFUSED_TIFF[case]
    options = {"bits": arguments[2] if len(arguments) > 2 else None} | options
    refused(tmp_path, tiff(samples(*arguments)[0], photometric, **options), words)


def test_too_many_pixels(tmp_path, monkeypatch):
    path = tmp_path / "large.tif"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", H * W - 1)
    path.write_bytes(tiff(samples("u2", 1)[0], 0))
    with pytest.raises(ValueError, match="the limit is 734"):
        to_rgb(path)
    path.write_bytes(tiff(samples("u2", 1)[0][:5, :5], 0, tile=48))
    with pytest.raises(ValueError, match="image of 48 x 48 pixels: the limit"):
        to_rgb(path)


def damaged(data, tag, value, index=0):
    """The file with one of a tag's values replaced, where it is stored apart from the tag."""
    with Image.open(io.BytesIO(data)) as opened:
        values = opened.tag_v2[tag]
    for code in "IH":
        stored = struct.pack(f"<{len(values)}{code}", *values)
        if stored in data:
            break
    changed = struct.pack(f"<{len(values)}{code}", *values[:index], value, *values[index + 1 :])
    return data.replace(stored, changed)


@pytest.mark.parametrize("photometric", [0, 1], ids=["by-tifffile", "by-pillow"])
@pytest.mark.parametrize("deflate", [False, True], ids=["plain", "deflate"])
@pytest.mark.parametrize("tag, value", [(279, 0), (273, 0), (273, 100_000), (279, 60_000)])
def test_strips_out_of_place(tmp_path, photometric, deflate, tag, value):
    data = tiff(samples("u2", 1)[0], photometric, rows=4, deflate=deflate)
    refused(tmp_path, damaged(data, tag, value, 2), "a damaged TIFF: a strip or tile is missing, or goes beyond")


def test_strips_of_other_lengths(tmp_path):
    data = tiff(samples("u2", 1)[0], 0, rows=4)
    refused(tmp_path, damaged(data, 279, 100, 2), "a strip or tile of 100 bytes, expected 280")
    data = tiff(samples("u2", 1)[0], 0, rows=4, deflate=True)
    refused(tmp_path, damaged(data, 279, 50, 2), "a damaged TIFF: a strip or tile of")
    changed = bytearray(data)
    changed[400:420] = bytes(20)
    refused(tmp_path, bytes(changed))


def test_a_strip_that_inflates_beyond_its_pixels(tmp_path):
    data, bomb = tiff(samples("u2", 1)[0], 0), zlib.compress(bytes(50_000_000))
    with Image.open(io.BytesIO(data)) as opened:
        at, length = opened.tag_v2[273][0], opened.tag_v2[279][0]
    assert at == 8
    moved = len(bomb) - length + (len(bomb) - length) % 2
    tags = bytearray(data[at + length + length % 2 :])
    for start in range(2, len(tags) - 4, 12):
        tag, code, count, value = struct.unpack_from("<HHII", tags, start)
        if tag == 279:
            struct.pack_into("<HHII", tags, start, tag, code, count, len(bomb))
        if tag == 259:
            struct.pack_into("<HHII", tags, start, tag, code, count, 8)
    body = bomb + bytes(length + moved - len(bomb) + length % 2)
    refused(tmp_path, data[:4] + struct.pack("<I", 8 + len(body)) + body + bytes(tags), "of more than 1470 bytes")


SMOOTH = Image.fromarray(np.kron(RNG.integers(0, 256, (4, 4, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8)))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_in_tiff(tmp_path, mode):
    image, written = SMOOTH.convert(mode), io.BytesIO()
    image.save(written, "TIFF", compression="jpeg", tiffinfo={278: 16})
    data = written.getvalue()
    want = np.asarray(image.convert("RGB")).astype(int)
    assert abs(shown(tmp_path, data) - want).mean() < 4
    with Image.open(io.BytesIO(data)) as opened:
        short = opened.tag_v2[279][1] // 2
    refused(tmp_path, damaged(data, 279, short, 1), "a strip or tile ends before its JPEG does")


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "lzma"])
@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_tiff_by_libtiff(tmp_path, mode, compression):
    image = SMOOTH if mode == "RGB" else Image.fromarray(np.asarray(SMOOTH)[..., 0].astype(np.uint16) * 257)
    written = io.BytesIO()
    image.save(written, "TIFF", compression=compression)
    want = np.asarray(SMOOTH) if mode == "RGB" else np.asarray(SMOOTH)[..., :1]
    assert np.array_equal(shown(tmp_path, written.getvalue()), np.broadcast_to(want, (64, 64, 3)))


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt"])
def test_fax_is_refused(tmp_path, compression):
    written = io.BytesIO()
    SMOOTH.convert("1").save(written, "TIFF", compression=compression)
    refused(tmp_path, written.getvalue(), "a TIFF compressed with CCITT", "damage would go unseen")
