"""Datasets in miniature, each in its layout on disk, with a score known by hand; missing and bad files."""

import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torchvision.datasets
from miniatures import SIZE, make, score
from PIL import Image

import rfclip.datasets
import rfclip.reference
from rfclip.datasets import DATASETS, find_dataset, in_paper
from rfclip.datasets.base import GUIDE
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


def test_classes_in_the_order_of_the_labels():
    """Of the files, which nothing sorts."""
    names = {name: find_dataset(name).open(root=Path()).class_names for name in in_paper()}
    for name in in_paper():
        lines = Path(rfclip.datasets.__file__).with_name("classes").joinpath(f"{name}.txt").read_text().splitlines()
        assert [", ".join(names) for names in find_dataset(name).open(root=Path()).classes] == lines
    train_ids = {c.train_id: c.name.replace(" ", "") for c in torchvision.datasets.Cityscapes.classes}
    assert names["cityscapes"] == [train_ids[n] for n in range(19)]
    assert names["coco_stuff"][:80] == [name.replace(" ", "") for name in names["coco_object"][1:]]
    assert (names["voc21"][1:], names["context60"][1:]) == (names["voc20"], names["context59"])
    assert [names["ade20k"][n] for n in (0, 1, 12, 149)] == ["wall", "building", "person", "flag"]


def test_a_blank_after_a_name_changes_no_token():
    """The released list of context60 has "wood ": all prompts are the same tokens."""
    for template in open_clip.OPENAI_IMAGENET_TEMPLATES:
        with_blank, without = open_clip.SimpleTokenizer()([template("wood "), template("wood")])
        assert template("wood ") != template("wood") and torch.equal(with_blank, without)


def test_bed_is_never_found_in_coco_object():
    """The docstring says so: it is a name of the background too, which comes first."""
    classes = find_dataset("coco_object").open(root=Path()).classes
    names = [(name, number) for number, names in enumerate(classes) for name in names]
    assert [number for name, number in names if name == "bed"] == [0, 60]
    logits = torch.tensor([float(name == "bed") for name, _ in names])[:, None, None]
    class_of_name = torch.tensor([number for _, number in names])
    assert rfclip.reference.upsample_argmax(logits, (2, 2), 40.0, class_of_name, None).unique().tolist() == [0]


def test_a_list_that_names_a_picture_twice(tmp_path):
    root = make(tmp_path / "data", "voc21")
    listed = root / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"
    listed.write_text(listed.read_text() * 2)
    assert len(find_dataset("voc21").open(root=root).pairs()) == 2
    listed.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match="voc21: .*val.txt is no list of names: .*utf-8"):
        find_dataset("voc21").open(root=root).pairs()


LISTS = {"voc21": "VOC2012/ImageSets/Segmentation", "context60": "VOC2010/ImageSets/SegmentationContext"}


@pytest.mark.parametrize("name", LISTS)
def test_lists_edited_elsewhere(tmp_path, name):
    """With a byte-order mark, Windows' line ends, blanks around the names and empty lines."""
    root = make(tmp_path / "data", name)
    wanted = find_dataset(name).open(root=root).pairs()
    listed = root / "VOCdevkit" / LISTS[name] / "val.txt"
    listed.write_bytes(b"\xef\xbb\xbfpicture_0 \t\r\n\r\n  \r\n picture_1\r\n\r\n")
    assert find_dataset(name).open(root=root).pairs() == wanted


@pytest.mark.parametrize("given", ["../x", "/etc/x", "a/b", "..\\x", "C:x", "."])
@pytest.mark.parametrize("name", LISTS)
def test_lists_that_lead_elsewhere(tmp_path, name, given):
    root = make(tmp_path / "data", name)
    listed = root / "VOCdevkit" / LISTS[name] / "val.txt"
    listed.write_text(f"picture_0\n{given}\n")
    with pytest.raises(ValueError) as refused:
        find_dataset(name).open(root=root).pairs()
    assert f"{listed}, line 2: {given!r} has a folder; expected a name alone" in str(refused.value)


@pytest.mark.parametrize("name", ["voc21", "voc20"])
def test_both_folders_of_voc_labels(tmp_path, name):
    """Whichever has a picture's labels, SegmentationClass first."""
    root = make(tmp_path / "data", name)
    own, augmented = (root / "VOCdevkit/VOC2012" / kind for kind in ("SegmentationClass", "SegmentationClassAug"))
    labels = [own / f"picture_{n}.png" for n in range(2)]

    def read():
        return [path for _, path in find_dataset(name).open(root=root).pairs()]

    shutil.copytree(own, augmented)
    assert read() == labels
    labels[1].unlink()
    assert read() == [labels[0], augmented / labels[1].name]
    assert score(root, name, tmp_path / "run").miou == 0.5
    shutil.rmtree(own)
    assert read() == [augmented / path.name for path in labels]
    (augmented / labels[1].name).unlink()
    with pytest.raises(ValueError, match="missing: .*SegmentationClassAug/picture_1.png"):
        read()


