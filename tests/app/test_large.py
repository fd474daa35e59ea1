"""Georeferenced and large pictures: tile by tile as at once, and what is written where."""

import json
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from commands import NAMES, files_below, refused, segment, state
from miniatures import scene
from PIL import Image

import rfclip
from rfclip.app import large
from rfclip.app.large import label_large
from rfclip.app.sources import special
from rfclip.images import to_rgb
from rfclip.methods import find_protocol
from rfclip.segment.classes import parse_classes
from rfclip.tiny.scenes import MARK, make_scene

rasterio = pytest.importorskip("rasterio")
pytest.importorskip("av")
from source_files import PLACE, write_raster  # noqa: E402

pytestmark = [pytest.mark.usefixtures("folder"), pytest.mark.filterwarnings("ignore:rfclip-tiny is a demonstration")]

SETTINGS = {"kind": "tiled", "scale": 1.0, "bands": None, "range": None}


def picture(height=240, width=350):
    """A scene of scenes."""
    scenes = [make_scene((9, i), 200, object_size=(60, 90)).image for i in range(6)]
    return np.vstack([np.hstack(scenes[:3]), np.hstack(scenes[3:])])[:height, :width]


@pytest.fixture(scope="module")
def segmenter():
    with rfclip.Segmenter(cache=False) as segmenter:
        yield segmenter


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of two windows, of 224 pixels, so that small pictures have several."""
    monkeypatch.setattr(large, "TILE", 112)
    monkeypatch.setattr(large, "BLOCK", 224)


def label(path, segmenter, threshold=None, post=None, **settings):
    return label_large(
        str(path),
        SETTINGS | settings,
        segmenter,
        parse_classes("cat, dog, sky, grass, brick"),
        Path("mask.tif"),
        lambda *_: None,
        threshold=threshold,
        post=post,
    )


def at_once(image, **options):
    """The labels that a segmenter gives the whole picture at its own size."""
    with rfclip.Segmenter(cache=False, short_side=min(image.size)) as segmenter:
        return segmenter(image, "cat, dog, sky, grass, brick", **options).labels


def mask():
    with rasterio.open("mask.tif") as file:
        return file.read(1)


@contextmanager
def opened(path, **settings):
    settings = SETTINGS | settings
    with large._opened(str(path), settings, settings["scale"]) as raster:
        yield raster


# As at once -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"threshold": 0.3}, {"post": "pamr"}], ids=["plain", "threshold", "pamr"])
def test_blocks_have_no_seams(small_blocks, segmenter, options):
    """Every label is that of the picture segmented at once; windows at the borders are flush with them."""
    told = []
    write_raster("big.tif", picture(), **PLACE)
    facts, small = label_large(
        "big.tif",
        SETTINGS,
        segmenter,
        parse_classes("cat, dog, sky, grass, brick"),
        Path("mask.tif"),
        lambda *done: told.append(done),
        threshold=options.get("threshold"),
        post=options.get("post"),
    )
    want = at_once(Image.fromarray(picture()), **options)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert np.array_equal(mask(), want)
    assert len(np.unique(want)) >= 2
    shares = [np.mean(want == index) for index in range(5)]
    assert np.allclose(list(facts["shares"].values()), shares) and facts["data"] == 1
    assert np.array_equal(small.labels, want) and np.array_equal(np.asarray(small.image), picture())


@pytest.mark.parametrize("overviews", [False, True])
def test_scaled_blocks_have_no_seams(small_blocks, segmenter, overviews):
    write_raster("big.tif", picture(400, 600), **PLACE)
    if overviews:
        with rasterio.open("big.tif", "r+") as file:
            file.build_overviews([2], rasterio.enums.Resampling.average)
    label("big.tif", segmenter, scale=0.63 if not overviews else 0.43)
    height, width = (252, 378) if not overviews else (172, 258)
    with rasterio.open("big.tif", **({"overview_level": 0} if overviews else {})) as file:
        whole = file.read(out_shape=(3, height, width), resampling=rasterio.enums.Resampling.cubic).transpose(1, 2, 0)
    assert np.array_equal(mask(), at_once(Image.fromarray(whole)))


def test_parts_are_those_of_the_whole():
    """At any scale, with and without data, to the pixel."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(1, 256, (301, 407, 3), dtype=np.uint8)
    pixels[rng.random((301, 407)) < 0.1] = 0
    write_raster("a.tif", pixels, nodata=0)
    for scale in (1.0, 0.71, 0.13, 1.6):
        with opened("a.tif", scale=scale) as raster:
            height, width = raster.height, raster.width
            image, there = raster.read((0, 0, height, width))
            assert (height, width) == (round(301 * scale), round(407 * scale)) and 0 < there.mean() < 1
            for top, left in ((0, 0), (height // 3, 5), (7, width // 3), (height // 2, width // 2)):
                size = height - top - 3, width // 2
                part, known = raster.read((top, left, *size))
                place = np.s_[top : top + size[0], left : left + size[1]]
                assert np.array_equal(np.asarray(part), np.asarray(image)[place])
                assert np.array_equal(known, there[place])


def test_pixels_without_data_are_in_no_class(small_blocks, monkeypatch, segmenter):
    """Blocks without any are not looked at."""
    pixels = np.dstack([picture(), np.full((240, 350), 255, np.uint8)])
    pixels[:224, :230, 3] = 0
    pixels[230:, 320:, 3] = 0
    write_raster("big.tif", pixels, photometric="rgb", alpha="yes", **PLACE)
    seen, look = [], rfclip.Segmenter.segment
    monkeypatch.setattr(rfclip.Segmenter, "segment", lambda *args, **more: seen.append(args) or look(*args, **more))
    facts, _ = label("big.tif", segmenter)
    assert len(seen) == 3
    want = np.where(pixels[..., 3] == 0, 255, at_once(Image.fromarray(pixels)))  # over white, as elsewhere
    assert np.array_equal(mask(), want)
    assert facts["data"] == np.mean(pixels[..., 3] > 0)


def test_more_names_make_smaller_blocks(monkeypatch, segmenter):
    write_raster("big.tif", picture(130, 250), **PLACE)
    monkeypatch.setattr(segmenter, "memory_limit", 16 * 5 * 112**2)
    monkeypatch.setattr(large, "TILE", 112)
    told = []
    classes = parse_classes("cat, dog, sky, grass, brick")
    options = {"threshold": None, "post": None}
    label_large("big.tif", SETTINGS, segmenter, classes, Path("mask.tif"), lambda *done: told.append(done), **options)
    assert told[-1] == (6, 6)


# What is seen ---------------------------------------------------------------------------------------------------------


def seen(path, **settings):
    with opened(path, **settings) as raster:
        image, there = raster.read((0, 0, raster.height, raster.width))
        assert there.all()
        return np.asarray(image), raster.bands


def test_samples_of_other_kinds():
    """As in any picture where that is known, and over the range given."""
    rng = np.random.default_rng(1)
    wide = rng.integers(0, 65536, (40, 30, 3), dtype=np.uint16)
    write_raster("wide.tif", wide)
    assert np.array_equal(seen("wide.tif")[0], to_rgb(wide))
    assert np.array_equal(seen("wide.tif", range=[0, 65535])[0], to_rgb(wide))
    share = rng.random((40, 30, 3), dtype=np.float32)
    write_raster("float.tif", share)
    assert np.array_equal(seen("float.tif")[0], to_rgb(share))
    reflectance = (share * 3000 - 100).astype(np.int16)
    write_raster("signed.tif", reflectance)
    found, _ = seen("signed.tif", range=[-100.0, 2900.0])
    assert np.abs(found.astype(int) - np.round(share * 255)).max() <= 1
    assert seen("signed.tif", range=[5000.0, 6000.0])[0].max() == 0
    for path, values in (("signed.tif", "int16"), ("far.tif", "from 2 to 3")):
        write_raster("far.tif", share + 2)
        with pytest.raises(ValueError, match=f"{values}.*--range LOW,HIGH"):
            seen(path)


def test_bands():
    rng = np.random.default_rng(2)
    pixels = rng.integers(0, 256, (40, 30, 4), dtype=np.uint8)
    write_raster("four.tif", pixels, photometric="minisblack", alpha="no", **PLACE)
    assert np.array_equal(seen("four.tif")[0], pixels[..., :3])
    assert np.array_equal(seen("four.tif", bands=[4, 3, 2])[0], pixels[..., 3:0:-1])
    with pytest.raises(ValueError, match="--bands 5,1,1: it has 4"):
        seen("four.tif", bands=[5, 1, 1])
    with rasterio.open("four.tif", "r+") as file:
        file.colorinterp = [getattr(rasterio.enums.ColorInterp, name) for name in ("blue", "green", "red", "gray")]
    assert np.array_equal(seen("four.tif")[0], pixels[..., 2::-1])
    write_raster("one.tif", pixels[..., 0])
    assert np.array_equal(seen("one.tif")[0], np.repeat(pixels[..., :1], 3, axis=-1))
    colours = {index: (index, 255 - index, 7) for index in range(256)}
    write_raster("indexed.tif", pixels[..., 0], colours)
    assert np.array_equal(seen("indexed.tif")[0], np.array([colours[i] for i in range(256)], np.uint8)[pixels[..., 0]])


def test_what_is_not_finite_is_no_data():
    share = np.full((40, 30, 3), 0.5, np.float32)
    share[3, 4, 1] = np.nan
    write_raster("float.tif", share)
    with opened("float.tif") as raster:
        image, there = raster.read((0, 0, 40, 30))
    assert np.argwhere(~there).tolist() == [[3, 4]]
    assert image.getpixel((4, 3)) == (255, 255, 255) and image.getpixel((4, 4)) == (128, 128, 128)


def test_dark_pictures_are_told_of(segmenter):
    write_raster("dark.tif", (picture(130, 130).astype(np.uint16) * 12), **PLACE)
    with pytest.warns(UserWarning, match="dark.tif is nearly black, so that little is seen: give --range LOW,HIGH"):
        label("dark.tif", segmenter)
    bright, _ = seen("dark.tif", range=[0, 12 * 255])
    assert np.array_equal(bright, picture(130, 130))


def test_scenes_are_known(segmenter):
    write_raster("big.tif", picture(130, 130), **PLACE)
    with rasterio.open("big.tif", "r+") as file:
        file.update_tags(TIFFTAG_SOFTWARE=MARK["Software"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        label("big.tif", segmenter)


# What is refused ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_read(segmenter, monkeypatch):
    write_raster("a.tif", picture(), tiled=True, compress="deflate")
    data = Path("a.tif").read_bytes()
    Path("cut.tif").write_bytes(data[: len(data) // 2])
    Path("list.vrt").write_text("<VRTDataset rasterXSize='300' rasterYSize='300'></VRTDataset>")
    write_raster("inverted.tif", picture(130, 130)[..., 0], photometric="miniswhite")
    for path, reason in (
        ("cut.tif", "cut.tif cannot be read tile by tile"),
        ("list.vrt", "it is no TIFF, JPEG, PNG or JPEG 2000"),
        ("inverted.tif", "its values are 0 where it is white"),
    ):
        with pytest.raises(ValueError, match=reason):
            label(path, segmenter)
    turned = Image.fromarray(picture(130, 130))
    turned.getexif()[0x0112] = 6
    turned.save("turned.jpg", exif=turned.getexif())
    with pytest.raises(ValueError, match="EXIF orientation"):
        label("turned.jpg", segmenter)
    write_raster("flat.tif", picture(130, 130), blockysize=130, compress="deflate")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(ValueError, match="its tiles are of 130 x 130 pixels"):
        label("flat.tif", segmenter)


def test_smaller_than_a_window(segmenter):
    write_raster("a.tif", picture(100, 130), **PLACE)
    with pytest.raises(ValueError, match="it has 100 pixels along a side, and a window has 112: give a larger --scale"):
        label("a.tif", segmenter)
    label("a.tif", segmenter, scale=1.12)
    with rasterio.open("mask.tif") as file:
        assert file.shape == (112, 146)


@pytest.mark.parametrize("method, name", [("cliptrase", "own:voc21"), ("sclip", "own:voc21"), ("released", "own")])
def test_protocols_that_see_pictures_as_a_whole(method, name):
    write_raster("a.tif", picture(130, 130))
    with (
        rfclip.Segmenter(method=method, protocol=find_protocol(name, method), cache=False) as other,
        pytest.raises(ValueError, match="looks at pictures as a whole.*--protocol common"),
    ):
        label("a.tif", other)


def test_propagation_sees_pictures_as_a_whole(segmenter):
    write_raster("a.tif", picture(130, 130))
    with pytest.raises(ValueError, match="PEARL's propagation looks at pictures as a whole.*--post none or pamr"):
        label("a.tif", segmenter, post="pearl")
    with rfclip.Segmenter(method="pearl", cache=False) as other:
        with pytest.raises(ValueError, match="PEARL's propagation"):
            label("a.tif", other)
        label("a.tif", other, post="none")


def test_a_mask_that_cannot_be_written(segmenter):
    """Which is no bad picture: the folder is not there, or the disk is full."""
    write_raster("small.tif", picture(130, 130), **PLACE)
    with pytest.raises(OSError, match="its mask cannot be written"):
        label_large(
            "small.tif",
            SETTINGS,
            segmenter,
            parse_classes("cat, dog"),
            Path("none/mask.tif"),
            lambda *_: None,
            threshold=None,
            post=None,
        )
    resource = pytest.importorskip("resource")
    write_raster("big.tif", np.random.default_rng(0).integers(0, 256, (250, 250, 3), dtype=np.uint8), **PLACE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))
    try:
        with pytest.raises(OSError, match="its mask cannot be written"):
            label("big.tif", segmenter)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# The command ----------------------------------------------------------------------------------------------------------


def test_a_georeferenced_picture_beside_others():
    Path("in").mkdir()
    write_raster("in/field.tif", picture(150, 180), nodata=0, **PLACE)
    scene(1).save("in/a.png")
    result = segment("in", "--scale", "0.8", "--threshold", "0.2", "--bands", "1,2,3")
    assert result.exit_code == 1
    assert "failed: in/a.png: it has" in result.stderr.replace("\\", "/")
    result = segment("in/field.tif", "--threshold", "0.2")
    refused(result, "field.json was made with other scale, bands")
    assert segment("in", "--threshold", "0.2", "--overwrite").exit_code == 0
    ours = {f"field{suffix}" for suffix in (".mask.tif", ".overlay.png", ".json")}
    plain = {f"a{suffix}" for suffix in (".mask.png", ".overlay.png", ".json")}
    out = Path("rfclip-out")
    assert files_below(out) == ours | plain
    with rasterio.open(out / "field.mask.tif") as file:
        labels, colours = file.read(1), file.colormap(1)
        assert (file.crs, file.transform, file.nodata, file.shape) == (
            "EPSG:32632",
            PLACE["transform"],
            255,
            (150, 180),
        )
        assert (file.profile["tiled"], file.compression.value) == (True, "DEFLATE")
        assert json.loads(file.tags()["classes"]) == NAMES
        assert [file.tags(1)[f"class_{index}"] for index in range(3)] == NAMES
    palette = Image.open(out / "a.mask.png").getpalette()
    assert [colours[i][:3] for i in range(3)] == [tuple(palette[3 * i : 3 * i + 3]) for i in range(3)]
    record = json.loads((out / "field.json").read_text())
    assert (record["width"], record["height"], record["scale"], record["threshold"]) == (180, 150, 1.0, 0.2)
    assert (record["rgb_bands"], record["short_side"], record["window"]) == ([1, 2, 3], None, 112)
    assert [entry["share"] for entry in record["classes"]] == [np.mean(labels == index) for index in range(3)]
    assert Image.open(out / "field.overlay.png").size[0] == 240
    before = state(out)
    assert "2 skipped" in segment("in", "rfclip-out", "--threshold", "0.2").stderr
    assert state(out) == before


def test_the_transform_is_scaled(segmenter):
    write_raster("a.tif", picture(300, 400), **PLACE)
    label("a.tif", segmenter, scale=0.5)
    with rasterio.open("mask.tif") as file:
        assert file.shape == (150, 200)
        assert file.transform == rasterio.Affine(1, 0, 500_000, 0, -0.5, 5_400_000)


@pytest.mark.parametrize("name, driver", [("slide.svs", "GTiff"), ("big.jpg", "JPEG")])
def test_pictures_beyond_the_limit(monkeypatch, name, driver):
    """A BigTIFF without place as whole slides are, and files of other formats."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    tiles = {"tiled": True, "compress": "jpeg", "photometric": "ycbcr", "BIGTIFF": "YES"} if driver == "GTiff" else {}
    write_raster(name, picture(330, 310), driver=driver, **tiles)
    result = segment(name)
    assert result.exit_code == 0, result.output
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(next(Path("rfclip-out").glob("*.mask.tif"))) as file:
            assert (file.shape, file.crs) == ((330, 310), None)


def test_which_pictures_go_so(monkeypatch):
    write_raster("field.tif", picture(20, 20), **PLACE)
    write_raster("plain.tif", picture(20, 20))
    write_raster("plain.png", picture(20, 20), driver="PNG")
    Path("damaged.tif").write_bytes(b"II*\0\0")
    Path("text.png").write_text("no picture")
    found = [(path, path) for path in map(Path, ("field.tif", "plain.tif", "plain.png", "damaged.tif", "text.png"))]
    assert set(special(found)[0]) == {Path("field.tif")}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    assert set(special(found)[0]) == {path for path, _ in found[:3]}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # where Pillow does not open the file any more
    assert set(special(found)[0]) == {path for path, _ in found[:3]}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert set(special(found)[0]) == {Path("field.tif")}


@pytest.mark.parametrize(
    "options, words",
    [
        (["--scale", "0"], ["--scale 0", "above 0"]),
        (["--scale", "nan"], ["--scale nan", "above 0"]),
        (["--bands", "4,3"], ["--bands 4,3", "expected 3 numbers"]),
        (["--bands", "4,x,2"], ["--bands 4,x,2", "expected 3 numbers"]),
        (["--bands", "0,1,2"], ["--bands 0,1,2", "from 1"]),
        (["--range", "3000,0"], ["--range 3000,0", "lower value first"]),
        (["--range", "0,nan"], ["--range 0,nan", "lower value first"]),
    ],
)
def test_options_that_are_refused(options, words):
    scene(1).save("a.png")
    refused(segment("a.png", *options), *words)


def test_options_for_files_only():
    result = segment("https://127.0.0.1:1/a.png", "--scale", "1")
    assert result.exit_code == 1
    assert "--scale, --bands and --range are for files: download it first" in result.stderr
    refused(segment("none.png", "camera:0", "--scale", "1"), "--scale", "none is given")
