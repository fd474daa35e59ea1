"""Pictures of every kind, written to files by Pillow, against pixels worked out here from what was written."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image

from rfclip.images import to_rgb

pytestmark = pytest.mark.filterwarnings("error")  # whatever Pillow has to say, nothing is printed

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GRAY = RGB[:, :, 0].copy()
GRAY[0, :2] = 0, 255
GRAY16 = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)
GRAY16[0] = 0, 65535, 128, 129, 256, 257, 32768  # 128 is nearest to 0 and 129 to 1
UNIT = (GRAY16 / 65535).astype(np.float32)
ALPHA = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
ALPHA[0, :2] = 0, 255
INDICES = RNG.integers(0, 4, (5, 7), dtype=np.uint8)
PALETTE = np.array([[250, 10, 20], [0, 200, 30], [5, 6, 7], [255, 255, 0]], np.uint8)


def pixels(image):
    picture = to_rgb(image)
    assert type(picture) is Image.Image
    assert picture.mode == "RGB"
    return np.asarray(picture)


def three(gray):
    return np.stack([gray] * 3, axis=-1)


def on_white(colours, alpha):
    share = (np.asarray(alpha) / 255)[..., None]
    return np.rint(colours * share + 255 * (1 - share))


def paletted():
    image = Image.fromarray(INDICES)
    image.putpalette(PALETTE.ravel().tolist())
    return image


def with_alpha(mode, colours):
    return Image.fromarray(np.concatenate([colours, ALPHA[..., None]], axis=-1), mode)


def big_endian():
    return Image.frombytes("I;16B", GRAY16.shape[::-1], GRAY16.astype(">u2").tobytes())


SCALED = three(np.rint(GRAY16 / 257))
BITS = three(np.where(GRAY > 127, 255, 0))
OPAQUE_BUT_ONE = on_white(PALETTE[INDICES], np.where(INDICES == 2, 0, 255))

# The file's suffix, the picture, how it is saved, the mode Pillow then reads, and the pixels (to 1 where blended).
FILES = {
    "rgb-png": ("png", Image.fromarray(RGB), {}, "RGB", RGB),
    "rgb-bmp": ("bmp", Image.fromarray(RGB), {}, "RGB", RGB),
    "rgb-ppm": ("ppm", Image.fromarray(RGB), {}, "RGB", RGB),
    "rgb-tiff": ("tiff", Image.fromarray(RGB), {"compression": "tiff_lzw"}, "RGB", RGB),
    "rgb-webp": ("webp", Image.fromarray(RGB), {"lossless": True}, "RGB", RGB),
    "gray-png": ("png", Image.fromarray(GRAY), {}, "L", three(GRAY)),
    "gray-tiff": ("tiff", Image.fromarray(GRAY), {}, "L", three(GRAY)),
    "gray-16-png": ("png", Image.fromarray(GRAY16), {}, "I;16", SCALED),
    "gray-16-tiff": ("tiff", Image.fromarray(GRAY16), {}, "I;16", SCALED),
    "gray-16-tiff-big-endian": ("tiff", big_endian(), {}, "I;16B", SCALED),
    "gray-32-tiff": ("tiff", Image.fromarray(GRAY16.astype(np.int32)), {}, "I", SCALED),
    "float-tiff": ("tiff", Image.fromarray(UNIT), {}, "F", three(np.rint(UNIT * 255))),
    "one-bit-png": ("png", Image.fromarray(GRAY).convert("1", dither=0), {}, "1", BITS),
    "one-bit-tiff": ("tiff", Image.fromarray(GRAY).convert("1", dither=0), {}, "1", BITS),
    "rgba-png": ("png", with_alpha("RGBA", RGB), {}, "RGBA", on_white(RGB, ALPHA)),
    "gray-alpha-png": ("png", with_alpha("LA", GRAY[..., None]), {}, "LA", on_white(three(GRAY), ALPHA)),
    "palette-png": ("png", paletted(), {}, "P", PALETTE[INDICES]),
    "palette-gif": ("gif", paletted(), {}, "P", PALETTE[INDICES]),
    "palette-png-transparent": ("png", paletted(), {"transparency": 2}, "P", OPAQUE_BUT_ONE),
    "palette-gif-transparent": ("gif", paletted(), {"transparency": 2}, "P", OPAQUE_BUT_ONE),
    "palette-png-alpha-bytes": (
        "png",
        paletted(),
        {"transparency": bytes([0, 128, 255, 30])},
        "P",
        on_white(PALETTE[INDICES], np.array([0, 128, 255, 30])[INDICES]),
    ),
    "rgb-png-key": (
        "png",
        Image.fromarray(PALETTE[INDICES]),
        {"transparency": (5, 6, 7)},
        "RGB",
        OPAQUE_BUT_ONE,
    ),
    "gray-png-key": ("png", Image.fromarray(GRAY), {"transparency": 0}, "L", three(np.where(GRAY == 0, 255, GRAY))),
    "gray-16-png-key": (
        "png",
        Image.fromarray(GRAY16),
        {"transparency": 257},
        "I;16",
        np.where(three(GRAY16) == 257, 255, SCALED),
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files(tmp_path, case):
    suffix, image, options, mode, want = FILES[case]
    path = tmp_path / f"picture.{suffix}"
    image.save(path, **options)
    with Image.open(path) as opened:
        assert opened.mode == mode
        from_pillow = pixels(opened)
    blended = "alpha" in case
    np.testing.assert_allclose(pixels(path).astype(int), want, rtol=0, atol=1 if blended else 0)
    assert np.array_equal(from_pillow, pixels(str(path)))


def test_cmyk_jpeg(tmp_path):
    inks = np.zeros((16, 48, 4), np.uint8)
    inks[:, :16] = 0, 255, 255, 0
    inks[:, 16:32] = 255, 0, 0, 100
    Image.fromarray(inks, "CMYK").save(tmp_path / "inks.jpg", quality=100, subsampling=0)
    want = [(255, 0, 0), (0, 155, 155), (255, 255, 255)]
    np.testing.assert_allclose(pixels(tmp_path / "inks.jpg")[8, 8::16].astype(int), want, atol=4)


def test_the_first_frame_of_an_animation(tmp_path):
    first, *rest = (Image.new("RGB", (4, 3), colour) for colour in ("red", "lime", "blue"))
    first.save(tmp_path / "moving.gif", save_all=True, append_images=rest)
    with Image.open(tmp_path / "moving.gif") as opened:
        assert opened.n_frames == 3
    assert np.array_equal(pixels(tmp_path / "moving.gif"), np.full((3, 4, 3), (255, 0, 0)))


PILLOW = {
    "rgba": (with_alpha("RGBA", RGB), on_white(RGB, ALPHA)),
    "rgba-premultiplied": (with_alpha("RGBA", RGB).convert("RGBa"), on_white(RGB, ALPHA)),
    "gray-alpha": (with_alpha("LA", GRAY[..., None]), on_white(three(GRAY), ALPHA)),
    "gray-alpha-premultiplied": (with_alpha("LA", GRAY[..., None]).convert("La"), on_white(three(GRAY), ALPHA)),
    "padded": (Image.fromarray(RGB).convert("RGBX"), RGB),
    "big-endian": (big_endian(), SCALED),
    "palette": (paletted(), PALETTE[INDICES]),
}


@pytest.mark.parametrize("case", PILLOW)
def test_pillow_images(case):
    image, want = PILLOW[case]
    before = image.tobytes()
    np.testing.assert_allclose(pixels(image).astype(int), want, rtol=0, atol=1)
    assert image.tobytes() == before


# Orientation ---------------------------------------------------------------------------------------------------------

# Where the first row and the first column of what is stored belong, as the EXIF standard has it.
SIDES = ["top left", "top right", "bottom right", "bottom left", "left top", "right top", "right bottom", "left bottom"]
BLOCKS = np.kron(RNG.integers(0, 256, (2, 3, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
STORED = {
    "jpeg": ("jpg", BLOCKS, {}),
    "png": ("png", BLOCKS, {}),
    "webp": ("webp", BLOCKS, {"lossless": True}),
    "tiff": ("tiff", BLOCKS, {}),
    "gray-tiff": ("tiff", BLOCKS[:, :, 0].copy(), {}),
    "gray-16-tiff": ("tiff", BLOCKS[:, :, 0].astype(np.uint16) * 257, {}),
    "gray-16-png": ("png", BLOCKS[:, :, 0].astype(np.uint16) * 257, {}),
}


def upright(stored, sides):
    first_row, first_column = sides.split()
    rows_stay = first_row in ("top", "bottom")
    turned = stored if rows_stay else stored.swapaxes(0, 1)
    vertical, horizontal = (first_row, first_column) if rows_stay else (first_column, first_row)
    turned = turned[::-1] if vertical == "bottom" else turned
    return turned[:, ::-1] if horizontal == "right" else turned


@pytest.mark.parametrize("orientation", range(1, 9), ids=[sides.replace(" ", "-") for sides in SIDES])
@pytest.mark.parametrize("kind", STORED)
def test_exif_orientation(tmp_path, kind, orientation):
    suffix, stored, options = STORED[kind]
    path = tmp_path / f"turned.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(path, exif=exif, **options)
    want = stored // 257 if stored.dtype == np.uint16 else stored
    if suffix == "jpg":
        with Image.open(path) as opened:
            want = np.asarray(opened)
    want = upright(want if want.ndim == 3 else three(want), SIDES[orientation - 1])
    assert np.array_equal(pixels(path), want)
    assert to_rgb(to_rgb(path)).size == want.shape[1::-1]  # not rotated a second time


def exif_bytes(*entries):
    ifd = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + ifd + bytes(4)


def test_metadata_that_makes_pillow_warn(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "odd.png", exif=exif_bytes((0x010E, 2, 5000, 4000)))
    assert np.array_equal(pixels(tmp_path / "odd.png"), RGB)


def test_metadata_that_pillow_stumbles_on(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "odd.jpg", exif=exif_bytes((0x0112, 3, 1, 6), (0x011A, 2, 4, 8)))
    with pytest.raises(ValueError, match="odd.jpg cannot be read as an image"):
        to_rgb(tmp_path / "odd.jpg")


# Arrays and tensors --------------------------------------------------------------------------------------------------

RGBA = np.concatenate([RGB, ALPHA[..., None]], axis=-1)
SHAPES = {
    "hw": (GRAY, three(GRAY)),
    "hw1": (GRAY[..., None], three(GRAY)),
    "hw3": (RGB, RGB),
    "hw4": (RGBA, on_white(RGB, ALPHA)),
}
ARRAY_DTYPES = {  # what 255 becomes
    "uint8": ("u1", 255),
    "uint16": ("<u2", 65535),
    "uint16-big-endian": (">u2", 65535),
    "float16": ("f2", 1),
    "float32": ("f4", 1),
    "float64": ("f8", 1),
    "float32-big-endian": (">f4", 1),
}
TENSOR_DTYPES = {
    "uint8": (torch.uint8, 255),
    "uint16": (torch.uint16, 65535),
    "float16": (torch.float16, 1),
    "bfloat16": (torch.bfloat16, 1),
    "float32": (torch.float32, 1),
    "float64": (torch.float64, 1),
}


@pytest.mark.parametrize("dtype", ARRAY_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_arrays(shape, dtype):
    values, want = SHAPES[shape]
    kind, top = ARRAY_DTYPES[dtype]
    array = (values.astype(np.float64) * (top / 255)).astype(kind)
    before = array.copy()
    np.testing.assert_allclose(pixels(array).astype(int), want, rtol=0, atol=shape == "hw4")
    assert np.array_equal(array, before)


@pytest.mark.parametrize("dtype", TENSOR_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_tensors(shape, dtype):
    values, want = SHAPES[shape]
    kind, top = TENSOR_DTYPES[dtype]
    tensor = torch.from_numpy(values.astype(np.float64) * (top / 255)).to(kind)
    tensor = tensor if tensor.ndim == 2 else tensor.movedim(-1, 0)
    coarse = 1 if dtype == "bfloat16" else 0  # 8 bits of precision
    np.testing.assert_allclose(pixels(tensor).astype(int), want, rtol=0, atol=coarse + (shape == "hw4"))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32], ids=["uint8", "float32"])
@pytest.mark.parametrize(
    "view",
    [lambda a: a[::-1, ::2], lambda a: a.swapaxes(0, 1), lambda a: a[:, :, ::-1], np.asfortranarray],
    ids=["steps", "transposed", "bgr", "fortran"],
)
def test_arrays_in_another_memory_order(view, dtype):
    array = RGB if dtype is np.uint8 else (RGB / 255).astype(dtype)
    assert np.array_equal(pixels(view(array)), view(RGB))


def test_arrays_that_cannot_be_written():
    array = RGB.copy()
    array.flags.writeable = False
    assert np.array_equal(pixels(array), RGB)


def test_tensors_that_need_gradients():
    tensor = (torch.from_numpy(RGB) / 255).movedim(-1, 0).contiguous().requires_grad_()
    assert np.array_equal(pixels(tensor), RGB)


# What it refuses -----------------------------------------------------------------------------------------------------


def cut(path, image, **options):
    image.save(path, **options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def wide(height, width):
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


BROKEN = {
    "empty": ("empty.png", lambda path: path.touch()),
    "text": ("notes.png", lambda path: path.write_text("no picture")),
    "cut-png": ("cut.png", lambda path: cut(path, wide(40, 40))),
    "cut-jpeg": ("cut.jpg", lambda path: cut(path, wide(40, 40), quality=95)),
    "cut-gif": ("cut.gif", lambda path: cut(path, wide(40, 40).quantize(64))),
    "cut-tiff": ("cut.tiff", lambda path: cut(path, wide(40, 40))),
    "gray-32-tiff-beyond-16": (
        "beyond.tiff",
        lambda path: Image.fromarray(np.array([[-5, 65536, 257]], np.int32)).save(path),
    ),
    "float-tiff-out-of-range": ("range.tiff", lambda path: Image.fromarray(UNIT * 2).save(path)),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(tmp_path, case):
    name, write = BROKEN[case]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} cannot be read as an image: .") as error:
        to_rgb(tmp_path / name)
    assert "object at 0x" not in str(error.value)
    assert "BufferedReader" not in str(error.value)


def test_postscript_is_never_run(tmp_path, monkeypatch):
    """An EPS file is a program; under any name, nothing hands it to Ghostscript."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *given, **options: pytest.fail("Ghostscript was run"))
    wide(6, 8).save(tmp_path / "drawing.png", format="EPS")
    with pytest.raises(ValueError, match="its format is none of Pillow's, or EPS"):
        to_rgb(tmp_path / "drawing.png")


