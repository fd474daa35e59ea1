"""What a folder of pictures of every format comes to, and formats that need an extra."""

import subprocess
import sys

import numpy as np
import pytest
from commands import files_below, segment
from PIL import Image

from rfclip.app.cli.common import find_images
from rfclip.formats import unread
from rfclip.images import to_rgb

pytestmark = pytest.mark.usefixtures("folder")
COLOUR = (200, 90, 40)
FORMATS = "bmp dib gif icns ico im j2k jfif jp2 jpe jpeg jpg pbm pcx pgm png pnm ppm sgi tga tif tiff webp"
HEIC_NEEDS = 'it needs pillow_heif: pip install "rfclip[formats]"'
JXL_NEEDS = 'it needs pillow_jxl: pip install "rfclip[formats]"'


def without_plugins(monkeypatch):
    for package in ("pillow_heif", "pillow_jxl"):
        monkeypatch.setitem(sys.modules, package, None)


def picture(path, **options):
    Image.new("RGB", (32, 32), COLOUR).save(path, **options)


def test_every_format_in_a_folder(folder):
    (folder / "in").mkdir()
    names = [f"{suffix}.{suffix.upper() if suffix == 'tga' else suffix}" for suffix in FORMATS.split()]
    for name in names:
        picture(folder / "in" / name)
    Image.new("RGB", (32, 32), COLOUR).save(folder / "in" / "several.mpo", "MPO")
    names += ["several.mpo"]
    if "AVIF" in Image.SAVE:
        picture(folder / "in" / "avif.avif")
        names += ["avif.avif"]
    found, missing = find_images(["in"])
    assert {path.name for path, _ in found} == set(names)
    assert not missing
    for path, _ in found:
        seen = np.asarray(to_rgb(path)).reshape(-1, 3).mean(0)
        assert np.abs(seen - COLOUR).max() < 12, path


def test_what_a_folder_skips_is_named(folder, monkeypatch):
    without_plugins(monkeypatch)
    (folder / "in" / "deep").mkdir(parents=True)
    picture(folder / "in" / "a.png")
    picture(folder / "in" / "drawing.eps")
    for name in (
        "b.txt",
        "deep/c.TXT",
        "README",
        "p.heic",
        "q.HEIC",
        "r.jxl",
        "sky.fits",
        "film.mpg",
        "x.pdf",
        "x.json",
    ):
        (folder / "in" / name).write_bytes(b"something")
    result = segment("in", classes="cat, dog")
    assert result.exit_code == 0
    assert [line for line in result.stderr.splitlines() if line.startswith("skipped")] == [
        "skipped in in: README: no format that Pillow reads",
        "skipped in in: 2 files *.txt: no format that Pillow reads",
        "skipped in in: drawing.eps: it is a program, which Ghostscript would run",
        "skipped in in: film.mpg: a video, which `rfclip segment` takes by its own name",
        f"skipped in in: 2 files *.heic: {HEIC_NEEDS}",
        f"skipped in in: r.jxl: {JXL_NEEDS}",
        "skipped in in: sky.fits: Pillow mixes up its byte order; convert it to TIFF",
        "skipped in in: x.pdf: no format that Pillow reads",
    ]
    assert files_below(folder / "rfclip-out") == {"a.mask.png", "a.overlay.png", "a.json"}


@pytest.mark.parametrize(
    "name, package", [("a.heic", "pillow_heif"), ("a.hif", "pillow_heif"), ("a.jxl", "pillow_jxl")]
)
def test_a_plugin_that_is_missing_is_named(folder, monkeypatch, name, package):
    without_plugins(monkeypatch)
    (folder / name).write_bytes(b"something")
    with pytest.raises(ValueError, match=f'needs {package}: pip install "rfclip\\[formats\\]"'):
        to_rgb(name)


@pytest.mark.parametrize("package, suffix", [("pillow_heif", "heic"), ("pillow_jxl", "jxl")])
def test_plugins_are_registered_when_they_are_needed(folder, package, suffix):
    plugin = pytest.importorskip(package)
    if package == "pillow_heif":
        plugin.register_heif_opener()
    picture(folder / f"a.{suffix}")
    (folder / "misnamed.jpg").write_bytes((folder / f"a.{suffix}").read_bytes())
    code = f"""
import sys, numpy as np
from rfclip.images import to_rgb
assert {package!r} not in sys.modules
for name in ("misnamed.jpg", "a.{suffix}"):
    assert np.abs(np.asarray(to_rgb(name)).reshape(-1, 3).mean(0) - {COLOUR}).max() < 6
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not unread(folder / f"a.{suffix}")


def test_a_plain_picture_imports_no_other_reader(folder):
    picture(folder / "a.png")
    code = """
import sys
from rfclip.images import to_rgb
to_rgb("a.png")
print(sorted({"tifffile", "pillow_heif", "pillow_jxl", "PIL.ImageCms", "torch"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
