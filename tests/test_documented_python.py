"""Every block of Python in README and docs runs as it stands, each page's blocks one after another.

Models that would be downloaded are the bundled one here. Two pages have tests of their own: docs/export.md in
test_export_page.py, and docs/kernels.md in kernels/test_kernels_page.py.
"""

import pytest
from documentation import PAGES, PYTHON, name_of, run_page

from rfclip.config import TINY
from rfclip.segment import segmenter
from rfclip.tiny.scenes import make_scene
from rfclip.towers import loading

ELSEWHERE = ("docs/export.md", "docs/kernels.md")
WITH_PYTHON = [page for page in PAGES if PYTHON.search(page.read_text("utf-8")) and name_of(page) not in ELSEWHERE]


@pytest.mark.filterwarnings("ignore:rfclip-tiny:UserWarning")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_the_python_of_a_page(page, folder, monkeypatch):
    for module in (loading, segmenter):
        monkeypatch.setattr(module, "find_model", lambda name, pretrained=None: (TINY, None))
    (folder / "photos").mkdir()
    for number, path in enumerate(["photo.jpg", "photos/one.jpg", "photos/two.jpg"]):
        make_scene((20, number)).picture().save(path)
    run_page(page)
