"""Files of masks in Parquet."""

import sys

import numpy as np
import pytest
from miniatures import same

from rfclip.outputs import encode, read_masks, write_shard


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (7, 5)], ids=str)
def test_runs_of_labels(tmp_path, shape):
    """Against a loop, and through a file; labels that change often, seldom and never."""
    pytest.importorskip("pyarrow")
    rng = np.random.default_rng(0)
    images = {}
    for number, classes in enumerate((1, 2, 255)):
        labels = rng.integers(0, classes, shape).astype(np.uint8)
        labels[labels == classes // 2] = 255
        runs = []
        for value in labels.ravel().tolist():
            if runs and runs[-1][0] == value:
                runs[-1][1] += 1
            else:
                runs.append([value, 1])
        found = encode(labels)
        assert [list(pair) for pair in zip(found["values"].tolist(), found["lengths"].tolist(), strict=True)] == runs
        row = {
            "image": f"{number}.png",
            "path": f"/{number}.png",
            "height": shape[0],
            "width": shape[1],
            "seconds": 0.5,
        } | found
        images[row["image"]] = labels
        write_shard(tmp_path / f"masks-{number}.parquet", [row], {"nothing": 255})
    same(read_masks(tmp_path), images)


def test_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r'--format parquet needs pyarrow: pip install "rfclip\[parquet\]"'):
        list(read_masks(tmp_path))


def test_folders_without_masks(tmp_path):
    """Said when asked, not once the first picture is."""
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match="no such folder"):
        read_masks(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no masks-\*\.parquet in this folder"):
        read_masks(tmp_path)
