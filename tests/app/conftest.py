"""What the tests of engines and of output files share: eighteen pictures, a segmenter, and its labels of them."""

from pathlib import Path

import pytest
from miniatures import JOB, NAMES, scene


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(18):
        scene(number, 64).save(folder / f"{number:02}.png")
    return [(path, Path(path.stem)) for path in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def segmenter():
    with JOB.segmenter() as segmenter:
        yield segmenter


@pytest.fixture(scope="module")
def masks(pictures, segmenter):
    """The right labels, by path."""
    return {str(path): segmenter(path, NAMES).labels for path, _ in pictures}
