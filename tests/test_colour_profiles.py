"""Pictures with ICC profiles, against profiles whose effect is known by construction."""

import struct
import zlib

import numpy as np
import pytest
from picture_files import tiff
from PIL import Image, ImageCms

from rfclip.images import to_rgb

pytestmark = pytest.mark.filterwarnings("error")

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
GRAY = RGB[..., 0].copy()
ALPHA = RNG.integers(0, 256, (6, 8, 1), dtype=np.uint8)
GRAY[0, :2] = 0, 255


def swapped():
    """The profile of sRGB with the primaries of red and blue exchanged."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for index in range(struct.unpack_from(">I", data, 128)[0]):
        at = 132 + 12 * index
        name = bytes(data[at : at + 4])
        data[at : at + 4] = {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}.get(name, name)
    return bytes(data)


def profile(space, connection, tags):
    """A profile of version 2 with tags {name: content}."""
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    white = struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)  # D50
    head = struct.pack(
        ">I4sI4s4s4s12s4s", start + len(body), b"lcms", 0x02400000, kind, space, connection, b"", b"acsp"
    )
    return head.ljust(68, b"\0") + white + bytes(48) + table + body


def xyz(*values):
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


WHITE = {b"wtpt": xyz(0.9642, 1, 0.8249)}
GAMMA = 1.5
OWN_GRAY = profile(b"GRAY", b"XYZ ", WHITE | {b"kTRC": struct.pack(">4s4xIH", b"curv", 1, round(GAMMA * 256))})
STRAIGHT = bytes(range(256))


def inks():
    """A CMYK profile: black removes all light, the others none, and cyan alone makes a colour."""
    nodes = b""
    for node in range(16):  # the last ink varies fastest
        cyan, black = node >> 3 & 1, node & 1
        nodes += bytes([0, 128, 128] if black else [128, 200, 90] if cyan else [255, 128, 128])
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9i", *np.eye(3, dtype=int).ravel() * 65536)
    return profile(b"CMYK", b"Lab ", WHITE | {b"A2B0": lut + STRAIGHT * 4 + nodes + STRAIGHT * 3})


def encoded(linear):
    """Linear light as 8-bit sRGB."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def of_lab(lab):
    """sRGB of CIE Lab under D50, by the formulas of CIE and the matrix of sRGB adapted to D50."""
    lightness, a, b = np.moveaxis(np.asarray(lab, float), -1, 0)
    roots = np.stack([(lightness + 16) / 116 + a / 500, (lightness + 16) / 116, (lightness + 16) / 116 - b / 200], -1)
    relative = np.where(roots > 6 / 29, roots**3, 3 * (6 / 29) ** 2 * (roots - 4 / 29))
    to_rgb = [[3.1339, -1.6169, -0.4906], [-0.9788, 1.9161, 0.0335], [0.0719, -0.2290, 1.4052]]
    return encoded(relative * [0.9642, 1, 0.8249] @ np.array(to_rgb).T)


def on_white(colours, alpha):
    return 255 + (colours.astype(float) - 255) * (alpha / 255)


def close(image, want, tolerance=1.5):
    np.testing.assert_allclose(np.asarray(to_rgb(image)).astype(int), want, rtol=0, atol=tolerance)


OTHER = RGB[..., ::-1]
LIGHT = np.repeat(encoded((GRAY / 255) ** GAMMA)[..., None], 3, axis=-1)
PALETTED = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8))
PALETTED.putpalette(RGB.ravel().tolist())
PICTURES = {
    "rgb.png": (Image.fromarray(RGB), swapped(), OTHER),
    "rgb.tif": (Image.fromarray(RGB), swapped(), OTHER),
    "rgb.webp": (Image.fromarray(RGB), swapped(), OTHER),
    "palette.png": (PALETTED, swapped(), OTHER),
    "rgba.png": (Image.fromarray(np.concatenate([RGB, ALPHA], -1)), swapped(), on_white(OTHER, ALPHA)),
    "gray-by-rgb.png": (Image.fromarray(GRAY), swapped(), np.stack([GRAY] * 3, -1)),
    "gray.png": (Image.fromarray(GRAY), OWN_GRAY, LIGHT),
    "gray-alpha.png": (Image.fromarray(np.dstack([GRAY, ALPHA]), "LA"), OWN_GRAY, on_white(LIGHT, ALPHA)),
    "gray-16.png": (Image.fromarray(GRAY.astype(np.uint16) * 257), OWN_GRAY, LIGHT),
}