@pytest.mark.parametrize("name", ["missing.png", ".", ""], ids=["missing", "folder", "nothing"])
def test_no_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such image"):
        to_rgb(name)


@pytest.mark.parametrize("limit", [40, 20, 10], ids=["above", "twice", "far-above"])
def test_too_many_pixels(tmp_path, monkeypatch, limit):
    wide(6, 8).save(tmp_path / "large.png")
    inputs = [tmp_path / "large.png", wide(6, 8), np.asarray(wide(6, 8)), torch.zeros(3, 6, 8)]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for image in inputs:
        with pytest.raises(ValueError, match="limit"):
            to_rgb(image)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48)
    for image in inputs:
        assert to_rgb(image).size == (8, 6)


SHAPE = "expected [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]"
TENSOR_SHAPE = "expected [H, W], [1, H, W], [3, H, W] or [4, H, W]"
DTYPE = "expected uint8, uint16, or float in [0, 1]"
RANGE = "floats must lie in [0, 1]"
ARRAY_ERRORS = {
    "int64": (GRAY.astype(np.int64), "int64", DTYPE, "convert values from 0 to 255 to uint8"),
    "bool": (GRAY > 127, "bool", DTYPE),
    "complex": (UNIT.astype(complex), "complex128", DTYPE),
    "bytes-as-float": (RGB.astype(float), f"to {RGB.max()}", RANGE, "divide by 255"),
    "negative": (UNIT - 0.5, "-0.5", RANGE, "as it was before it was normalized"),
    "above": (UNIT * 1.001, "to 1.001", RANGE),
    "nan": (np.where(UNIT > 0.5, np.nan, UNIT), "nan", RANGE, "not finite"),
    "infinite": (np.where(UNIT > 0.5, np.inf, UNIT), "inf", RANGE),
    "number": (np.array(0.5), "()", SHAPE),
    "row": (GRAY[0], "(7,)", SHAPE),
    "two-channels": (RGB[:, :, :2], "(5, 7, 2)", SHAPE),
    "channels-first": (RGB.transpose(2, 0, 1), "(3, 5, 7)", SHAPE, "array.transpose(1, 2, 0)"),
    "batch": (RGB[None], "(1, 5, 7, 3)", SHAPE, "list(pictures)"),
    "no-rows": (RGB[:0], "(0, 7, 3)", SHAPE),
    "no-columns": (GRAY[:, :0], "(5, 0)", SHAPE),
    "tensor-int64": (torch.from_numpy(GRAY).long(), "int64", DTYPE),
    "tensor-bool": (torch.from_numpy(GRAY) > 127, "bool", DTYPE),
    "tensor-normalized": (torch.from_numpy(UNIT) * 4 - 2, "-2", RANGE, "before it was normalized"),
    "tensor-nan": (torch.full((3, 4, 4), torch.nan), "nan", RANGE),
    "tensor-batch": (torch.zeros(1, 3, 4, 4), "(1, 3, 4, 4)", TENSOR_SHAPE, "list(pictures)"),
    "tensor-channels-last": (torch.zeros(5, 6, 3), "(5, 6, 3)", TENSOR_SHAPE, "tensor.permute(2, 0, 1)"),
    "tensor-row": (torch.zeros(4), "(4,)", TENSOR_SHAPE),
    "tensor-empty": (torch.zeros(3, 0, 4), "(3, 0, 4)", TENSOR_SHAPE),
}


@pytest.mark.parametrize("case", ARRAY_ERRORS)
def test_wrong_arrays(case):
    image, *words = ARRAY_ERRORS[case]
    with pytest.raises(ValueError) as error:
        to_rgb(image)
    for word in words:
        assert word in str(error.value)


def test_a_pillow_image_without_pixels():
    with pytest.raises(ValueError, match="0 x 5 pixels"):
        to_rgb(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize(
    "given", [None, 5, [Image.new("RGB", (4, 4))], b"a.png"], ids=lambda given: type(given).__name__
)
def test_what_is_no_picture(given):
    with pytest.raises(ValueError, match=f"got an object of class {type(given).__name__}, expected one picture"):
        to_rgb(given)
