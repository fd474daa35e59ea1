"""Every block of Python in README and docs runs as it stands, each page's blocks one after another.

Models that would be downloaded are the bundled one here. Two pages have tests of their own: docs/export.md in
test_export_page.py, and docs/kernels.md in kernels/test_kernels_page.py.
"""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from documentation import PAGES, PYTHON, name_of, run_page

from rfclip.config import TINY
from rfclip.segment import segmenter
from rfclip.tiny.scenes import make_scene
from rfclip.towers import loading

ELSEWHERE = ("docs/export.md", "docs/kernels.md")
WITH_PYTHON = [page for page in PAGES if PYTHON.search(page.read_text("utf-8")) and name_of(page) not in ELSEWHERE]


@pytest.fixture
def bundled(folder, monkeypatch):
    """Any model is the bundled one, in a folder of photographs."""
    for module in (loading, segmenter):
        monkeypatch.setattr(module, "find_model", lambda name, pretrained=None: (TINY, None))
    (folder / "photos").mkdir()
    for number, path in enumerate(["photo.jpg", "photos/one.jpg", "photos/two.jpg"]):
        make_scene((20, number)).picture().save(path)


@pytest.mark.filterwarnings("ignore:rfclip-tiny:UserWarning")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
@pytest.mark.usefixtures("bundled")
def test_the_python_of_a_page(page):
    names = run_page(page)
    if name_of(page) == "docs/photographs.md":
        check_imports(names["result"])


def check_imports(result):
    """The files for annotation tools: gray masks for FiftyOne, and polygons in percent for Label Studio."""
    mask = cv2.imread("fiftyone/labels/photo.png", cv2.IMREAD_UNCHANGED)
    assert np.array_equal(mask, result.labels)
    (task,) = json.loads(Path("label-studio.json").read_text())
    (prediction,) = task["predictions"]
    width, height = result.image.size
    drawn = {name: np.zeros((height, width), np.uint8) for name in result}
    for region in prediction["result"]:
        assert (region["original_width"], region["original_height"]) == (width, height)
        (name,), points = region["value"]["polygonlabels"], np.array(region["value"]["points"])
        assert points.min() >= 0 and points.max() <= 100
        outline = np.rint(points * [width, height] / 100 - 0.5).astype(np.int32)
        cv2.fillPoly(drawn[name], [outline], 1)
    for name, inside in drawn.items():
        assert not (result[name] & (inside == 0)).any() and bool(inside.any()) == bool(result[name].any())