@pytest.mark.parametrize("name", PICTURES)
def test_profiles_are_converted_to_srgb(tmp_path, name):
    image, icc, want = PICTURES[name]
    image.save(tmp_path / name, icc_profile=icc, **({"lossless": True} if name.endswith("webp") else {}))
    close(tmp_path / name, want)
    with Image.open(tmp_path / name) as opened:
        close(opened, want)


def test_a_jpeg_that_is_turned_and_has_a_profile(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 8), (250, 40, 10)).save(tmp_path / "a.jpg", icc_profile=swapped(), exif=exif, quality=100)
    close(tmp_path / "a.jpg", np.full((16, 8, 3), (10, 40, 250)), 4)


def test_a_profile_in_a_tiff_that_pillow_reads_wrongly(tmp_path):
    white_is_zero = tiff((255 - GRAY).astype(np.uint16) * 257, 0, tags=[(34675, "B", OWN_GRAY)])
    (tmp_path / "gray.tif").write_bytes(white_is_zero)
    close(tmp_path / "gray.tif", LIGHT)


@pytest.mark.parametrize("suffix", ["tif", "jpg"])
def test_cmyk(tmp_path, suffix):
    levels = np.zeros((8, 32, 4), np.uint8)
    levels[:, 8:16, 0] = 255
    levels[:, 16:24, 3] = 255
    levels[:, 24:, 1] = 255
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    Image.fromarray(levels, "CMYK").save(tmp_path / f"inks.{suffix}", icc_profile=inks(), **options)
    lab = [[100, 0, 0], [128 * 100 / 255, 72, -38], [0, 0, 0], [100, 0, 0]]
    want = np.repeat(of_lab(lab), 8, axis=0)[None].repeat(8, axis=0)
    close(tmp_path / f"inks.{suffix}", want, 3)


@pytest.mark.parametrize("options", [{}, {"deflate": True}, {"tile": 16}])
def test_lab(tmp_path, options):
    stored = np.array([[[0, 0, 0], [255, 0, 0], [128, 0, 0], [128, 40, 0], [150, 0, 30], [150, 256 - 20, 256 - 10]]])
    (tmp_path / "lab.tif").write_bytes(tiff(stored.astype(np.uint8), 8, **options))
    lab = np.where(stored > 127, stored - 256, stored).astype(float)
    lab[..., 0] = stored[..., 0] * 100 / 255
    close(tmp_path / "lab.tif", of_lab(lab), 2)


BROKEN = {
    "garbage": (Image.fromarray(RGB), b"no profile", RGB, "cannot open profile"),
    "cut": (Image.fromarray(RGB), swapped()[:300], RGB, ""),
    "gray-for-rgb": (Image.fromarray(RGB), OWN_GRAY, RGB, "it is for GRAY, and the picture is RGB"),
    "cmyk-for-rgb": (Image.fromarray(RGB), inks(), RGB, "it is for CMYK, and the picture is RGB"),
    "without-tags": (Image.fromarray(RGB), profile(b"RGB ", b"XYZ ", WHITE), RGB, ""),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_profile_is_ignored_with_a_warning(tmp_path, case):
    image, icc, want, reason = BROKEN[case]
    path = tmp_path / "picture.png"
    image.save(path, icc_profile=icc)
    with pytest.warns(UserWarning, match=f"picture.png: its ICC profile is ignored: .*{reason}"):
        found = to_rgb(path)
    assert np.array_equal(found, want)


def test_a_profile_that_cannot_be_unpacked(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(RGB).save(path, icc_profile=swapped())
    data = bytearray(path.read_bytes())
    at = data.index(b"iCCP")
    (length,) = struct.unpack_from(">I", data, at - 4)
    data[at + 20 : at + 200] = bytes(180)
    struct.pack_into(">I", data, at + 4 + length, zlib.crc32(data[at : at + 4 + length]))
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="picture.png: its ICC profile is ignored: it is damaged"):
        found = to_rgb(path)
    assert np.array_equal(found, RGB)


def test_a_jpeg_with_a_part_of_its_profile(tmp_path):
    path = tmp_path / "picture.jpg"
    Image.fromarray(RGB).save(path, icc_profile=swapped())
    plain = np.asarray(Image.open(path))
    path.write_bytes(path.read_bytes().replace(b"ICC_PROFILE\0\1\1", b"ICC_PROFILE\0\1\2"))
    with pytest.warns(UserWarning, match="picture.jpg: its ICC profile is ignored: it is damaged"):
        found = to_rgb(path)
    assert np.array_equal(found, plain)
