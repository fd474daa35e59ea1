"""Datasets in miniature, each in its layout on disk, with a score known by hand; missing and bad files."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from miniatures import SIZE, make, score
from PIL import Image

from rfclip.datasets import DATASETS, find_dataset, in_paper
from rfclip.methods import METHODS, Protocol


@pytest.mark.parametrize("name", in_paper())
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


@pytest.mark.parametrize("name", in_paper())
def test_class_lists(name):
    dataset = find_dataset(name).open(root=Path())
    counts = dict(voc21=21, voc20=20, context60=60, context59=59, coco_object=81, coco_stuff=171, cityscapes=19)
    assert len(dataset.classes) == counts.get(name, 150) == len(set(dataset.class_names))
    assert all(n and n == n.strip() for names in dataset.classes for n in names)
    assert dataset.background == (dataset.class_names[0] == "background")
    protocol = METHODS["rf-clip"].protocol.on(name)  # the sizes that the paper gives
    assert (protocol.window, protocol.stride, protocol.logit_scale, protocol.threshold) == (224, 112, 40, 0.1)
    assert protocol.short_side == (560 if name == "cityscapes" else 336)


def test_a_list_that_names_a_picture_twice(tmp_path):
    root = make(tmp_path / "data", "voc21")
    listed = root / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"
    listed.write_text(listed.read_text() * 2)
    assert len(find_dataset("voc21").open(root=root).pairs()) == 2
    listed.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match="voc21: .*utf-8"):
        find_dataset("voc21").open(root=root).pairs()


@pytest.mark.parametrize("orientation", [3, 6])
def test_turned_pictures_are_refused(tmp_path, orientation):
    root = make(tmp_path / "data", "voc21")
    image, _ = find_dataset("voc21").open(root=root).pairs()[0]
    turned = Image.Exif()
    turned[0x0112] = orientation
    Image.open(image).save(image, exif=turned)
    with pytest.raises(ValueError, match=f"EXIF orientation is {orientation}"):
        score(root, "voc21", tmp_path / "run")


@pytest.mark.parametrize("name", in_paper())
def test_missing_data_shows_the_layout(tmp_path, name):
    dataset = find_dataset(name)
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError) as refused:
            dataset.open(root=root).items()
        assert all(line in str(refused.value) for line in dataset.layout)
        assert "found there: nothing" in str(refused.value)
    make(tmp_path, name)
    _, labels = dataset.open(root=tmp_path).pairs()[1]
    labels.unlink()
    with pytest.raises(ValueError, match=f"missing: .*{labels.name.partition('_gtFine')[0]}"):
        dataset.open(root=tmp_path).items()


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
    _, labels = find_dataset("voc21").open(root=root).pairs()[0]
    spoil(labels)
    with pytest.raises(ValueError, match=words) as refused:
        score(root, "voc21", tmp_path / "run")
    assert str(labels) in str(refused.value)


def test_options_of_datasets():
    assert find_dataset("scenes").open(root=None, count=2, seed=None).described() == {
        "dataset": "scenes",
        "count": 2,
        "seed": 0,
    }
    with pytest.raises(ValueError, match="--root does not apply to scenes"):
        find_dataset("scenes").open(root=Path())
    with pytest.raises(ValueError, match="--seed does not apply to voc21"):
        find_dataset("voc21").open(root=Path(), seed=0)
    with pytest.raises(ValueError, match="voc21: --root DIR is missing"):
        find_dataset("voc21").open()
    with pytest.raises(ValueError, match="at least one scene"):
        find_dataset("scenes").open(count=0)
    with pytest.raises(ValueError, match=f"'photos': expected one of {', '.join(DATASETS)}"):
        find_dataset("photos")


def test_scenes_are_items_with_labels_and_single_objects():
    scenes = find_dataset("scenes").open(count=3)
    items = scenes.items()
    assert len({json.dumps(item) for item in items}) == len(items) == 6
    assert scenes.items(2) == [*items[:2], *items[3:5]]
    other = find_dataset("scenes").open(count=3, seed=1)
    for n, item in enumerate(items):
        rgb, labels = scenes.read(item)
        assert np.array_equal(rgb, scenes.read(item)[0])
        assert not np.array_equal(rgb, other.read(other.items()[n])[0])
        if n < 3:
            assert labels.shape == rgb.size[::-1] == (168, 168)
        else:
            assert rgb.size == (112, 112) and scenes.candidates[labels] == scenes.class_names[labels]


@pytest.mark.parametrize("name", METHODS)
def test_protocols_know_their_datasets(name):
    for dataset in DATASETS:
        assert METHODS[name].protocol.on(dataset).window > 0
    with pytest.raises(ValueError, match="'cityscape': expected one of"):
        METHODS[name].protocol.on("cityscape")
    with pytest.raises(ValueError, match="'photos': expected one of"):
        Protocol(datasets={"photos": {"window": 1}})
