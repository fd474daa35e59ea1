"""Files that `rfclip prepare` derives from the downloaded ones."""

import json

import numpy as np
import pytest
from commands import run
from miniatures import save_labels
from PIL import Image

from rfclip.datasets import find_dataset
from rfclip.datasets.prepare import coco_object, context


@pytest.mark.parametrize("suffix", ["", "_labelTrainIds"])
def test_prepare_coco_object(tmp_path, suffix):
    """Person is 0 in both kinds of file; toothbrush is 89 as downloaded and 79 as a train id; stuff follows."""
    labels = np.array([[0, 79, 80, 170, 255], [0, 1, 2, 3, 4]] if suffix else [[0, 89, 91, 181, 255], [0, 1, 2, 3, 4]])
    save_labels(tmp_path / f"coco_stuff164k/annotations/val2017/000000000139{suffix}.png", labels)
    (path,) = coco_object(tmp_path)
    assert path == tmp_path / "coco_object/annotations/val2017/000000000139_instanceTrainIds.png"
    assert np.array(Image.open(path)).tolist() == [[1, 80, 0, 0, 255], [1, 2, 3, 4, 5]]
    names = find_dataset("coco_object").open(root=tmp_path).class_names
    assert (names[1], names[80]) == ("person", "toothbrush")


def test_prepare_context(tmp_path):
    mask = pytest.importorskip("pycocotools.mask")

    def region(rows, category):
        drawn = np.zeros((4, 6), np.uint8, order="F")
        drawn[rows] = 1
        encoded = mask.encode(drawn)
        segmentation = {"size": encoded["size"], "counts": encoded["counts"].decode()}
        return {"image_id": 7, "category_id": category, "segmentation": segmentation}

    folder = tmp_path / "VOCdevkit/VOC2010"
    folder.mkdir(parents=True)
    images = [
        {"image_id": 7, "file_name": "2008_000002.jpg", "height": 4, "width": 6, "phase": "val"},
        {"image_id": 8, "file_name": "2008_000003.jpg", "height": 4, "width": 6, "phase": "train"},
    ]
    regions = [region(slice(0, 2), 2), region(slice(1, 3), 458)]  # aeroplane is the first class, wood the last
    (folder / "trainval_merged.json").write_text(json.dumps({"images": images, "annos_segmentation": regions}))
    written = list(context(tmp_path))
    assert [path.name for path in written] == ["2008_000002.png", "val.txt"]
    assert np.array(Image.open(written[0]))[:, 0].tolist() == [1, 59, 59, 0]
    assert written[1].read_text() == "2008_000002\n"
    names = find_dataset("context60").open(root=tmp_path).class_names
    assert (names[1], names[59]) == ("aeroplane", "wood")


def test_prepare(tmp_path):
    save_labels(tmp_path / "coco_stuff164k/annotations/val2017/1.png", np.zeros((2, 2)))
    result = run("prepare", "coco_object", "--root", tmp_path)
    assert result.exit_code == 0 and "1 files" in result.output
    for name, words in (("voc21", "need no preparation"), ("context", "trainval_merged.json")):
        result = run("prepare", name, "--root", tmp_path)
        assert result.exit_code == 2 and words in result.output
    for prepare in (coco_object, context):
        with pytest.raises(ValueError, match="docs/datasets.md"):
            list(prepare(tmp_path / "nowhere"))