def test_ade20k_where_the_guide_has_it(tmp_path):
    root = make(tmp_path / "data", "ade20k")
    (root / "ade").mkdir()
    (root / "ADEChallengeData2016").rename(root / "ade/ADEChallengeData2016")
    assert score(root, "ade20k", tmp_path / "run").miou == 0.5


@pytest.mark.parametrize("name", in_paper())
def test_exchanged_folders(tmp_path, name):
    dataset = find_dataset(name).open(root=make(tmp_path, name))
    pairs = dataset.pairs()
    for image, labels in pairs:
        image.rename(labels.parent / image.name)
        labels.rename(image.parent / labels.name.replace("_gtFine_labelTrainIds", "_gtFine_labelIds"))  # always there
    image, labels = pairs[0]
    moved = image.parent / labels.name.replace("_gtFine_labelTrainIds", "_gtFine_labelIds")
    with pytest.raises(ValueError) as refused:
        dataset.pairs()
    assert (
        f"{name}: pictures and labels are exchanged: move {moved} to {labels.parent} and "
        f"{labels.parent / image.name} to {image.parent}, and all others likewise\n"
    ) in str(refused.value)


@pytest.mark.parametrize("name", in_paper())
def test_labels_among_the_pictures(tmp_path, name):
    dataset = find_dataset(name).open(root=make(tmp_path, name))
    image, labels = dataset.pairs()[1]
    labels.rename(image.parent / labels.name)
    with pytest.raises(ValueError) as refused:
        dataset.pairs()
    assert f"are mixed: move {image.parent / labels.name} to {labels.parent}, " in str(refused.value)


@pytest.mark.parametrize("name", in_paper())
def test_photographs_in_place_of_labels(tmp_path, name):
    """Under the labels' names; found before a model is loaded."""
    dataset = find_dataset(name).open(root=make(tmp_path, name))
    image, labels = dataset.pairs()[0]
    Image.open(image).save(labels)
    with pytest.raises(
        ValueError, match="mode RGB; .*pictures and labels are exchanged.*see the page .*docs/datasets.md"
    ) as refused:
        dataset.items()
    assert str(labels) in str(refused.value)
    Image.new("RGBA", SIZE[::-1]).save(labels)  # as *_gtFine_color.png
    with pytest.raises(ValueError, match="mode RGBA; .*take the files of indices"):
        dataset.items()


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
        assert str(refused.value).endswith(f"\nsee {GUIDE}")
        assert "download" not in str(refused.value) and "Errno" not in str(refused.value)
    assert str(refused.value).startswith(f"{name}: the root {root} does not exist\n")
    make(tmp_path, name)
    _, labels = dataset.open(root=tmp_path).pairs()[1]
    labels.unlink()
    with pytest.raises(ValueError, match=f"missing: .*{labels.name.partition('_gtFine')[0]}"):
        dataset.open(root=tmp_path).items()


@pytest.mark.parametrize("name", in_paper())
def test_the_root_beside_the_right_one(tmp_path, name):
    """One to four folders too deep, or one too high."""
    right = make(tmp_path / "all/data", name)
    image, _ = find_dataset(name).open(root=right).pairs()[0]
    deeper = [folder for folder in image.parents if right in folder.parents][-4:]
    for root in (*deeper, right.parent, right / "nowhere"):
        with pytest.raises(ValueError) as refused:
            find_dataset(name).open(root=root).pairs()
        assert f"this layout lies below {right}: give --root {right}\n" in str(refused.value)
    with pytest.raises(ValueError) as refused:
        find_dataset(name).open(root=tmp_path).pairs()
    assert "give --root" not in str(refused.value)
    with pytest.raises(ValueError, match=f"the root {image} is not a folder"):
        find_dataset(name).open(root=image).pairs()


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
        "object_size": [32, 76],
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
        assert METHODS[name].protocol.on(dataset).short_side > 0
    with pytest.raises(ValueError, match="'cityscape': expected one of"):
        METHODS[name].protocol.on("cityscape")
    with pytest.raises(ValueError, match="'photos': expected one of"):
        Protocol(datasets={"photos": {"window": 1}})
