"""Benchmarks in miniature, each in its layout on disk, with a score known by hand; missing and bad files."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from miniatures import SIZE, make, score, setup
from PIL import Image

from rfclip.benchmarks import BENCHMARKS
from rfclip.methods import METHODS


@pytest.mark.parametrize("name", BENCHMARKS)
def test_miou_by_hand(tmp_path, name):
    """In the first picture, 128 pixels of class 1 are right, and 256 of class 3 are taken for 2; in the second, 256 of
    class 3 are right and the others do not count.

    Intersection over union: 1 for class 1, 0 for class 2, 256 / 512 for class 3; no other class occurs.
    """
    result = score(make(tmp_path / "data", name), name, tmp_path / "run")
    assert result.iou[1:4].tolist() == [1, 0, 0.5]
    assert np.isnan(np.delete(result.iou, [1, 2, 3])).all()
    assert result.miou == 0.5
    assert result.pixel_accuracy == (128 + 256) / (128 + 256 + 256)
    assert result.confusion.sum() == 640 and result.images == 2
    record = json.loads((tmp_path / "run/result.json").read_text())
    assert record["miou"] == 0.5 and list(record["iou"].values())[1:4] == [1, 0, 0.5]
    assert "50.00 % mIoU" in (tmp_path / "run/result.md").read_text()
    for picture in ("confusion.png", "worst-1.jpg", "worst-2.jpg"):
        Image.open(tmp_path / "run" / picture).load()
    assert [path.name for path in (tmp_path / "run").glob(".*")] in ([], [".lock"])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_class_lists(name):
    benchmark = BENCHMARKS[name]
    counts = dict(voc21=21, voc20=20, context60=60, context59=59, coco_object=81, coco_stuff=171, cityscapes=19)
    assert len(benchmark.classes) == counts.get(name, 150) == len(set(benchmark.class_names))
    assert all(n and n == n.strip() for names in benchmark.classes for n in names)
    assert benchmark.background == (benchmark.class_names[0] == "background")
    protocol = METHODS["rf-clip"].protocol.on(name)  # the sizes that the paper gives
    assert (protocol.window, protocol.stride, protocol.logit_scale, protocol.threshold) == (224, 112, 40, 0.1)
    assert protocol.short_side == (560 if name == "cityscapes" else 336)
    assert setup(Path(), name).threshold == (0.1 if benchmark.background else None)


def test_a_list_that_names_a_picture_twice(tmp_path):
    root = make(tmp_path / "data", "voc21")
    listed = root / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"
    listed.write_text(listed.read_text() * 2)
    assert len(BENCHMARKS["voc21"].pairs(root)) == 2
    listed.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match="voc21: .*utf-8"):
        BENCHMARKS["voc21"].pairs(root)


@pytest.mark.parametrize("orientation", [3, 6])
def test_turned_pictures_are_refused(tmp_path, orientation):
    root = make(tmp_path / "data", "voc21")
    image, _ = BENCHMARKS["voc21"].pairs(root)[0]
    turned = Image.Exif()
    turned[0x0112] = orientation
    Image.open(image).save(image, exif=turned)
    with pytest.raises(ValueError, match=f"EXIF orientation is {orientation}"):
        score(root, "voc21", tmp_path / "run")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_missing_data_shows_the_layout(tmp_path, name):
    benchmark = BENCHMARKS[name]
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError) as refused:
            benchmark.pairs(root)
        assert all(line in str(refused.value) for line in benchmark.layout)
        assert "found there: nothing" in str(refused.value)
    make(tmp_path, name)
    _, labels = benchmark.pairs(tmp_path)[1]
    labels.unlink()
    with pytest.raises(ValueError, match=f"missing: .*{labels.name.partition('_gtFine')[0]}"):
        benchmark.pairs(tmp_path)


def four_bits():
    """A gray PNG of 4 bits a pixel, which Pillow cannot write."""
    rows = b"".join(b"\0" + bytes([0x12] * (SIZE[1] // 2)) for _ in range(SIZE[0]))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", SIZE[1], SIZE[0], 4, 0, 0, 0, 0)), (b"IDAT", zlib.compress(rows))]
    whole = b"\x89PNG\r\n\x1a\n"
    for kind, data in [*chunks, (b"IEND", b"")]:
        whole += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return whole


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda path: path.write_bytes(b"no picture"), "cannot be read as labels"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "cannot be read as labels"),
        (lambda path: Image.new("RGB", SIZE[::-1]).save(path), "a picture of mode RGB"),
        (lambda path: Image.new("L", (5, 7)).save(path), r"labels of \(7, 5\).*picture of \(16, 24\)"),
        (lambda path: Image.new("L", SIZE[::-1], 21).save(path), r"labels \[21\].*0 to 20"),
        (lambda path: path.write_bytes(four_bits()), r"of mode L;4 \(fewer than 8 bits\)"),
    ],
    ids=["no-picture", "cut-off", "rgb", "size", "beyond", "four-bits"],
)
def test_bad_labels(tmp_path, spoil, words):
    root = make(tmp_path, "voc21")
    _, labels = BENCHMARKS["voc21"].pairs(root)[0]
    spoil(labels)
    with pytest.raises(ValueError, match=words) as refused:
        score(root, "voc21", tmp_path / "run")
    assert str(labels) in str(refused.value)
